"""The ring formula against measured all-reduces.

    python benchmarks/all_reduce.py            the table, and the section of benchmarks/RESULTS.md
    python benchmarks/all_reduce.py --print    the section on the screen only

Compares the closed form of `servesim.network.topology` with the measured tables of the shipped bundles,
with the link of each hardware file (bandwidth of all links of a GPU, its latency split over the hops).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from results_page import command

from servesim.network.topology import ring_all_reduce_ns
from servesim.specs.hardware import load_hardware

ROOT = Path(__file__).resolve().parents[1]
TABLES = (
    ("RTXPRO6000", "meta-llama/Llama-3.1-8B", (2, 4, 8)),
    ("L40S", "meta-llama/Llama-3.1-8B", (2,)),
    ("A100", "meta-llama/Llama-3.1-8B", (2,)),
    ("H100", "meta-llama/Llama-3.1-70B", (2, 4, 8)),
    ("H200", "meta-llama/Llama-3.1-70B", (2, 4, 8)),
    ("B200", "meta-llama/Llama-3.1-8B", (2,)),
)
LARGER = "and up to 1.04 times it at 1 GiB on eight H100 or H200, whose switch adds up (NVLink SHARP)"
SIZES = (16 << 10, 256 << 10, 4 << 20, 32 << 20)


def measured_us(hardware: str, model: str, ranks: int) -> dict[int, float]:
    """Bytes → µs of the measured all-reduce."""
    path = ROOT / "profiler/perf" / hardware / model / "bf16" / f"tp{ranks}" / "comm.csv"
    with path.open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["collective"] == "all_reduce"]
    return {int(row["bytes"]): float(row["time_us"]) for row in rows if int(row["ranks"]) == ranks}


def lines() -> tuple[list[str], list[float]]:
    """The table as Markdown, measured µs and the formula's error per payload; and the shares of the link's
    bandwidth that the largest payload shown reaches."""
    shown = [f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB" for size in SIZES]
    out = [f"| hardware | ranks | {' | '.join(shown)} |", "| --- | ---: |" + " ---: |" * len(SIZES)]
    shares = []
    for hardware, model, degrees in TABLES:
        link = load_hardware(hardware).link
        assert link is not None
        for ranks in degrees:
            table = measured_us(hardware, model, ranks)
            hop_ns = link.latency_us * 1000 / (2 * (ranks - 1))
            cells = []
            for size in SIZES:
                nearest = min(table, key=lambda there: abs(there - size))
                formula = ring_all_reduce_ns(ranks, nearest, link.bandwidth_gbs, hop_ns) / 1000
                cells.append(f"{table[nearest]:.1f} µs, {formula / table[nearest] - 1:+.0%}")
            out.append(f"| {hardware} | {ranks} | {' | '.join(cells)} |")
            shares.append(2 * (ranks - 1) / ranks * nearest / table[nearest] / 1000 / link.bandwidth_gbs)
    return out, shares


def section() -> str:
    """The section as Markdown."""
    table, shares = lines()
    note = (
        "Measured time of an all-reduce at the payload nearest to each column, and the ring formula's error "
        "with the link of the hardware file, which is the datasheet's. At the largest payload shown the "
        f"measured ones reach {min(shares):.0%} to {max(shares):.0%} of that bandwidth, {LARGER}: a cluster "
        "config does well to state an effective `link_bw`. "
        "Where a bundle has the table measured over NVLink, a run uses it instead. Made by `python "
        "benchmarks/all_reduce.py`."
    )
    return "\n".join([note, "", *table])


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    return command("all-reduce", (__doc__ or "").splitlines()[0], section)


if __name__ == "__main__":
    sys.exit(main())
