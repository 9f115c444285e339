"""Exact means and percentiles, of plain samples and of values with multiplicities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)


@dataclass(slots=True, frozen=True)
class Distribution:
    """Summary of a sample of times, in ns; all zero when the sample is empty."""

    count: int
    mean: float
    std: float
    """Population standard deviation."""
    median: float
    p90: float
    p95: float
    p99: float
    maximum: int


def exact_sum(values: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> int:
    """Sum of ``values``, or of ``values * counts``: exact, so the same on every machine, and of any size.

    Sums of times in ns do not fit 64 bits for long: 60,000 requests that wait a hundred days are too much.
    """
    if not len(values):
        return 0
    most = float(np.abs(values).max()) * len(values)
    if counts is not None:
        most *= float(np.abs(counts).max())
    if most < 2.0**62:
        return int(values.sum() if counts is None else np.dot(values, counts))
    listed: list[int] = values.tolist()
    return sum(listed) if counts is None else sum(map(mul, listed, counts.tolist()))


def weighted_percentiles(
    values: NDArray[np.int64], counts: NDArray[np.int64], percents: Sequence[float]
) -> list[float]:
    """Percentiles of the sample in which ``values[i]`` occurs ``counts[i]`` times.

    The sample is never written out: equal to ``np.percentile(np.repeat(values, counts), percents)`` (linear
    interpolation between the neighbouring order statistics), in time O(values).

    Args:
        values: shape (n,), any order.
        counts: shape (n,), non-negative; their sum must be positive.
        percents: 0 to 100.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    last_rank = np.cumsum(counts[order])  # ranks below last_rank[i] (from 0) hold a value <= ordered[i]
    total = int(last_rank[-1])
    results = []
    for percent in percents:
        rank = percent / 100 * (total - 1)
        below = math.floor(rank)
        above = min(below + 1, total - 1)
        low = int(ordered[np.searchsorted(last_rank, below, side="right")])
        high = int(ordered[np.searchsorted(last_rank, above, side="right")])
        results.append(low + (high - low) * (rank - below))
    return results


def describe(values: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> Distribution:
    """Mean, standard deviation, percentiles and maximum of integer times in ns.

    Args:
        values: shape (n,).
        counts: multiplicity of each value, shape (n,); None: each occurs once.
    """
    if counts is None:
        counts = np.ones(len(values), dtype=np.int64)
    else:
        present = counts > 0
        values, counts = values[present], counts[present]
    total = int(counts.sum())
    if total == 0:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    mean = exact_sum(values, counts) / total
    variance = float((counts * (values - mean) ** 2).sum()) / total
    median, p90, p95, p99 = weighted_percentiles(values, counts, PERCENTILES)
    return Distribution(total, mean, math.sqrt(variance), median, p90, p95, p99, int(values.max()))
