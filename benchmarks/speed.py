"""Measures the simulator itself: CPU seconds and peak memory of whole processes.

    python benchmarks/speed.py               every run, and the sections of benchmarks/RESULTS.md
    python benchmarks/speed.py --clusters    those of many instances only
    python benchmarks/speed.py --quick       without the long ones, printed only

A run is ``python -m serving`` from start to exit: imports, loading, simulation, files. Its CPU time (user and
system, of all threads) and peak resident memory are what the operating system counted for the process. CPU
times are the least of several runs: other load on the machine only ever adds to them.

The recordings (workloads of real runs and the bundles measured with them) are used where they are: in the
folder that ``SERVESIM_RECORDED`` names, or beside the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from results_page import RESULTS, write_section

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
RECORDED = Path(os.environ.get("SERVESIM_RECORDED") or ROOT.parent / "shared" / "data" / "recorded")
RECORDINGS = {
    "Llama-3.1-8B, TP 1": ("Llama-3.1-8B", "sharegpt-llama-3.1-8b-300-sps10"),
    "Qwen3-32B, TP 2": ("Qwen3-32B", "sharegpt-qwen3-300-sps10"),
}
"""Title -> (folder of the run, workload)."""
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
CLUSTER = ROOT / "configs" / "cluster" / "single_node_single_instance.json"
CLUSTER_RUNS = ((1, 20_000), (4, 20_000), (16, 20_000), (64, 20_000), (64, 50_000), (64, 100_000))
"""(instances, requests); every instance gets ten requests a second."""
_MB = 1e6


@dataclass(slots=True)
class Cost:
    """What one process took."""

    cpu_s: float
    peak_bytes: int


@dataclass
class Run:
    """One command line, measured."""

    title: str
    arguments: list[str]
    folder: Path
    repeats: int
    target_s: float | None = None
    costs: list[Cost] = field(default_factory=list)
    summary_path: Path | None = None

    def measure(self) -> Run:
        """Run it ``repeats`` times."""
        for _ in range(self.repeats):
            self.costs.append(cost(["-m", "serving", *self.arguments], self.folder))
        print(f"{self.title}: {self.cpu_s:.2f} CPU s, {self.peak_bytes / _MB:.0f} MB", flush=True)
        return self

    @property
    def cpu_s(self) -> float:
        """Least CPU time of the repetitions."""
        return min(entry.cpu_s for entry in self.costs)

    @property
    def peak_bytes(self) -> int:
        """Greatest peak memory of the repetitions."""
        return max(entry.peak_bytes for entry in self.costs)

    @cached_property
    def summary(self) -> dict[str, float]:
        """The run's own figures."""
        assert self.summary_path is not None
        found: dict[str, float] = json.loads(self.summary_path.read_text(encoding="utf-8"))
        return found


def cost(arguments: Sequence[str], folder: Path) -> Cost:
    """Run a Python process in ``folder`` to its end and ask the operating system what it took."""
    # As a user has it: compiled modules are kept. (The first of several runs makes them; the least counts.)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def recorded_runs(folder: Path, repeats: int) -> Iterator[Run]:
    """The recorded workloads on the cluster they were recorded on, with the bundles measured there."""
    if not (RECORDED / "runs").is_dir():
        return
    measured = folder / "measured"
    (measured / "profiler").mkdir(parents=True)
    (measured / "profiler" / "perf").symlink_to(RECORDED / "perf")
    for title, (name, workload) in RECORDINGS.items():
        cluster = RECORDED / "runs" / "RTXPRO6000" / name / "cluster.json"
        dataset = RECORDED / "workloads" / f"{workload}.jsonl.gz"
        arguments = ["--cluster-config", str(cluster), "--dataset", str(dataset), "--dtype", "bfloat16"]
        yield simulation(f"recording {title}", arguments, measured, repeats, target_s=0.8)


def simulation(
    title: str, arguments: Sequence[str], folder: Path, repeats: int, *, target_s: float | None = None
) -> Run:
    """A run that writes its per-request file."""
    summary = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower())}.json"
    written = [] if "--output" in arguments else ["--output", "requests.csv"]
    run = Run(title, [*arguments, *written, "--summary", str(summary)], folder, repeats, target_s)
    run.summary_path = summary
    return run


