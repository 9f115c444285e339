"""Cross-validates how times of matrix products between the measured sizes are told, on the tables themselves.

    python benchmarks/gemm_interpolation.py            needs: pip install 'servesim[silicon]'
    python benchmarks/gemm_interpolation.py --print    the section on the screen only

Leaves every measured n out once, and every measured k, predicts the products of that size from the others and
compares; then looks for the size up to which a measurement found its weights in L2. Writes the section of
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from results_page import command

from servesim.errors import InputError
from servesim.profiler.silicon.gemm import BEST, STREAM_TOKENS, STREAM_WIDTH, TILES, Tile, gemm_times, waves
from servesim.profiler.silicon.tables import installed, silicon_gpu
from servesim.specs.hardware import load_hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from servesim.profiler.silicon.gemm import GemmTimes

    Floats = NDArray[np.float64]
    Line = Callable[[Floats, int, Floats], Floats]

GPUS = ("RTXPRO6000", "L40S", "A100", "H100", "H200", "B200", "B300", "GB200", "GB300", "B60")
DTYPES = ("bfloat16", "fp8")
"""Block-scaled fp8 is left out: its tables hold 55 to 450 us of something else than the product."""
SMALLEST, LARGEST = 768, 16384
"""Sizes that models have; the tables go on at 51200, four times as far apart."""
MOST_TOKENS = 8192
ROWS = ((1, 16), (17, 128), (129, 512), (513, MOST_TOKENS))
L2_SHARES = ((1 / 12, 1 / 6), (1 / 6, 1 / 3), (1 / 3, 1), (1, 4))
"""Weights as shares of L2; measurements cycle through six copies."""


@dataclass(frozen=True)
class Axis:
    """Measured products along n or k: ``times`` is indexed by size, by the other size and by tile edge.

    ``cold`` (size, other size) tells those whose weights came from DRAM as they were measured.
    """

    name: str
    gemm: GemmTimes
    sizes: Floats
    edges: Floats
    times: Floats
    cold: NDArray[np.bool_]

    def left_out(self, line: Line, tiles: tuple[Tile, ...] = ()) -> Floats:
        """Errors (0.1 = 10 % too long) of every inner size told by ``line`` from the others.

        With ``tiles``, what the line tells along n is the time of one wave of thread blocks.
        """
        per_wave = self.times
        sms = self.gemm.gpu.sm_count
        filled = np.ones((len(self.sizes), 1, len(self.edges)))
        if tiles and self.name == "n":
            filled = np.array([[waves(self.edges, int(size), tiles, sms)] for size in self.sizes])
            per_wave = self.times / filled
        inner = [at for at in range(1, len(self.sizes) - 1) if self.sizes[at] >= SMALLEST]
        told = np.array([line(self.sizes, at, per_wave) * filled[at] for at in inner])
        return np.where(self.cold[inner][:, :, None], told / self.times[inner] - 1.0, np.nan)


# ---------------------------------------------------------------- ways to tell a size from its neighbours


def _between(at: Floats, index: int, lower: Floats, upper: Floats) -> Floats:
    weight = float((at[index] - at[index - 1]) / (at[index + 1] - at[index - 1]))
    return (1.0 - weight) * lower + weight * upper


def straight(sizes: Floats, index: int, times: Floats) -> Floats:
    """Time is linear in the size."""
    return _between(sizes, index, times[index - 1], times[index + 1])


def log_log(sizes: Floats, index: int, times: Floats) -> Floats:
    """Time is a power of the size."""
    return np.exp(_between(np.log(sizes), index, np.log(times[index - 1]), np.log(times[index + 1])))


def beyond_start(sizes: Floats, index: int, times: Floats) -> Floats:
    """Time beyond that of the smallest product, as a power of the size."""
    start = 0.9 * float(np.nanmin(times))
    return start + log_log(sizes, index, times - start)


def rate(sizes: Floats, index: int, times: Floats) -> Floats:
    """Achieved FLOP/s, and with them bytes/s, are linear in the size."""
    rates = sizes[:, None, None] / times
    return float(sizes[index]) / straight(sizes, index, rates)


def time_per_size(sizes: Floats, index: int, times: Floats) -> Floats:
    """Time per weight is linear in the size."""
    return float(sizes[index]) * straight(sizes, index, times / sizes[:, None, None])


def nearest(sizes: Floats, index: int, times: Floats) -> Floats:
    """Time per weight is that of the nearer neighbour."""
    below = sizes[index] / sizes[index - 1] < sizes[index + 1] / sizes[index]
    near = index - 1 if below else index + 1
    return np.asarray(times[near] * sizes[index] / sizes[near])


def four_log_log(sizes: Floats, index: int, times: Floats) -> Floats:
    """A power fitted to two neighbours on each side, the nearer ones with more weight."""
    others = [at for at in range(max(0, index - 2), min(len(sizes), index + 3)) if at != index]
    away = np.log(sizes[others] / sizes[index])
    weight = np.exp(-0.5 * (away / 0.3) ** 2)
    design = np.stack([np.ones(len(others)), away], axis=1)
    share = np.linalg.solve(design.T @ (design * weight[:, None]), (design * weight[:, None]).T)[0]
    return np.asarray(np.exp(np.tensordot(share, np.log(times[others]), 1)))


WAYS: dict[str, Line] = {
    "time linear in the size": straight,
    "time log-log": log_log,
    "time beyond the start log-log": beyond_start,
    "achieved rate linear": rate,
    "time per weight linear": time_per_size,
    "time per weight of the nearest": nearest,
    "time log-log through four": four_log_log,
}


# ---------------------------------------------------------------- the section

INTRODUCTION = """\
A product whose (n, k) was not measured is told from its neighbours in the table. Here every measured n
(and every measured k) from 768 to 12288 is left out once and told from the others, in the public tables of
ten GPUs in bf16 and fp8. Leaving a size out makes the gaps twice as wide as they are, so errors of real
bundles are smaller. Products that were measured with their weights in L2 (see below) are not counted.
Errors in %: median of the size / signed median / P95 of the size, by rows of the product. Made by
`python benchmarks/gemm_interpolation.py`."""
FINDINGS = """\
- No smooth way is better than a straight line by more than a few tenths of a per cent in any range. What is
  left are kernels: the library picks another one at the next size, and neighbours do not show which.
