"""The simulator against public serving runs of other people's machines: closed loop, Llama-3.1-70B.

    python benchmarks/public_rows.py            every row, and the section of benchmarks/RESULTS.md
    python benchmarks/public_rows.py --print    the section on the screen only

The rows (``closed_loop.csv``) are facts of public benchmarks and no part of the project; they are looked for
in the folder that ``SERVESIM_PUBLIC_ROWS`` names, or beside the checkout. Each is run with its own settings.
Nothing is fitted to them. Bundles that are not shipped are made on demand, which needs
``pip install 'servesim[silicon]'``.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results_page import write_section  # noqa: E402

from servesim import RuntimeOptions, simulate  # noqa: E402
from servesim.workload.generators import SynthSpec, synthesise  # noqa: E402

FOLDER = Path(os.environ.get("SERVESIM_PUBLIC_ROWS") or ROOT.parent / "shared" / "data" / "public_rows")
CLUSTER = ROOT / "configs" / "cluster" / "single_node_single_instance.json"
MODEL = "meta-llama/Llama-3.1-70B"
REQUESTS_EACH = 10
"""Prompts of a run for each one in flight."""
SHORTEST = 0.8
"""Least length as a share of the nominal one, which is the greatest."""
MAX_NUM_BATCHED_TOKENS = 8192
SCHEDULERS = {"synchronous": False, "asynchronous": True}
"""The rows' vLLM scheduled synchronously by default; since 0.14 it is asynchronous, as is the simulator."""
SEED = 42
FIGURES = ("TTFT", "TPOT")
Row = dict[str, str]


def read_rows(folder: Path) -> list[Row]:
    """The rows of the model whose lengths vary."""
    with (folder / "closed_loop.csv").open(encoding="utf-8") as handle:
        return [row for row in csv.DictReader(handle) if row["model"] == MODEL]


def options_of(row: Row, asynchronous: bool) -> RuntimeOptions:
    """The engine's settings of one row."""
    weights = {"bf16": "bfloat16"}.get(row["weights"], row["weights"])
    return RuntimeOptions(
        cluster_config=str(CLUSTER),
        hardware=row["hardware"],
        model=MODEL,
        tp=int(row["tp"]),
        dtype=weights,
        kv_cache_dtype=row["kv_cache"],
        max_num_seqs=int(row["concurrency"]),
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_concurrency=int(row["concurrency"]),
        async_scheduling=asynchronous,
        seed=SEED,
    )


def errors_percent(row: Row, asynchronous: bool) -> dict[str, float]:
    """Errors of the means of TTFT and TPOT."""

    def lengths(nominal: str) -> str:
        return f"uniform:{round(SHORTEST * int(nominal))}:{nominal}"

    workload = synthesise(
        SynthSpec(
            num_reqs=REQUESTS_EACH * int(row["concurrency"]),
            rate=float("inf"),
            input_len=lengths(row["input_tokens"]),
            output_len=lengths(row["output_tokens"]),
            ids=False,
            seed=SEED,
        )
    )
    requests = simulate(None, workload, options_of(row, asynchronous)).requests
    measured_ms = {name: float(row[f"mean_{name.lower()}_ms"]) for name in FIGURES}
    return {name: 100 * (float(requests[name].mean()) / 1e6 / ms - 1) for name, ms in measured_ms.items()}


def medians(errors: list[dict[str, float]]) -> str:
    """``signed median / median absolute`` error of each figure, as cells of a table."""
    found = [np.array([error[name] for error in errors]) for name in FIGURES]
    return " | ".join(f"{np.median(some):+.1f} / {np.median(abs(some)):.1f}" for some in found)


def section(rows: list[Row]) -> str:
    """The table by GPU and degree."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["hardware"], row["tp"], "16 bit" if row["kv_cache"] == "auto" else row["kv_cache"]].append(
            row
        )
    lines = [
        "| GPU | TP | KV cache | rows | "
        + " | ".join(f"{n}, {s}" for s in SCHEDULERS for n in FIGURES)
        + " |",
        "| --- | ---: | --- | ---: |" + " ---: |" * len(SCHEDULERS) * len(FIGURES),
    ]
    whole: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for (hardware, tp, cache), own in sorted(groups.items()):
        found = {name: [errors_percent(row, on) for row in own] for name, on in SCHEDULERS.items()}
        for name, errors in found.items():
            whole[hardware][name] += errors
        cells = " | ".join(map(medians, found.values()))
        lines.append(f"| {hardware} | {tp} | {cache} | {len(own)} | {cells} |")
        print(lines[-1], file=sys.stderr)
    for hardware, found in whole.items():
        count = len(next(iter(found.values())))
        lines.append(f"| {hardware} | all | all | {count} | {' | '.join(map(medians, found.values()))} |")
    return "\n".join([note(rows), "", *lines])


def note(rows: list[Row]) -> str:
    """What was run, where the rows are from, and what the figures are."""
    engines = ", ".join(sorted({row["engine"] for row in rows}))
    return (
        f"{len(rows)} measured rows of {MODEL} in {rows[0]['weights']} ({engines}), each simulated with its "
        f"own settings: 4, 8, 16, 32 or 64 requests in flight, {REQUESTS_EACH} times as many prompts, "
        f"lengths drawn uniformly from {SHORTEST} to 1.0 of 1024/1024, 1024/8192 and 8192/1024 tokens in and "
        f"out, `max_num_batched_tokens` {MAX_NUM_BATCHED_TOKENS}, shipped bundles or ones made on demand, no "
        "host time. Errors of the means in percent, as signed median / median absolute error over the rows, "
        "with synchronous scheduling, that vLLM's default, and with asynchronous, the simulator's. Nothing "
        "is fitted to these rows. They are the measured rows that NVIDIA's aiconfigurator publishes "
        "(Apache-2.0), from public continuous benchmarks of October 2025 and later; a client's and a front "
        "end's time, some milliseconds a request, is in the measured TTFT and in no simulated one. Made by "
        "`python benchmarks/public_rows.py`."
    )


def main(argv: list[str] | None = None) -> int:
    """Print the section, and put it on the page."""
    parser = argparse.ArgumentParser(
        description="closed-loop runs of public benchmarks against the simulator"
    )
    parser.add_argument("--print", action="store_true", dest="printed", help="leave RESULTS.md as it is")
    parser.add_argument("--hardware", help="rows of this GPU alone, on the screen only")
    args = parser.parse_args(argv)
    if not (FOLDER / "closed_loop.csv").is_file():
        print(f"no closed_loop.csv at {FOLDER}; set SERVESIM_PUBLIC_ROWS to the folder that holds it")
        return 2
    rows = [row for row in read_rows(FOLDER) if args.hardware in (None, row["hardware"])]
    if not rows:
        print(f"--hardware: {args.hardware} has no rows in {FOLDER / 'closed_loop.csv'}")
        return 2
    text = section(rows)
    print(text)
    if not args.printed and not args.hardware:
        write_section("public-rows", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
