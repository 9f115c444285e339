"""Measures how right the simulator is: recorded vLLM runs against their simulation.

    python benchmarks/accuracy.py            every run, and the section of benchmarks/RESULTS.md
    python benchmarks/accuracy.py --print    the section on the screen only

The section of ``left_out.py``, the bands on public rows, follows where those rows are.

The recordings, their workloads and the bundles measured on the recorded GPU are used where they are: in the
folder that ``SERVESIM_RECORDED`` names, or beside the checkout. They are not part of the project.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import left_out  # noqa: E402
from public_rows import FOLDER  # noqa: E402
from results_page import measured_against_recordings  # noqa: E402

from servesim.bench.agreement import METRICS, STATISTICS, Agreement  # noqa: E402
from servesim.bench.calibrate import calibrate  # noqa: E402
from servesim.bench.recording import load_recording  # noqa: E402
from servesim.bench.validate import recorded_run  # noqa: E402
from servesim.cost.bundle import SAME_AS  # noqa: E402
from servesim.cost.bundle_csv import stamp_of  # noqa: E402
from servesim.errors import NotSupportedError  # noqa: E402
from servesim.profiler.bundle_writer import meta_bytes  # noqa: E402
from servesim.specs.hardware import NO_HOST_TIME, EngineSpec  # noqa: E402
from servesim.specs.paths import bundles_from  # noqa: E402
from servesim.specs.reading import read_yaml_object  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.bench.validate import RecordedRun

RECORDED = Path(os.environ.get("SERVESIM_RECORDED") or ROOT.parent / "shared" / "data" / "recorded")
ANCHOR = "queued"
UNSUPPORTED = "needs data/expert parallelism"


@dataclass(frozen=True)
class Recorded:
    """A recording, and what the best published simulator says of it."""

    title: str
    folder: str
    workload: str
    published_percent: tuple[float, float, float]
    """Errors of the means of TTFT, TPOT and latency, as LLMServingSim publishes them."""
    has_links: bool = True
    """Whether anything goes over a link, so that the unit of ``link_bw`` matters."""

    def run(self, *, link_gib: bool = True, **flags: Any) -> RecordedRun:
        return recorded_run(
            load_recording(RECORDED / "runs" / "RTXPRO6000" / self.folder),
            dataset=RECORDED / "workloads" / f"{self.workload}.jsonl.gz",
            link_gib=link_gib and self.has_links,
            flags=flags,
        )


LLAMA = Recorded(
    *("Llama-3.1-8B, TP 1", "Llama-3.1-8B", "sharegpt-llama-3.1-8b-300-sps10"),
    published_percent=(-4.0, -1.0, -1.8),
    has_links=False,
)
DENSE = Recorded("Qwen3-32B, TP 2", "Qwen3-32B", "sharegpt-qwen3-300-sps10", (1.3, 0.8, 1.0))
MOE = Recorded(
    "Qwen3-30B-A3B, DP 2 × EP 2",
    "Qwen3-30B-A3B-Instruct-2507",
    "sharegpt-qwen3-300-sps10",
    (-13.6, -1.7, -2.2),
)
RECORDINGS = (LLAMA, DENSE, MOE)
MEASURED = RECORDED / "perf"
TABLES = ("dense.csv", "attention.csv", "per_sequence.csv")

Outcomes = list["Agreement | str"]


def main() -> int:
    """Measure, and replace the section of RESULTS.md; returns the exit status.

    Then the same of the bands on the public rows, where those are.
    """
    status = measured_against_recordings("accuracy", (__doc__ or "").splitlines()[0], section, RECORDED)
    if status or not (FOLDER / "closed_loop.csv").is_file():
        return status
    return left_out.main()


def section() -> str:
    """The section as Markdown."""
    with bundles_from(MEASURED):
        by_llama = calibrate(LLAMA.run(), ANCHOR)
        by_dense = calibrate(DENSE.run(), ANCHOR)
        rows: list[tuple[str, Outcomes]] = [
            ("measured bundles, host time as shipped (fitted on the Qwen3-32B run)", outcomes()),
            ("— `link_bw` read as 10⁹ bytes/s", outcomes(link_gib=False)),
            ("measured bundles, no host time", outcomes(NO_HOST_TIME)),
            ("— `link_bw` read as 10⁹ bytes/s", outcomes(NO_HOST_TIME, link_gib=False)),
            ("measured, calibrated on the Llama run", outcomes(by_llama.engine)),
            ("— `link_bw` read as 10⁹ bytes/s", outcomes(by_llama.engine, link_gib=False)),
        ]
        parts = changes()
        tailless = [
            (
                f"no tail in mixed steps, calibrated on the {name} run",
                outcomes(calibrate(recording.run(), ANCHOR, tail=False).engine),
            )
            for name, recording in (("Llama", LLAMA), ("Qwen3-32B", DENSE))
        ]
    silicon = [
        ("shipped silicon bundles, host time as shipped", outcomes()),
        ("shipped silicon bundles, no host time", outcomes(NO_HOST_TIME)),
        ("shipped silicon bundles, constants of the Llama run", outcomes(by_llama.engine)),
    ]
    swapped = [("the shipped bundles as they are", silicon[1][1])]
    for table in TABLES:
        with bundles_with_measured(table) as bundles, bundles_from(bundles):
            swapped.append((f"`{table}` measured", outcomes(NO_HOST_TIME)))
    lines = [
        "Recorded: vLLM 0.19.0 on RTX PRO 6000 GPUs, 300 ShareGPT requests at 10 a second, output lengths "
        "forced. Errors of the simulation in percent; TTFT and latency count from the engine taking the "
        "request in. Made by `python benchmarks/accuracy.py`.",
        "",
        "Errors of the means, TTFT / TPOT / latency:",
        "",
        *comparison([*rows, *silicon], ["LLMServingSim, as published", *map(published, RECORDINGS)]),
        "",
        *notes(by_llama.engine, by_dense.engine),
        "",
        "Measured bundles, calibrated on the Llama run; mean, median, P90, P95, P99, and the median "
        "absolute error of single requests:",
        "",
        *details(rows[4][1]),
        "",
        "Measured bundles, host time as shipped:",
        "",
        *details(rows[0][1]),
        "",
        "Shipped silicon bundles, no host time:",
        "",
        *details(silicon[1][1]),
        "",
        "Where the shipped bundles differ from the measured ones: errors of the means without host time, "
        "when one table of theirs is replaced by the measured one:",
        "",
        *comparison(swapped),
        "",
        "What parts of the model do: errors of the means with measured bundles when one part is changed, "
        "without host time if not said otherwise:",
        "",
        *comparison([("the model as it is", rows[2][1]), *parts, *tailless]),
    ]
    return "\n".join(lines)


def outcomes(engine: EngineSpec | None = None, **settings: Any) -> Outcomes:
    """Every recording under the same settings; a text where one cannot be run."""
    found: Outcomes = []
    for recording in RECORDINGS:
        try:
            found.append(recording.run(**settings).simulate(ANCHOR, engine))
        except NotSupportedError:
            found.append(UNSUPPORTED)
        except FileNotFoundError as error:
            found.append("no bundle" if "perf" in str(error) else "no recording")
    return found


def changes() -> list[tuple[str, Outcomes]]:
    """The model with one part changed at a time."""
    with patch("servesim.cost.build.capture_limit", lambda *_: 512):
        captured = outcomes(NO_HOST_TIME)
    with patch("servesim.cost.step_terms.gemm_rows", lambda tokens: tokens):
        lines = outcomes(NO_HOST_TIME)
    return [
        ("graphs captured up to 512 tokens whatever `max_num_seqs`", captured),
        ("no CUDA-graph padding", outcomes(changed(eager_launch_us=0.0), cudagraph=False)),
        ("matrix products along lines instead of in tiles of 16 rows", lines),
        ("one batch in flight (`--no-async-scheduling`)", outcomes(NO_HOST_TIME, async_scheduling=False)),
        ("chunks of a step looked up as their sum", outcomes(changed(chunked_attention=False))),
        ("the bundle's skew fit in mixed steps too", outcomes(changed(skew_in_mixed_steps=True))),
        ("unequal lengths cost nothing in mixed steps", outcomes(changed(tail_in_mixed_steps=False))),
    ]


def changed(**constants: Any) -> EngineSpec:
    """An engine without host time and with other constants."""
    return EngineSpec(**NO_HOST_TIME.model_dump(exclude_unset=True), **constants)


@contextmanager
def bundles_with_measured(table: str) -> Iterator[Path]:
    """The shipped bundles with one table from the measured ones, as links in a temporary folder.

    Their ``meta.yaml`` state the stamps of the tables that lie there.
    """
    shipped = ROOT / "profiler" / "perf"
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(shipped.rglob("*.csv")):
            relative = path.relative_to(shipped)
            measured = MEASURED / relative
            link = Path(folder) / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(measured.resolve() if path.name == table and measured.exists() else path)
        for path in sorted(shipped.rglob("meta.yaml")):
            place = Path(folder) / path.parent.relative_to(shipped)
            meta = read_yaml_object(path)
            shared = meta.get(SAME_AS) or {}
            files = {name: place.parent / shared[name] / name if name in shared else place / name
                     for name in meta["files"]}  # fmt: skip
            meta["files"] = {name: str(stamp_of(file.read_bytes())) for name, file in files.items()}
            (place / "meta.yaml").write_bytes(meta_bytes(meta))
        yield Path(folder)


def notes(by_llama: EngineSpec, by_dense: EngineSpec) -> list[str]:
    """What one has to know to read the table."""
    constants = [
        f"{engine.prefill_step_overhead_us / 1000:.2f} ms a step with a prefill chunk and "
        f"{engine.decode_step_overhead_us / 1000:.2f} ms a step of decodes"
        for engine in (by_llama, by_dense)
    ]
    return [
        f"- Calibration fits two host constants, nothing else: {constants[0]} on the Llama run, "
        f"{constants[1]} on the Qwen3-32B run. A run that was fitted is no prediction; the others in its row "
        "are. `configs/hardware/RTXPRO6000.yaml` ships the constants of the Qwen3-32B run, the only other "
        "choice being 0; so in the rows *as shipped* Llama and the MoE model are predicted, and Qwen3-32B is "
        "where the constants are from. Its prediction is in the row calibrated on the Llama run.",
        "- Kernel times alone are too short for a step with a prefill chunk, by milliseconds that hardly "
        "depend on the model: Qwen3-32B runs twice as many blocks, of about the same size a rank, and yet "
        "asks for nearly the same constant. It behaves like time of the host, which no bundle holds; its "
        "source was not found. With no host time at all the Llama run is further off than the published "
        "figure.",
        "- The recorded `cluster.json` says `link_bw` 16. All-reduces on that machine took 40 µs + bytes / "
        "16.9·10⁹ per second, which 16 comes near if it counts 2³⁰ bytes (17.18·10⁹, `--link-unit GiB`), as "
        "the "
        "rows here read it. The rows marked 10⁹ read it as configs of ours are read.",
    ]


def comparison(rows: list[tuple[str, Outcomes]], first: list[str] | None = None) -> list[str]:
    """Errors of the means, a column a recording."""
    header = ["", *(recording.title for recording in RECORDINGS)]
    return markdown(
        header, [*([first] if first else []), *([label, *map(means, row)] for label, row in rows)]
    )


def published(recording: Recorded) -> str:
    """What LLMServingSim says of a recording."""
    return triple(recording.published_percent)


def details(row: Outcomes) -> list[str]:
    """Every figure of every recording of a row."""
    table = []
    for recording, outcome in zip(RECORDINGS, row, strict=True):
        if isinstance(outcome, str):
            table.append([recording.title, outcome, *[""] * 6])
            continue
        report = outcome.report()["metrics"]
        for metric in METRICS:
            figures = [f"{report[metric][name]['error_percent']:+.2f}" for name in STATISTICS]
            single = report[metric]["per_request"]["median_absolute_error_percent"]
            table.append([recording.title, metric, *figures, f"{single:.2f}"])
    return markdown(["", "", "mean", "median", "P90", "P95", "P99", "per request"], table)


def means(outcome: Agreement | str) -> str:
    """``-6.4 / -1.5 / -2.8``, or why there is nothing."""
    if isinstance(outcome, str):
        return outcome
    return triple([100 * outcome.error(metric) for metric in METRICS], digits=2)


def triple(values: Any, digits: int = 1) -> str:
    return " / ".join(f"{value:+.{digits}f}" for value in values)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
