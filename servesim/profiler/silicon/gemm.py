"""Times of dense GEMMs from the measured (m, n, k) table.

A kernel works on tiles, so its time is a staircase in m: a sample at m is representative of the tile edge
above it, unless a whole tile would then be computed faster than at the GPU's peak rate: that kernel has
smaller tiles (bf16 on Hopper, just above 256 and 512 rows).

The table was measured by cycling through six copies of the weights. Those of a small GEMM are found in L2
again, as a served model's never are: where a table shows that, they take at least what slightly larger ones,
read from DRAM, take in proportion to their bytes. ``benchmarks/gemm_interpolation.py`` tests on the tables
themselves which do, and how to tell GEMMs of sizes between the measured ones.
"""

from __future__ import annotations

import math
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.profiler.silicon.tables import read_table, table_versions
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu, KernelTable

LAUNCH_US = 1.5
"""Time of a kernel in a stream of different kernels beyond its time in a replayed loop."""
WEIGHT_COPIES = 6
"""Copies of the weights that a measurement cycles through; it reads none from DRAM while all fit L2.

Where L2 is much faster than DRAM (RTX PRO 6000, L40S), tables jump at a sixth of L2: smaller GEMMs take
0.6 to 0.7 of the time of reading their weights from DRAM, larger ones all of it.
"""
WARM_SHOWS = 0.85
"""Share of that time below which half of the small GEMMs of a table must lie; others lie above 0.93."""
SMALLEST_SHARE, LARGEST_SHARE = 1 / 12, 0.5
"""Weights as shares of L2: those from here to a sixth tell whether a table is warm, those from there to here
what reading from DRAM takes."""
SLOW_US = 40.0
"""A table whose quickest GEMM took longer measured more than kernels."""
HIDES = 3.0
"""Times of the quickest product from which a kernel runs longer than what launches it."""
STREAM_TOKENS = 16
"""Rows up to which a GEMM is bound by reading its weights."""
STREAM_WIDTH = 1024
"""Least n and k at which it keeps all SMs reading."""
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625}
"""Bytes of one weight, scales included."""


Tile = tuple[int, int, float]
"""Rows and columns of a thread block's tile, and its time relative to its size."""
SQUARE: tuple[Tile, ...] = ((128, 128, 1.0),)
WIDE: tuple[Tile, ...] = ((128, 256, 1.0),)
BEST: tuple[Tile, ...] = ((64, 128, 1.1), (128, 128, 1.0), (128, 256, 0.92), (256, 128, 0.92))
"""A library that picks the tile with the fewest waves; larger tiles are the more efficient ones."""
TILES: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("rtx_pro_6000_server", "bfloat16"): BEST,
    ("rtx_pro_6000_server", "fp8"): SQUARE,
    ("l40s", "bfloat16"): WIDE,
    ("a100_sxm", "bfloat16"): WIDE,
}
"""Tiles where counting waves of thread blocks tells the width n better than a straight line does.

Chosen by leaving every measured n out once (``benchmarks/gemm_interpolation.py``): the median error above 512
rows falls from 5.2 to 3.8 %, 2.6 to 1.4 %, 9.3 to 7.4 % and 7.0 to 2.8 %. Persistent kernels (Hopper and
later) have no waves; a line is best there.
"""
WAVES_FROM = 257
"""Rows from which GEMMs run in such tiles."""


def waves(tokens: NDArray[np.float64], n: int, tiles: tuple[Tile, ...], sms: int) -> NDArray[np.float64]:
    """Time of a GEMM of ``n`` columns in units of a full wave of 128 x 128 tiles, by its best tile."""
    if not tiles:
        return np.ones(len(tokens))
    counted = [
        np.ceil(np.ceil(tokens / rows) * math.ceil(n / columns) / sms) * (rows * columns / 16384 * cost)
        for rows, columns, cost in tiles
    ]
    return np.where(tokens >= WAVES_FROM, np.min(counted, axis=0), 1.0)


