"""Measures how far the bundles derived from public kernel measurements are off.

    python benchmarks/silicon_error.py            everything, and the section of benchmarks/RESULTS.md
    python benchmarks/silicon_error.py --print    the section on the screen only
    python benchmarks/silicon_error.py --root DIR bundles of another folder than profiler/perf

Layerwise profiles measured on the same GPU with vLLM 0.19 are the reference; where they are, the environment
variable SERVESIM_RECORDED says (default: beside the checkout). They are not part of the project.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results_page import write_section  # noqa: E402

from servesim.api import simulate  # noqa: E402
from servesim.cost.bundle import Bundle  # noqa: E402
from servesim.cost.stage_cost import StageCost  # noqa: E402
from servesim.cost.step_terms import stage_terms  # noqa: E402
from servesim.cost.terms import whole_model  # noqa: E402
from servesim.specs.architecture import load_architecture  # noqa: E402
from servesim.specs.cluster import load_cluster  # noqa: E402
from servesim.specs.cluster_changes import with_hardware  # noqa: E402
from servesim.specs.hardware import EngineSpec, load_hardware  # noqa: E402
from servesim.specs.model import load_model  # noqa: E402
from servesim.specs.paths import bundles_from  # noqa: E402
from servesim.specs.reading import read_yaml_object  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.cost.batch_shape import BatchShape

RECORDED = Path(os.environ.get("SERVESIM_RECORDED") or ROOT.parent / "shared" / "data" / "recorded")
HARDWARE = "RTXPRO6000"
WORKLOADS = {
    "meta-llama/Llama-3.1-8B": "sharegpt-llama-3.1-8b-300-sps10",
    "Qwen/Qwen3-32B": "sharegpt-qwen3-300-sps10",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "sharegpt-qwen3-300-sps10",
}
"""Model -> the workload whose steps are compared."""
DEGREES = (1, 2)
LEAST_SEQUENCES = {"Qwen/Qwen3-30B-A3B-Instruct-2507": 4}
"""Model -> sequences that a step of its stated set has at least; every step where nothing is said."""
NO_REFERENCE = ("Qwen/Qwen3-30B-A3B-Instruct-2507", 2)
"""Its experts were measured whole, not in halves."""
WAITING = EngineSpec(cudagraph=False)
"""No padding; in mixed steps decodes wait for the longest, as in a run."""
SKEWED = EngineSpec(cudagraph=False, skew_in_mixed_steps=True)
"""No padding; mixed steps by the skew table."""
HISTORY_GPUS = ("H100", "H200", "B200", "B300", "GB200", "GB300", "L40S", "A100", "B60", "RTXPRO6000")


@dataclass(frozen=True)
class Step:
    """What a step was made of."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, int, int, int]
    """Number, and sum, least and greatest of their KV lengths."""


