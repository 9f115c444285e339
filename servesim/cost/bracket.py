"""Where a number lies between measured points."""

from __future__ import annotations

from bisect import bisect_right


def bracket(points: list[int], query: float) -> tuple[int, int, float]:
    """``(low, high, weight)`` so that the value at ``query`` is ``(1 - weight) * v[low] + weight * v[high]``.

    ``weight`` is 0 below the first point and exceeds 1 above the last one: along the last interval, which is
    right where the last point is one of :meth:`servesim.cost.tables.Surface.extended`.
    """
    if query <= points[0] or len(points) == 1:
        return 0, 0, 0.0
    high = min(bisect_right(points, query), len(points) - 1)
    low = high - 1
    return low, high, (query - points[low]) / (points[high] - points[low])
