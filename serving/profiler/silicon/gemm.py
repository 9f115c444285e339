"""Times of dense matrix products from the measured (m, n, k) table.

A kernel works on tiles, so its time is a staircase in m: a sample at m is representative of the tile edge
above it. The table replays a few weight copies that may sit in L2, which a served model's weights never do:
every time is at least the streaming time of the weights from DRAM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serving.errors import InputError
from serving.profiler.silicon.tables import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from serving.profiler.silicon.tables import Gpu, KernelTable

LAUNCH_US = 1.5
"""Time of a kernel in a stream of different kernels beyond its time in a replayed loop."""
STREAM_START_US = 3.0
"""Ramp-up and drain of a kernel that is bound by reading its weights."""
STREAM_EFFICIENCY = 0.88
"""Share of the nominal DRAM bandwidth that such a kernel reaches."""


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

Chosen by leaving every measured n out once: the median error falls from 5.7 to 3.7 %, 2.5 to 1.5 %, 9.4 to
6.6 % and 8.0 to 2.5 %. Persistent kernels (Hopper and later) have no waves; a line is best there.
"""
WAVES_FROM = 256
"""Rows from which products run in such tiles."""


def waves(tokens: NDArray[np.float64], n: int, tiles: tuple[Tile, ...], sms: int) -> NDArray[np.float64]:
    """Time of a product of ``n`` columns in units of a full wave of 128 x 128 tiles, by its best tile."""
    if not tiles:
        return np.ones(len(tokens))
    counted = [
        np.ceil(np.ceil(tokens / rows) * math.ceil(n / columns) / sms) * (rows * columns / 16384 * cost)
        for rows, columns, cost in tiles
    ]
    return np.where(tokens >= WAVES_FROM, np.min(counted, axis=0), 1.0)


def tile_edge(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row count at which a product of ``tokens`` rows fills its last tile (32 rows to 256, 128 beyond)."""
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


@dataclass(slots=True)
class GemmTimes:
    """Times of ``[m, k] x [k, n]`` products in one dtype on one GPU."""

    gpu: Gpu
    dtype: str
    table: KernelTable
    _n: NDArray[np.int64] = field(init=False)
    _k: NDArray[np.int64] = field(init=False)
    _columns: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = field(init=False)

    def __post_init__(self) -> None:
        rows = self.table.where(gemm_dtype=self.dtype)
        if not len(rows):
            raise InputError(
                f"no {self.dtype} matrix products were measured on {self.gpu.folder} with vLLM "
                f"{self.table.version}; measured: {', '.join(self.table.values('gemm_dtype'))}"
            )
        m, n, k = rows.integers("m"), rows.integers("n"), rows.integers("k")
        self._n, self._k = np.unique(n), np.unique(k)
        order = np.lexsort((m, k, n))
        m, n, k, time = m[order], n[order], k[order], rows.latency_us[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(n) != 0) | (np.diff(k) != 0)])
        self._columns = {}
        for start, end in zip(starts, np.r_[starts[1:], len(m)], strict=True):
            edges, inverse = np.unique(tile_edge(m[start:end]), return_inverse=True)
            mean = np.bincount(inverse, weights=time[start:end]) / np.bincount(inverse)
            self._columns[int(n[start]), int(k[start])] = (edges.astype(np.float64), mean)

    def _column_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        edges, times = self._columns[n, k]
        at = tile_edge(tokens).astype(np.float64)
        beyond = np.maximum(at / edges[-1], 1.0)
        return np.asarray(np.interp(at, edges, times) * beyond)

    def measured(self, n: int, k: int) -> bool:
        """Whether (n, k) itself was measured, so that only m is interpolated."""
        return (n, k) in self._columns

    def weight_stream_us(self, n: int, k: int) -> float:
        """Least time in which the [k, n] weights can come from DRAM."""
        weight_bytes = n * k * (1 if self.dtype.startswith("fp8") else 2)
        return STREAM_START_US + weight_bytes / (STREAM_EFFICIENCY * self.gpu.bandwidth_bytes_s) * 1e6

    def time_us(self, tokens: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """Products of ``tokens`` rows: linear between tile edges per (n, k), then bilinear in (n, k).

        Along n, what is interpolated is the time of a wave of thread blocks where the kernel has them.
        """
        total = np.zeros(len(tokens), dtype=np.float64)
        tiles, sms = TILES.get((self.gpu.folder, self.dtype), ()), self.gpu.sm_count
        edges = tile_edge(tokens).astype(np.float64)
        own_waves = waves(edges, n, tiles, sms)
        for row, row_weight in _bracket(n, self._n):
            width = int(self._n[row])
            full = np.where(edges >= WAVES_FROM, own_waves / waves(edges, width, tiles, sms), 1.0)
            if tiles and row_weight > 1.0:  # beyond the table the waves alone say how much more there is
                full = np.where(edges >= WAVES_FROM, full / row_weight, 1.0)
            for column, column_weight in _bracket(k, self._k):
                measured_us = self._column_us(tokens, width, int(self._k[column]))
                total += row_weight * column_weight * full * measured_us
        return LAUNCH_US + np.maximum(total, self.weight_stream_us(n, k))


def gemm_times(gpu: Gpu, dtype: str) -> GemmTimes:
    """Products in ``dtype`` (bfloat16, fp8, fp8_block, nvfp4) on ``gpu``."""
    return GemmTimes(gpu, dtype, read_table(gpu.folder, "gemm", "gemm_perf"))