def synthetic(folder: Path, requests: int, *, tokens: int = 512, rate: str = "10") -> list[str]:
    """Flags for a workload of requests with ``tokens`` out (and 512 in) at ``rate`` a second; makes the
    file."""
    path = folder / f"{requests}-{tokens}-{rate}.jsonl"
    if not path.exists():
        shape = [
            "--num-reqs",
            str(requests),
            "--rate",
            rate,
            "--input-len",
            "512",
            "--output-len",
            str(tokens),
        ]
        cost(["-m", "serving", "workload", "synth", *shape, "--no-ids", "--output", str(path)], folder)
    return ["--dataset", str(path), "--dtype", "bfloat16"]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What the figures were measured on, without naming it."""
    import numpy

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return (
        f"{cores} cores of {model}, {platform.system()}, Python {platform.python_version()}, "
        f"NumPy {numpy.__version__}"
    )


def whole_processes(runs: Sequence[Run], start: Run) -> str:
    """Table of runs; the cost of a step is what a run takes beyond one with a single request."""
    rows = []
    for run in runs:
        steps = int(run.summary["steps"])
        target = ""
        if run.target_s is not None:
            met = run.cpu_s < run.target_s and run.peak_bytes < 300 * _MB
            target = f"< {run.target_s:g} s, < 300 MB: {'met' if met else '**missed**'}"
        rows.append(
            [
                run.title,
                f"{int(run.summary['completed']):,}",
                f"{steps:,}",
                f"{int(run.summary['total_output_tokens']):,}",
                f"{run.cpu_s:.2f}",
                f"{run.peak_bytes / _MB:.0f}",
                f"{max(run.cpu_s - start.cpu_s, 0) / steps * 1e6:.1f}",
                target,
            ]
        )
    titles = ["run", "requests", "steps", "output tokens", "CPU s", "peak MB", "µs a step", "target"]
    return table(titles, rows)


def growth(runs: Sequence[Run]) -> str:
    """Table of memory and time over the size of the workload, with what each further token took."""
    rows = []
    before: Run | None = None
    for run in runs:
        tokens = int(run.summary["total_output_tokens"])
        more = ["", ""]
        if before is not None:
            added = tokens - int(before.summary["total_output_tokens"])
            more = [
                f"{(run.peak_bytes - before.peak_bytes) / added:.1f}",
                f"{(run.cpu_s - before.cpu_s) / added * 1e6:.2f}",
            ]
        rows.append(
            [
                f"{int(run.summary['completed']):,}",
                f"{tokens:,}",
                f"{run.peak_bytes / _MB:.0f}",
                more[0],
                f"{run.cpu_s:.2f}",
                more[1],
            ]
        )
        before = run
    return table(
        ["requests", "output tokens", "peak MB", "bytes a further token", "CPU s", "µs a further token"], rows
    )


def stepping(pairs: Sequence[tuple[Run, Run]]) -> str:
    """Table of runs with and without jumps over steps of decodes alone."""
    rows = [
        [jumped.title, f"{jumped.cpu_s:.2f}", f"{stepped.cpu_s:.2f}", f"{stepped.cpu_s / jumped.cpu_s:.2f}"]
        for jumped, stepped in pairs
    ]
    return table(["run", "jumped, CPU s", "stepped, CPU s", "ratio"], rows)


def measure(folder: Path, *, quick: bool) -> str:
    """Run everything; the section as Markdown."""
    many, few = (2, 1) if quick else (7, 3)
    startup = Run("servesim --help", ["--help"], folder, many).measure()
    start = simulation("one request", [*synthetic(folder, 300), "--num-reqs", "1"], folder, many).measure()
    runs = [run.measure() for run in recorded_runs(folder, many)]
    for requests, target_s in ((300, 0.8), (10_000, 5.0)):
        title = f"{requests:,} requests, 512 in / 512 out, 10 req/s"
        runs.append(simulation(title, synthetic(folder, requests), folder, few, target_s=target_s).measure())
    long_answers = synthetic(folder, 8, tokens=50_000, rate="inf")
    pairs = stepped_pairs(
        [*runs, simulation("8 requests at once, 512 in / 50,000 out", long_answers, folder, few).measure()]
    )
    grown = []
    for size in SIZES:
        if not quick or size <= 10_000:
            flags = [*synthetic(folder, size), "--no-itl", "--output", "requests.csv"]
            repeats = 1 if size > 10_000 else few
            grown.append(simulation(f"{size:,} requests without ITL", flags, folder, repeats).measure())
    return section(startup, start, runs, pairs, grown)


def many_instances(folder: Path, *, quick: bool) -> str:
    """Clusters of up to 64 instances, ten requests a second for each; the section as Markdown."""
    runs = []
    for instances, requests in CLUSTER_RUNS:
        if quick and requests > 20_000:
            continue
        config = json.loads(CLUSTER.read_text(encoding="utf-8"))
        node = config["nodes"][0]
        node["num_instances"], node["instances"] = instances, node["instances"] * instances
        path = folder / f"{instances}-instances.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        flags = [*synthetic(folder, requests, tokens=128, rate=str(10 * instances)), "--no-itl"]
        arguments = [*flags, "--cluster-config", str(path), "--output", "requests.csv"]
        title = f"{instances} instances, {requests:,} requests"
        few = [*arguments, "--num-reqs", "1"]
        start = simulation(f"{title}, the first only", few, folder, 1 if quick else 3).measure()
        run = simulation(title, arguments, folder, 1 if quick else 3).measure()
        runs.append((instances, start, run))
    return "\n\n".join(
        [
            paragraph(
                "The same on clusters: instances of Llama-3.1-8B behind one router (LOAD, live counts), 512 "
                "in / 128 out, 10 req/s for each instance, per-request file without inter-token latencies. "
                "µs a step and bytes a request are what a run takes beyond one of its first request alone, "
                "reading the workload and writing the file included."
            ),
            cluster_table(runs),
        ]
    )


def cluster_table(runs: Sequence[tuple[int, Run, Run]]) -> str:
    """Table of (instances, a run of one request, the run)."""
    rows = []
    for instances, start, run in runs:
        requests, steps = int(run.summary["completed"]), int(run.summary["steps"])
        rows.append(
            [
                f"{instances}",
                f"{requests:,}",
                f"{steps:,}",
                f"{run.cpu_s:.2f}",
                f"{(run.cpu_s - start.cpu_s) / steps * 1e6:.1f}",
                f"{run.peak_bytes / _MB:.0f}",
                f"{(run.peak_bytes - start.peak_bytes) / requests:,.0f}",
            ]
        )
    titles = ["instances", "requests", "steps", "CPU s", "µs a step", "peak MB", "bytes a request"]
    return table(titles, rows)


def stepped_pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Each run and the same taken step by step."""
    return [
        (
            run,
            Run(f"{run.title}, stepped", [*run.arguments, "--stepped"], run.folder, run.repeats).measure(),
        )
        for run in runs
    ]


