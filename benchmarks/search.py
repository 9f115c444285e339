"""Measures the searches: CPU seconds of ``servesim slo``, ``sweep`` and ``plan`` as whole processes.

    python benchmarks/search.py            every search, and its section of benchmarks/RESULTS.md
    python benchmarks/search.py --print    leave the page as it is

A sweep is held against the same simulations in one Python process without it. A plan is held against one that
runs every candidate: both have to find the same fleet.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from results_page import command
from speed import cost, machine, paragraph, synthetic, table

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = ["--slo", "ttft:p99:1000", "tpot:p95:50"]
WORKLOADS = ("example_trace.jsonl", "short_chat.jsonl", "long_context.jsonl", "agentic_sessions.jsonl.gz")
GRIDS = {
    "max_num_seqs": [16, 32, 48, 64, 96, 128, 160, 192, 224, 256],
    "max_num_batched_tokens": [1024, 2048, 4096, 6144, 8192],
    "kv_cache_dtype": ["auto", "fp8"],
    "hardware": ["RTXPRO6000", "H100"],
}
"""200 configurations."""
FLEETS = [
    "--rates",
    "40",
    "--max-gpus",
    "16",
    "--grid",
    "--hardware H100,L40S --tp 1,2 --prefill-share 0 --max-num-seqs 64,128,256 "
    "--max-num-batched-tokens 2048,4096,8192 --kv-cache-dtype auto,fp8",
]
CHOICES = ("tp", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens")
"""Keys of a fleet in ``plan.json`` that tell it from the others, beside hardware and replicas."""
SIMULATIONS = """
import itertools, json, sys
import servesim
grids = json.loads(sys.argv[1])
cluster = servesim.load_cluster("configs/cluster/single_node_single_instance.json")
workload = servesim.load_workload(sys.argv[2])
for values in itertools.product(*grids.values()):
    servesim.simulate(cluster, workload, **dict(zip(grids, values)))
"""


def load_limits(folder: Path) -> str:
    """Table of ``servesim slo`` on the shipped workloads, the quick effort that is its default."""
    rows = []
    for name in WORKLOADS:
        found = folder / "slo.json"
        path = str(ROOT / "workloads" / name)
        spent = cost(["-m", "servesim", "slo", *BOUNDS, "--dataset", path, "--json", str(found)], folder)
        load = json.loads(found.read_text(encoding="utf-8"))["load"]
        rows.append([name.partition(".")[0], f"{load:.2f}", f"{spent.cpu_s:.2f}"])
        print(*rows[-1], flush=True)
    return table(["workload", "largest rate, req/s", "CPU s"], rows)


def sweep(folder: Path) -> str:
    """What a sweep of 200 configurations costs beside its simulations, and with two processes."""
    workload = synthetic(folder, 1_000)[1]
    space = folder / "sweep.yaml"
    space.write_text(json.dumps({"grid": GRIDS}), encoding="utf-8")
    alone = cost(["-c", SIMULATIONS, json.dumps(GRIDS), workload], ROOT)
    tables = []
    spent = []
    walls = []
    for jobs in ("1", "2"):
        output = folder / f"rows-{jobs}.csv"
        arguments = ["-m", "servesim", "sweep", str(space), "--dataset", workload, "--jobs", jobs]
        began = time.perf_counter()
        spent.append(cost([*arguments, "--output", str(output)], folder))
        walls.append(time.perf_counter() - began)
        tables.append(output.read_bytes())
        print(f"sweep, {jobs} processes: {spent[-1].cpu_s:.1f} CPU s, {walls[-1]:.1f} s", flush=True)
    same = "the same bytes" if tables[0] == tables[1] else "**other bytes**"
    return paragraph(
        f"A sweep of 200 configurations of a run of 1,000 requests (512 in / 512 out) takes "
        f"{spent[0].cpu_s:.1f} CPU s; the same simulations in one Python process, workload and bundles "
        f"loaded once, take {alone.cpu_s:.1f}: {spent[0].cpu_s / alone.cpu_s:.2f} times. Two processes are "
        f"{walls[0] / walls[1]:.2f} times as fast as one ({walls[0]:.1f} and {walls[1]:.1f} s), and write "
        f"{same}."
    )


def plan(folder: Path) -> str:
    """What a plan over more than 500 fleets costs, and whether trying all of them finds the same."""
    found = {}
    for way in ((), ("--exhaustive",)):
        arguments = ["-m", "servesim", "plan", *BOUNDS, *FLEETS, *way, "--output", str(folder / "plan")]
        spent = cost(arguments, ROOT)
        path = folder / "plan" / "plan.json"
        found[way] = (spent.cpu_s, json.loads(path.read_text(encoding="utf-8")))
        print(f"plan {' '.join(way)}: {spent.cpu_s:.1f} CPU s", flush=True)
    (quick_s, quick), (all_s, every) = found.values()
    best, best_of_all = (
        tuple(plan["finalists"][0][key] for key in ("hardware", "replicas", *CHOICES))
        for plan in (quick, every)
    )
    same = "the same fleet" if best == best_of_all else "**another fleet**"
    return paragraph(
        f"A plan over {quick['candidates']:,} fleets (H100 and L40S, up to 16 GPUs, 300 requests at 40 a "
        f"second) takes {quick_s:.1f} CPU s. `--exhaustive` runs all of them and finds {same} in "
        f"{all_s:.1f} CPU s."
    )


def section() -> str:
    """Measure, and tell it as Markdown."""
    with tempfile.TemporaryDirectory(prefix="servesim-search-") as name:
        folder = Path(name)
        about = (
            "`servesim slo`, `sweep` and `plan` as whole processes: CPU seconds, user and system. Measured "
            f"by `python benchmarks/search.py` on {machine()}."
        )
        return "\n\n".join([paragraph(about), load_limits(folder), sweep(folder), plan(folder)])


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    return command("search", "CPU seconds of the searches.", section)


if __name__ == "__main__":
    sys.exit(main())