- Counting waves of thread blocks, from 257 rows on, helps where the kernels have them, and hurts persistent
  ones. Which tables count waves was chosen by this comparison. By table, n left out:"""
L2_NOTE = """\
Measurements cycle through six copies of the weights. Time of products of at most 16 rows, n and k of 1024
to 16384, over the line that the table's own products between a sixth and half of L2 lie on (median; `start`
and share of the nominal bandwidth are the line's). Below a sixth of L2 the RTX PRO 6000 and the L40S read
weights from L2: there, and in no other table, products of so few weights are lifted to the line."""


def axes(hardware: str, dtype: str) -> Iterator[Axis]:
    """The table of a GPU along n and along k; nothing when it holds too few sizes."""
    try:
        gemm = gemm_times(silicon_gpu(load_hardware(hardware)), dtype)
    except InputError:
        return
    widths, depths = ([s for s in sizes.tolist() if s <= LARGEST] for sizes in (gemm.widths, gemm.depths))
    if len(widths) < 8:
        return
    edges = sorted({edge for known, _ in gemm.columns.values() for edge in known.tolist()})
    edges = [edge for edge in edges if edge <= MOST_TOKENS]
    times = np.full((len(widths), len(depths), len(edges)), np.nan)
    for i, n in enumerate(widths):
        for j, k in enumerate(depths):
            if (n, k) in gemm.columns:
                known, column_us = gemm.columns[n, k]
                _, ours, its = np.intersect1d(edges, known, return_indices=True)
                times[i, j, ours] = column_us[its]
    n, k = np.array(widths, dtype=np.float64), np.array(depths, dtype=np.float64)
    cold = np.array([[not (gemm.warm and gemm.in_l2(width, depth)) for depth in depths] for width in widths])
    at, wide, deep = np.array(edges, dtype=np.float64), n >= SMALLEST, k >= SMALLEST
    yield Axis("n", gemm, n, at, times[:, deep], cold[:, deep])
    yield Axis("k", gemm, k, at, times.swapaxes(0, 1)[:, wide], cold.T[:, wide])


def by_rows(errors: list[tuple[Floats, Floats]]) -> list[str]:
    """``median / signed / P95`` in % for each range of rows, of (edges, errors) pooled."""
    cells = []
    for least, most in ROWS:
        pooled = [error[..., (edges >= least) & (edges <= most)].ravel() for edges, error in errors]
        known = np.concatenate(pooled) * 100
        known = known[np.isfinite(known)]
        size = np.abs(known)
        cells.append(f"{np.median(size):.1f} / {np.median(known):+.1f} / {np.percentile(size, 95):.0f}")
    return cells


def shipped_tiles(axis: Axis) -> tuple[Tile, ...]:
    return TILES.get((axis.gemm.gpu.folder, axis.gemm.dtype), ())


def pooled_rows(every: list[Axis]) -> Iterator[str]:
    for name in ("n", "k"):
        chosen = [axis for axis in every if axis.name == name]
        for title, line in WAYS.items():
            cells = by_rows([(axis.edges, axis.left_out(line)) for axis in chosen])
            yield f"| {name} | {title} | {' | '.join(cells)} |"
        if name == "n":
            cells = by_rows([(axis.edges, axis.left_out(straight, BEST)) for axis in chosen])
            yield f"| n | time of a wave linear, all tables | {' | '.join(cells)} |"
            cells = by_rows([(axis.edges, axis.left_out(straight, shipped_tiles(axis))) for axis in chosen])
            yield f"| n | **time of a wave linear where chosen (as shipped)** | {' | '.join(cells)} |"


def table_rows(every: list[tuple[str, Axis]]) -> Iterator[str]:
    for hardware, axis in every:
        if axis.name == "n":
            ways: list[tuple[str, tuple[Tile, ...]]] = [("line", ())]
            if tiles := shipped_tiles(axis):
                ways = [("line, unused", ()), ("waves", tiles)]
            for title, counted in ways:
                cells = by_rows([(axis.edges, axis.left_out(straight, counted))])
                yield f"| {hardware} | {axis.gemm.dtype} | {title} | {' | '.join(cells)} |"


def l2_row(hardware: str, gemm: GemmTimes) -> str:
    """Measured time over the line of weights from DRAM, by share of L2."""
    rows = gemm.table.where(gemm_dtype=gemm.dtype)
    m, n, k = rows.integers("m"), rows.integers("n"), rows.integers("k")
    large = (m <= STREAM_TOKENS) & (np.minimum(n, k) >= STREAM_WIDTH) & (np.maximum(n, k) <= LARGEST)
    size = gemm.weight_bytes(1, 1) * n[large] * k[large]
    over = rows.latency_us[large] / (gemm.stream_start_us + gemm.stream_byte_us * size)
    cells = []
    for least, most in L2_SHARES:
        inside = (size > least * gemm.gpu.l2_bytes) & (size <= most * gemm.gpu.l2_bytes)
        cells.append(f"{np.median(over[inside]):.2f}" if inside.any() else "–")
    share = 1e6 / gemm.stream_byte_us / gemm.gpu.bandwidth_bytes_s
    line = f"{gemm.stream_start_us:.1f} µs | {share:.2f}"
    return f"| {hardware} | {gemm.dtype} | {line} | {' | '.join(cells)} |"


def section() -> str:
    """The section as Markdown."""
    every = [(gpu, axis) for gpu in GPUS for dtype in DTYPES for axis in axes(gpu, dtype)]
    ranges = [f"{least}–{most} rows" for least, most in ROWS]
    pooled = [
        f"| left out | told as | {' | '.join(ranges)} |",
        "| --- | --- |" + " ---: |" * len(ROWS),
        *pooled_rows([axis for _, axis in every]),
    ]
    tables = [
        f"| GPU | weights | told by | {' | '.join(ranges)} |",
        "| --- | --- | --- |" + " ---: |" * len(ROWS),
        *table_rows(every),
    ]
    shares = ["1/12–1/6", "1/6–1/3", "1/3–1", "1–4"]
    cold = [
        f"| GPU | weights | start | share | {' | '.join(f'{share} of L2' for share in shares)} |",
        "| --- | --- |" + " ---: |" * (2 + len(shares)),
        *(l2_row(gpu, axis.gemm) for gpu, axis in every if axis.name == "n"),
    ]
    return "\n\n".join(
        [INTRODUCTION, "\n".join(pooled), FINDINGS, "\n".join(tables), L2_NOTE, "\n".join(cold)]
    )


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    lacking = "" if installed() else "needs pip install 'servesim[silicon]'"
    return command("gemm", (__doc__ or "").splitlines()[0], section, lacking)


if __name__ == "__main__":
    sys.exit(main())
