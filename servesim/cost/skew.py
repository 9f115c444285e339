"""The extra time of decodes of unequal KV length.

A decode kernel over sequences of different length takes longer than over equal ones of the mean length, and
less than over equal ones of the greatest length: ``t(mean) + α (t(max) - t(mean))``. A bundle may carry α per
bucket of five quantities. A bucket is named after its upper bound and includes it; what lies beyond the last
bound belongs to the last bucket. α is a fit and used as it is, negative values included; since a bucket of
one or two samples can hold a wild one, whoever uses α keeps the time from falling below that of decodes of
the least length.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True, frozen=True)
class SkewTable:
    """α over (chunk tokens, decodes, skew rate, greatest KV length, history): the axes of ``alpha``.

    ``bounds`` holds, per axis, the upper bounds of all buckets but the last. The chunk axis has the profiled
    chunk sizes as bounds, so that a chunk between two of them takes the larger, as on the other axes.
    """

    bounds: tuple[list[float], ...]
    alpha: NDArray[np.float64]

    def of(self, chunk: int, decodes: int, skew_rate: float, kv_max: int, history: int) -> float:
        """α of one step."""
        chunks, ns, rates, lengths, histories = self.bounds
        return self.alpha.item(
            bisect_left(chunks, chunk),
            bisect_left(ns, decodes),
            bisect_left(rates, skew_rate),
            bisect_left(lengths, kv_max),
            bisect_left(histories, history),
        )

    def for_decodes(self, decodes: int) -> tuple[list[float], list[float], list[list[float]]]:
        """Everything a step of ``decodes`` decodes and no chunk can ask for.

        Returns the bounds of the skew rate, the bounds of the greatest KV length, and α[skew rate][greatest
        KV].
        """
        plane = self.alpha[bisect_left(self.bounds[0], 0), bisect_left(self.bounds[1], decodes), :, :, 0]
        return self.bounds[2], self.bounds[3], plane.tolist()


def skew_rate(kv_mean: int, kv_min: int, kv_max: int) -> float:
    """Where the mean lies between least and greatest: ``(mean - min) / (max - min)``; 0 if all are equal."""
    return (kv_mean - kv_min) / (kv_max - kv_min) if kv_max > kv_min else 0.0
