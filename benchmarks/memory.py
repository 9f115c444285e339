"""Where the memory of a long run is: bytes by part, and the most at any time of each phase.

    python benchmarks/memory.py              100,000 requests, and the section of benchmarks/RESULTS.md
    python benchmarks/memory.py 30000        as many, printed only

The run is one of ``speed.py``: 512 in / 512 out at ten requests a second on one H100, per-request file
without inter-token latencies and summary. It is made in this process, one phase after the other; how much
memory is resident is what Linux says (``/proc/self``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results_page import RESULTS, write_section
from speed import machine, paragraph, synthetic, table

from servesim import RuntimeOptions, api
from servesim.engine.arrivals import Arrivals
from servesim.results.outputs import save_outputs
from servesim.results.summary import distributions
from servesim.workload.packed import PackedRequests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim import Result, Workload
    from servesim.results.sparse_columns import SparseColumn
    from servesim.results.step_log import StepLog

_MB = 1e6


def resident(name: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / _MB for line in lines if line.startswith(f"{name}:"))


class Phases:
    """What was resident during each phase of a run."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def ended(self, name: str) -> None:
        """A phase is over: note it, and begin to look for the next one's most."""
        self.rows.append([name, f"{resident('VmHWM'):.0f}", f"{resident('VmRSS'):.0f}"])
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run(requests: int, folder: Path, phases: Phases) -> Result:
    """The phases of ``servesim run``."""
    phases.ended("imports")
    dataset = synthetic(folder, requests)[1]
    outputs: dict[str, Any] = {
        "output": str(folder / "r.csv"),
        "summary": str(folder / "s.json"),
        "itl": False,
    }
    options = RuntimeOptions(dataset=dataset, dtype="bfloat16", hardware="H100", **outputs)
    cluster, workload = api.read_cluster(options), api.read_workload(options)
    phases.ended("reading the workload")
    workload.pack()
    phases.ended("packing it")
    result = api.simulate_loaded(cluster, workload, options)
    phases.ended("simulating")
    distributions(result)
    phases.ended("percentiles")
    _ = result.summary
    phases.ended("the rest of the summary")
    save_outputs(result, options, {})
    phases.ended("writing the files")
    return result


def few_bytes(columns: Iterable[SparseColumn]) -> int:
    """What columns take that are kept where they are not 0."""
    return sum(each.itemsize * len(each) for column in columns for each in (column._steps, column._values))


def parts(result: Result) -> list[tuple[str, int]]:
    """What a run holds when it has ended, in bytes."""
    (instance,), workload = result.instances, result.workload
    steps: StepLog = instance.steps
    every = sum(getattr(steps, name).num_bytes for name in ("end_ns", *steps.EACH))
    few = few_bytes(getattr(steps, name) for name in ("start_ns", *steps.FEW))
    return [
        ("requests of the workload", workload_bytes(workload)),
        ("arrivals to come", arrival_bytes(workload)),
        ("records of finished requests", sum(each.num_bytes for each in result.records._each.values())),
        ("step log: times and the counts of every step", every),
        ("step log: what few steps have", few),
    ]


def workload_bytes(workload: Workload) -> int:
    """Those of a workload that is packed."""
    packed = workload.requests
    assert isinstance(packed, PackedRequests)
    return sum(each.itemsize * len(each) for each in (packed._inputs, packed._outputs, packed._arrivals))


def arrival_bytes(workload: Workload) -> int:
    """Those of the list of arrivals."""
    arrivals = Arrivals(workload)
    return sum(each.itemsize * len(each) for each in (arrivals._planned, arrivals._planned_ns))


def section(requests: int) -> str:
    """The section as Markdown."""
    phases = Phases()
    with tempfile.TemporaryDirectory(prefix="servesim-memory-") as folder:
        result = run(requests, Path(folder), phases)
        held, steps = parts(result), len(result.instances[0].steps)
    rows = [[name, f"{size / requests:.1f}", f"{size / steps:.1f}"] for name, size in held]
    total = sum(size for _, size in held)
    rows.append(["together", f"{total / requests:.1f}", f"{total / steps:.1f}"])
    return "\n\n".join(
        [
            paragraph(
                f"Memory of a run of {requests:,} requests, 512 in / 512 out at 10 req/s ({steps:,} steps), "
                f"measured by `python benchmarks/memory.py` on {machine()}. What is held when the run has "
                "ended:"
            ),
            table(["part", "bytes a request", "bytes a step"], rows),
            paragraph("What is resident in each phase, and at its end:"),
            table(["phase", "most, MB", "at its end, MB"], phases.rows),
        ]
    )


def main() -> int:
    """Measure, and write the section unless a number of requests is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", type=int, nargs="?", help="as many, printed only (default: 100,000)")
    requests: int | None = parser.parse_args().requests
    text = section(requests or 100_000)
    if requests:
        print(text)
    else:
        write_section("memory", text)
        print(f"written: {RESULTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