def main() -> int:
    """Compare everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", dest="printed", help="leave RESULTS.md as it is")
    parser.add_argument("--root", type=Path, default=ROOT / "profiler" / "perf", help="the silicon bundles")
    args = parser.parse_args()
    if not (RECORDED / "perf").is_dir():
        print(f"no measured bundles at {RECORDED}; set SERVESIM_RECORDED to the folder that holds them")
        return 2
    text = section(args.root)
    print(text)
    if not args.printed:
        write_section("silicon", text)
    return 0


# ---------------------------------------------------------------- the steps


def served_steps(model: str, tp: int) -> list[Step]:
    """Every step in which the measured bundle serves the recorded workload, one instance."""
    steps: list[Step] = []

    class Recorder(StageCost):
        """Notes every step it is asked for."""

        def step_ns(self, batch: BatchShape) -> int:
            lengths = (batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max)
            steps.append(Step(tuple((tokens, history) for tokens, history in batch.chunks), lengths))
            return super().step_ns(batch)

    cluster = load_cluster(str(ROOT / "configs" / "cluster" / "single_node_single_instance.json"))
    workload = RECORDED / "workloads" / f"{WORKLOADS[model]}.jsonl.gz"
    with patch("servesim.cost.build.StageCost", Recorder), bundles_from(RECORDED / "perf"):
        simulate(with_hardware(cluster, HARDWARE, model, tp), workload, kv_cache_dtype="auto", stepped=True)
    return steps


def timer(
    root: Path, model_name: str, tp: int, engine: EngineSpec, *, whole_experts: bool = False
) -> StageCost:
    """Kernel times of a bundle below ``root``: no collectives, no host time, no padding; its own skew.

    ``whole_experts``: each rank has whole experts, its share of them, as with expert parallelism; not a slice
    of every one.
    """
    folder = root / HARDWARE / model_name / "bf16"
    model = load_model(model_name)
    bundle = Bundle(folder, HARDWARE, model_name, "bf16", read_yaml_object(folder / "meta.yaml"))
    tables = dataclasses.replace(bundle.tables(tp), collectives={})
    if whole_experts:
        tables = dataclasses.replace(tables, moe=dataclasses.replace(bundle.whole_experts(), split=tp))
    terms = stage_terms(load_architecture(model.model_type), whole_model(model), tables)
    return StageCost(bundle, tables, model.num_hidden_layers, terms, engine)


def stated(model: str, steps: list[Step]) -> NDArray[np.bool_]:
    """Which of the steps are of the model's stated set."""
    least = LEAST_SEQUENCES.get(model, 1)
    return np.array([len(step.chunks) + step.decodes[0] >= least for step in steps])


def times_ns(own: StageCost, steps: list[Step]) -> NDArray[np.float64]:
    return np.array([own.mixed_ns(step.chunks, *step.decodes) for step in steps], dtype=np.float64)


# ---------------------------------------------------------------- the section


INTRODUCTION = """\
Bundles made from public kernel measurements (`servesim profile --source silicon`) against layerwise
profiles of the same GPU, an RTX PRO 6000, made with another version of vLLM (0.19 against 0.24), in
bf16. Kernel times only: no collectives, host time or padding on either side; unequal KV lengths of
decodes alone by each side's own skew table. Measured by `python benchmarks/silicon_error.py`.

The steps are all those in which one instance serves 300 ShareGPT requests at 10 req/s, as simulated from
the layerwise profile. *Sum* is the error of their total time. The **stated set**, by which a bundle is
judged, is every one of these steps, prefills and decodes alike; for Qwen3-30B-A3B it is every one with 4
sequences or more, because with fewer the profile is not what a served model takes (first remark):"""
EVERY_KIND = "All steps, stated or not, and by kind:"
REMARKS = """\
- Qwen3-30B-A3B, fewer than 4 sequences: the profile replays weights that fit the 128 MiB of L2. Of its
  projections that is certain (2.2 TB/s for one token; the memory gives 1.6 to 1.8), of its experts
  probable (eight take 50 us, sixteen, which exceed L2, 135 us). A served model reads them from memory, so
  that such steps read high here, and are left as they are.
- Qwen3-30B-A3B at TP 2 has no like-for-like reference where every expert is cut in two: they were profiled
  whole. Its stated set gives each rank half of the experts, whole (*EP 2*, expert parallelism), on both
  sides.
- What is left of Llama-3.1-8B at TP 2 is one product (14336 x 4096, at 64 to 128 tokens), which the public
  table does not hold: in the profile it takes 7 to 12 % longer than on a line between its neighbours.
  Products in general are told from theirs without bias, see *Matrix products between the measured sizes*.
- Eight constants were fitted to these same profiles: four of steps that mix prefill and decode, four of
  what a replayed decode still finds in L2; launches of products, and starts and efficiencies of experts and
  elementwise layers were set on them before. That α of unequal decodes is taken at the batch sizes of the
  table alone has a reason of its own (a run interpolates between those), but it was this comparison that
  showed it. So the table says how well the derivation describes this GPU, and not how well it would predict
  another.
- Rows marked *skew tables* charge unequal KV lengths in mixed steps by each side's own skew table; the
  others by the wait for the longest decode, as a run does. The skew tables of the two sides disagree about
  mixed steps."""