def tile_edge(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row count at which a GEMM of ``tokens`` rows fills its last tile (32 rows to 256, 128 beyond)."""
    fine = -(-tokens // 32) * 32
    coarse = -(-tokens // 128) * 128
    return np.where(tokens <= 128, tokens, np.where(tokens <= 256, fine, coarse))


def _bracket(value: int, grid: NDArray[np.int64]) -> list[tuple[int, float]]:
    """Grid indices and weights of a linear interpolation; proportional above the grid, clamped below it."""
    if value >= grid[-1]:
        return [(len(grid) - 1, value / float(grid[-1]))]
    above = int(np.searchsorted(grid, value))
    if above == 0 or grid[above] == value:
        return [(above, 1.0)]
    weight = (value - grid[above - 1]) / float(grid[above] - grid[above - 1])
    return [(above - 1, 1.0 - weight), (above, float(weight))]


def _whole_grid(n: NDArray[np.int64], k: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The n and k that were measured in every combination; the largest of both fits no memory."""
    measured = np.unique(np.column_stack([n, k]), axis=0)
    depths, counts = np.unique(measured[:, 1], return_counts=True)
    depths = depths[counts * 2 >= counts.max()]
    inside = measured[np.isin(measured[:, 1], depths)]
    widths, counts = np.unique(inside[:, 0], return_counts=True)
    return widths[counts >= len(depths) - 1], depths


@dataclass(slots=True)
class GemmTimes:
    """Times of ``[m, k] x [k, n]`` GEMMs in one dtype on one GPU."""

    gpu: Gpu
    dtype: str
    table: KernelTable
    widths: NDArray[np.int64] = field(init=False)
    """Every n that was measured with all of ``depths``, rising."""
    depths: NDArray[np.int64] = field(init=False)
    """The k of the grid, rising; newer tables hold single sizes of models beside it."""
    columns: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = field(init=False)
    """(n, k) to the tile edges it was measured at and the times there, weights from DRAM."""
    stream_start_us: float = field(init=False)
    """Time of a GEMM that reads its weights from DRAM beyond the time of their bytes."""
    stream_byte_us: float = field(init=False)
    """Time per byte of weights."""
    warm: bool = field(init=False)
    """Whether small GEMMs were measured with their weights in L2, to be seen from their times."""

    def __post_init__(self) -> None:
        rows = self.table.where(gemm_dtype=self.dtype)
        if not len(rows):
            raise InputError(
                f"no {self.dtype} GEMMs were measured on {self.gpu.folder} with vLLM "
                f"{self.table.version}; measured: {', '.join(self.table.values('gemm_dtype'))}"
            )
        m, n, k = rows.integers("m"), rows.integers("n"), rows.integers("k")
        self.widths, self.depths = _whole_grid(n, k)
        if not len(self.widths):
            raise InputError(
                f"{self.dtype} GEMMs of {self.gpu.folder} with vLLM {self.table.version}: no sizes were "
                "measured in every combination, so that others cannot be told from them"
            )
        order = np.lexsort((m, k, n))
        m, n, k, time = m[order], n[order], k[order], rows.latency_us[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(n) != 0) | (np.diff(k) != 0)])
        self.columns = {}
        for start, end in zip(starts, np.r_[starts[1:], len(m)], strict=True):
            width, depth = int(n[start]), int(k[start])
            at = self._represented_rows(m[start:end], width, depth, time[start:end])
            edges, inverse = np.unique(at, return_inverse=True)
            mean = np.bincount(inverse, weights=time[start:end]) / np.bincount(inverse)
            self.columns[width, depth] = (edges.astype(np.float64), mean)
        self._fit_stream()
        if self.warm:
            for (width, depth), (_, column_us) in self.columns.items():
                if self.in_l2(width, depth):
                    np.maximum(column_us, self.weight_stream_us(width, depth), out=column_us)

    def _represented_rows(
        self, rows: NDArray[np.int64], n: int, k: int, time_us: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Row count that each sample is the time of: its tile's edge, its own where that beats the peak."""
        edges = tile_edge(rows)
        return np.where(2.0 * edges * n * k * self.gpu.flop_us(self.dtype) > time_us, rows, edges)

    def weight_bytes(self, n: int, k: int) -> float:
        """Bytes of the [k, n] weights."""
        return n * k * WEIGHT_BYTES[self.dtype]

    def in_l2(self, n: int, k: int) -> bool:
        """Whether all copies of the [k, n] weights fitted L2 when they were measured."""
        return WEIGHT_COPIES * self.weight_bytes(n, k) <= self.gpu.l2_bytes

    def _stream_samples(self, least: float, most: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weight bytes and times of GEMMs of few rows, weights of over ``least`` to ``most`` of L2."""
        sizes, times = [], []
        for (n, k), (edges, column_us) in self.columns.items():
            size = self.weight_bytes(n, k)
            inside = min(n, k) >= STREAM_WIDTH and least < size / self.gpu.l2_bytes <= most
            if inside and edges[0] <= STREAM_TOKENS:
                sizes.append(size)
                times.append(float(np.median(column_us[edges <= STREAM_TOKENS])))
        return np.array(sizes), np.array(times)

    def _fit_stream(self) -> None:
        """A line through the GEMMs whose weights just do not stay in L2: median slope, median rest.

        No byte is read faster than at the nominal bandwidth.
        """
        sizes, times = self._stream_samples(1 / WEIGHT_COPIES, LARGEST_SHARE)
        few, many = np.triu_indices(len(sizes), 1)
        differ = sizes[few] != sizes[many]
        few, many = few[differ], many[differ]
        self.stream_start_us, self.stream_byte_us = 0.0, 1e6 / self.gpu.bandwidth_bytes_s
        if len(few):
            slopes = (times[many] - times[few]) / (sizes[many] - sizes[few])
            self.stream_byte_us = max(self.stream_byte_us, float(np.median(slopes)))
            self.stream_start_us = max(0.0, float(np.median(times - self.stream_byte_us * sizes)))
        sizes, times = self._stream_samples(SMALLEST_SHARE, 1 / WEIGHT_COPIES)
        over = times / (self.stream_start_us + self.stream_byte_us * sizes)
        self.warm = bool(len(few) and len(over) and np.median(over) < WARM_SHOWS)

    def _column_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        edges, times = self.columns[n, k]
        at = tile_edge(tokens).astype(np.float64)
        beyond = np.maximum(at / edges[-1], 1.0)
        return np.asarray(np.interp(at, edges, times) * beyond)

    def _grid_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """At a point of the grid; the one that may be missing is in proportion to the next smaller depth."""
        if (n, k) in self.columns:
            return self._column_us(tokens, n, k)
        near = max(depth for depth in self.depths.tolist() if (n, depth) in self.columns and depth < k)
        return np.asarray(self._column_us(tokens, n, near) * (k / near))

    def measured(self, n: int, k: int) -> bool:
        """Whether (n, k) itself was measured, so that only m is interpolated."""
        return (n, k) in self.columns

    def weight_stream_us(self, n: int, k: int) -> float:
        """Time of a GEMM of few rows whose [k, n] weights come from DRAM."""
        return self.stream_start_us + self.stream_byte_us * self.weight_bytes(n, k)

    def time_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """Products of ``tokens`` rows: linear between tile edges per (n, k), then bilinear in (n, k).

        Along n, what is interpolated is the time of a wave of thread blocks where the kernel has them.
        """
        if (n, k) in self.columns:
            return np.asarray(LAUNCH_US + self._column_us(tokens, n, k))
        total = np.zeros(len(tokens), dtype=np.float64)
        tiles, sms = TILES.get((self.gpu.folder, self.dtype), ()), self.gpu.sm_count
        edges = tile_edge(tokens).astype(np.float64)
        own_waves = waves(edges, n, tiles, sms)
        for row, row_weight in _bracket(n, self.widths):
            width = int(self.widths[row])
            full = np.where(edges >= WAVES_FROM, own_waves / waves(edges, width, tiles, sms), 1.0)
            if tiles and row_weight > 1.0:  # beyond the table the waves alone say how much more there is
                full = np.where(edges >= WAVES_FROM, full / row_weight, 1.0)
            for column, column_weight in _bracket(k, self.depths):
                measured_us = self._grid_us(tokens, width, int(self.depths[column]))
                total += row_weight * column_weight * full * measured_us
        return LAUNCH_US + total


@dataclass(slots=True)
class NarrowTimes:
    """Products with 16-bit arithmetic whose weights are stored narrower and widened on the way (int4, MXFP4,
    and formats that a GPU has no arithmetic for).

    No such kernel is in the tables. A 16-bit product is taken for ``hypot(stream, compute)``: the stream of
    its weights gets shorter, the rest stays.
    """

    wide: GemmTimes
    weight_bits: float
    """Of one weight, scales included."""

    def time_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """As :meth:`GemmTimes.time_us`."""
        wide_us = self.wide.time_us(tokens, n, k)
        stream_us = LAUNCH_US + self.wide.weight_stream_us(n, k)
        narrow_us = stream_us - self.wide.stream_byte_us * n * k * (2.0 - self.weight_bits / 8)
        compute_us = np.sqrt(np.maximum(wide_us**2 - stream_us**2, 0.0))
        return np.asarray(np.minimum(np.hypot(narrow_us, compute_us), wide_us))


@dataclass(slots=True)
class LaunchedTimes:
    """Products of a table that was measured together with the program that launches its kernels.

    All fp8 block-scaled products were: the smallest takes 55 to 150 us, one with a scale per matrix 5. Large
    ones hide the program and tell how much longer the kernel itself takes (``slower``); the others
    take so much longer than the product with a scale per matrix, and never longer than the table says.
    """

    measured: GemmTimes
    plain: GemmTimes
    """Of the same bytes, measured as kernels."""
    slower: float = field(init=False)

    def __post_init__(self) -> None:
        hidden_us = HIDES * smallest_us(self.measured)
        ratios = []
        for size, (edges, us) in self.measured.columns.items():
            if size in self.plain.columns and (us > hidden_us).any():
                plain_us = np.interp(edges, *self.plain.columns[size])
                ratios += (us / plain_us)[us > hidden_us].tolist()
        self.slower = max(float(np.median(ratios)), 1.0) if ratios else 1.0

    def time_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """As :meth:`GemmTimes.time_us`."""
        kernel_us = self.plain.time_us(tokens, n, k) * self.slower
        return np.asarray(np.minimum(self.measured.time_us(tokens, n, k), kernel_us))


@dataclass(frozen=True, slots=True)
class Products:
    """Where the products of one weight format come from."""

    times: GemmTimes | NarrowTimes | LaunchedTimes
    element: str
    """The format by the tables' name."""
    note: str = ""
    """What is not as measured."""

    @property
    def table(self) -> GemmTimes:
        """The measured rows behind it."""
        if isinstance(self.times, LaunchedTimes):
            return self.times.plain
        return self.times.wide if isinstance(self.times, NarrowTimes) else self.times


STAND_INS = {"fp8_block": ("fp8",), "fp8": ("fp8_block",), "mxfp8": ("fp8_block", "fp8")}
"""Formats -> those whose products stand in where theirs were not measured."""


@lru_cache(maxsize=16)
def products(gpu: Gpu, element: str, weight_bits: float) -> Products:
    """Products with weights of a format; ``weight_bits``: of one weight with its scales.

    Raises:
        InputError: not even 16-bit products were measured on the GPU.
    """
    for name in (element, *STAND_INS.get(element, ())):
        if _has(gpu, name):
            times = gemm_times(gpu, name)
            if smallest_us(times) > SLOW_US and (fallback := _kernels_of(gpu, times)) is not None:
                note = (
                    f"{name} products were measured with the program that launches them (the smallest "
                    f"takes {smallest_us(times):.0f} us); small ones are {fallback.slower:.2f} x those with "
                    "a scale per matrix"
                )
                return Products(fallback, element, note)
            note = "" if name == element else f"{element} products timed as {name}"
            return Products(times, element, note)
    narrow = NarrowTimes(gemm_times(gpu, "bfloat16"), weight_bits)
    note = f"{element} products derived from 16-bit ones and {weight_bits:.3g} bits a weight, not measured"
    return Products(narrow, element, note)


def _kernels_of(gpu: Gpu, times: GemmTimes) -> LaunchedTimes | None:
    """Times of a table's kernels alone, where it holds more; None: nothing tells them apart."""
    if times.dtype != "fp8_block" or not _has(gpu, "fp8"):
        return None
    return LaunchedTimes(times, gemm_times(gpu, "fp8"))


def _has(gpu: Gpu, name: str) -> bool:
    return bool(table_versions(gpu.folder, "gemm", "gemm_perf", like={"gemm_dtype": name}))


def smallest_us(times: GemmTimes) -> float:
    """What the table's quickest GEMM took, in us; a kernel takes a few, the rest is the program's own."""
    return float(times.table.where(gemm_dtype=times.dtype).latency_us.min())


def gemm_times(gpu: Gpu, dtype: str) -> GemmTimes:
    """Products in ``dtype`` (bfloat16, fp8, fp8_block, nvfp4) on ``gpu``."""
    return GemmTimes(gpu, dtype, read_table(gpu.folder, "gemm", "gemm_perf", like={"gemm_dtype": dtype}))