def section(
    startup: Run, start: Run, runs: Sequence[Run], pairs: Sequence[tuple[Run, Run]], grown: Sequence[Run]
) -> str:
    """The measurements as Markdown."""
    parts = [
        paragraph(
            "Whole processes, `python -m serving` from start to exit with the per-request file written: CPU "
            "seconds (user and system, the least of several runs) and peak resident memory, measured by "
            f"`python benchmarks/speed.py` on {machine()}. Shared machines are not equally fast every day: "
            f"on this one a loop that adds up ten million squares took {yardstick_s():.2f} CPU s at the time."
        ),
        paragraph(
            f"`servesim --help` takes {startup.cpu_s:.3f} CPU s. A run with one request takes "
            f"{start.cpu_s:.2f} CPU s and {start.peak_bytes / _MB:.0f} MB, for imports and loading; µs a "
            "step is what a run takes beyond that, reading its workload and writing its file included."
        ),
        whole_processes(runs, start),
    ]
    if not any(run.title.startswith("recording") for run in runs):
        parts.append("The recordings were not there to be measured.")
    parts += [
        paragraph(
            "Steps of decodes with nothing else in sight are jumped over in one vectorised go; `--stepped` "
            "takes each by itself, with byte-identical results:"
        ),
        stepping(pairs),
        paragraph(
            "Growth with the size of the workload (512 in / 512 out at 10 req/s, per-request file without "
            "inter-token latencies):"
        ),
        growth(grown),
    ]
    return "\n\n".join(parts)


def yardstick_s() -> float:
    """CPU seconds of a loop that has nothing to do with the simulator, the least of several."""

    def once() -> float:
        started = time.process_time()
        total = 0
        for i in range(10_000_000):
            total += i * i
        return time.process_time() - started

    return min(once() for _ in range(5))


def paragraph(text: str) -> str:
    """Text in lines of at most 110 characters."""
    return textwrap.fill(text, 110)


def main() -> int:
    """Measure, and write the section unless it was a quick look."""
    parser = argparse.ArgumentParser(description="CPU seconds and peak memory of whole runs.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs; only print")
    parser.add_argument("--clusters", action="store_true", help="the runs of many instances only")
    args = parser.parse_args()
    sections = {"speed": measure, "clusters": many_instances}
    for name in ["clusters"] if args.clusters else sections:
        with tempfile.TemporaryDirectory(prefix="servesim-speed-") as folder:
            text = sections[name](Path(folder), quick=args.quick)
        if args.quick:
            print(f"\n{text}")
        else:
            write_section(name, text)
            print(f"written: {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