OTHER_GPUS = """\
Of the other GPUs there are no layerwise profiles. What can be checked there is history: a measured
prompt of 16384 tokens without history, against the same prompt in chunks of 2048 that attend to what
came before, launches left out (32 query and 8 KV heads; positive: the derived chunks take longer)."""


def section(root: Path) -> str:
    """The section as Markdown."""
    head = [
        "| model | TP | steps | count | median | signed median | P95 | worst | sum |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = list(served_rows(root))
    judged = "\n".join([*head, *(row for row, is_stated in rows if is_stated)])
    every = "\n".join([*head, *(row for row, _ in rows)])
    history = ["| GPU | kernels | bf16 KV | fp8 KV |", "| --- | --- | ---: | ---: |", *history_rows()]
    return "\n\n".join([INTRODUCTION, judged, EVERY_KIND, every, REMARKS, OTHER_GPUS, "\n".join(history)])


def served_rows(root: Path) -> Iterator[tuple[str, bool]]:
    """Rows of the table, and whether they are of a stated set."""
    for model in WORKLOADS:
        for tp in DEGREES:
            steps = served_steps(model, tp)
            prefills = np.array([bool(step.chunks) for step in steps])
            every = np.ones(len(steps), dtype=bool)
            kinds = [
                ("all", every, WAITING, False),
                ("decodes only", ~prefills, WAITING, False),
                ("with a prefill chunk", prefills, WAITING, False),
                ("all, *skew tables*", every, SKEWED, False),
                ("with a prefill chunk, *skew tables*", prefills, SKEWED, False),
            ]
            title_of_stated = "all"
            if least := LEAST_SEQUENCES.get(model):
                title_of_stated = f"{least} sequences or more"
                kinds.insert(1, (title_of_stated, stated(model, steps), WAITING, False))
            if (model, tp) == NO_REFERENCE:
                title_of_stated += ", *EP 2*"
                kinds.insert(2, (title_of_stated, stated(model, steps), WAITING, True))
            title = model.partition("/")[2].removesuffix("-Instruct-2507")
            for kind, chosen, engine, whole in kinds:
                derived, measured = (
                    times_ns(timer(place, model, tp, engine, whole_experts=whole), steps)[chosen]
                    for place in (root, RECORDED / "perf")
                )
                error = (derived / measured - 1.0) * 100
                total = (derived.sum() / measured.sum() - 1.0) * 100
                unlike = (model, tp) == NO_REFERENCE and not whole
                note = " (no like-for-like reference)" if unlike else ""
                yield (
                    f"| {title}{note} | {tp} | {kind} | {figures(error)} | {total:+.1f} % |",
                    kind == title_of_stated,
                )


def figures(error: NDArray[np.float64]) -> str:
    """Count, median of the size, signed median, 95th percentile and worst, in %."""
    size = np.abs(error)
    return (
        f"{len(error):,} | {np.median(size):.1f} % | {np.median(error):+.1f} % | "
        f"{np.percentile(size, 95):.1f} % | {error[size.argmax()]:+.1f} %"
    )


def history_rows() -> Iterator[str]:
    from servesim.errors import InputError
    from servesim.profiler.silicon.attention import AttentionShape, attention_times
    from servesim.profiler.silicon.tables import silicon_gpu

    for hardware in HISTORY_GPUS:
        gpu = silicon_gpu(load_hardware(hardware))
        cells, kernels = [], []
        for dtype in ("bfloat16", "fp8"):
            try:
                times = attention_times(gpu, AttentionShape(32, 8, 128, dtype))
            except InputError:
                cells.append("not measured")
                continue
            cells.append(f"{times.history_error() * 100:+.0f} %")
            kernels += [kernel.removeprefix("vllm_") for kernel in times.prefill_kernels]
        yield f"| {hardware} | {', '.join(dict.fromkeys(kernels))} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
