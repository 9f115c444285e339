"""From skew shots to α per bucket of five quantities, in the form that :mod:`servesim.cost.skew` reads.

A bucket's α is the slope through the origin, by least squares, of what unequal lengths add over what the
greatest length everywhere would add: ``Σ (t_max - t_mean)(t_skew - t_mean) / Σ (t_max - t_mean)²``. Shots
whose greatest length is not slower than the mean have nothing to say. Checked against recorded fits: the same
α to its last digit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.profiler.bundle_writer import HEADERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SKEW_HEADER = HEADERS["skew.csv"]
"""Columns of skew.csv; the first ten name the shot."""

BUCKET_AXES: dict[str, Any] = {
    "pc": "raw pc value (profiled grid point)",
    "n_bins": [0, 2, 4, 8, 16, 32, 64, 128, 256, 1000000],
    "n_labels": ["n<=2", "n<=4", "n<=8", "n<=16", "n<=32", "n<=64", "n<=128", "n<=256", "n>256"],
    "skew_rate_bins": [-0.01, 0.05, 0.15, 0.4, 0.7, 1.01],
    "skew_rate_labels": ["sr<=5%", "sr<=15%", "sr<=40%", "sr<=70%", "sr>70%"],
    "kv_big_bins": [0, 1024, 4096, 16384, 1000000000],
    "kv_big_labels": ["kvB<=1k", "kvB<=4k", "kvB<=16k", "kvB>16k"],
    "kp_bins": [-1, 0, 512, 1024, 2048, 4096, 8192, 1000000000],
    "kp_labels": ["kp=0", "kp<=512", "kp<=1k", "kp<=2k", "kp<=4k", "kp<=8k", "kp>8k"],
}
"""Buckets: a value belongs to the first bin whose upper bound is not below it."""

Bucket = tuple[int, str, str, str, str]


@dataclass(frozen=True, slots=True)
class SkewSample:
    """One skew shot: where it lies and its three times in µs."""

    bucket: Bucket
    mean_us: float
    longest_us: float
    skewed_us: float

    @property
    def room_us(self) -> float:
        """What the greatest length everywhere would add to the mean length everywhere."""
        return self.longest_us - self.mean_us


@dataclass(frozen=True, slots=True)
class SkewFit:
    """The rows of skew_fit.csv and the summary of meta.yaml."""

    rows: list[tuple[int, str, str, str, str, float, int]]
    summary: dict[str, Any]


def bucket_of(chunk: int, n: int, rate: float, kv_long: int, history: int) -> Bucket:
    """Chunk, and the labels of decodes, skew rate, greatest KV length and history."""
    values = {"n": n, "skew_rate": rate, "kv_big": kv_long, "kp": history}
    labels = [_label(axis, value) for axis, value in values.items()]
    return (chunk, labels[0], labels[1], labels[2], labels[3])


def _label(axis: str, value: float) -> str:
    upper: Sequence[float] = BUCKET_AXES[f"{axis}_bins"][1:-1]
    label: str = BUCKET_AXES[f"{axis}_labels"][bisect_left(upper, value)]
    return label


def sample_of(row: Sequence[str]) -> SkewSample:
    """A row of skew.csv (cells in the order of :data:`SKEW_HEADER`) as a sample."""
    cells = dict(zip(SKEW_HEADER, row, strict=True))
    kv, longest, mean = (int(cells[name]) for name in ("kvs", "kv_big", "kv_mean"))
    rate = (mean - kv) / (longest - kv) if longest > kv else 0.0
    bucket = bucket_of(int(cells["pc"]), int(cells["n"]), rate, longest, int(cells["kp"]))
    return SkewSample(bucket, *(float(cells[name]) for name in ("t_mean_us", "t_max_us", "t_skew_us")))


def fit_skew(samples: Iterable[SkewSample]) -> SkewFit | None:
    """α of every bucket that has samples, rounded to four digits; None without a single usable sample."""
    usable = [sample for sample in samples if sample.room_us > 0.0]
    if not usable:
        return None
    buckets: dict[Bucket, list[SkewSample]] = defaultdict(list)
    for sample in usable:
        buckets[sample.bucket].append(sample)
    alpha = {bucket: _slope(members) for bucket, members in buckets.items()}
    rows = [(*bucket, round(alpha[bucket], 4), len(buckets[bucket])) for bucket in sorted(buckets)]
    predicted = np.array([s.mean_us + alpha[s.bucket] * s.room_us for s in usable])
    error = predicted / np.array([s.skewed_us for s in usable]) - 1.0
    p50, p90, p99 = (round(float(q), 4) for q in np.percentile(np.abs(error), [50, 90, 99]))
    summary = {
        "method": "per_bucket_wls_5axis",
        "n_samples": len(usable),
        "alpha_default": round(_slope(usable), 4),
        "rel_err_p50": p50,
        "rel_err_p90": p90,
        "rel_err_p99": p99,
        "signed_mean": round(float(error.mean()), 4),
    }
    return SkewFit(rows, summary)


def _slope(samples: Sequence[SkewSample]) -> float:
    room = np.array([sample.room_us for sample in samples])
    added = np.array([sample.skewed_us - sample.mean_us for sample in samples])
    return float(room @ added / (room @ room))
