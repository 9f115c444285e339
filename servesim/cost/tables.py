"""Piecewise-linear lookup in measured kernel times, on any number of axes.

The rule on every axis: linear between two measured points, constant below the first, and above the last on
with the rate that the points before it show (:mod:`servesim.cost.beyond`), but never below the value at the
last. On several axes the rule is applied axis after axis, and each axis may have other points under every
point of the axes before it (the measurements are *ragged*: long histories are measured with fewer chunk
sizes, say). :func:`densify` turns such measurements into one dense tensor on the union of all points. The
rule never bends a line between two points of the union, so a lookup in the tensor equals the ragged lookup up
to the union's ends, and needs only the ``2 ** axes`` corners of one cell. Beyond them all points of the union
tell the rate, and the lookup goes to a tensor with one more point on every axis (:meth:`Surface.extended`).
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.beyond import slope_beyond
from servesim.cost.bracket import bracket
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


def describe_lookup(points: Ints, query: float, unit: str) -> str:
    """How the value at ``query`` comes about, for people."""
    first, last = int(points[0]), int(points[-1])
    if query in points:
        return f"profiled at {query:g} {unit}"
    if len(points) == 1 or query < first:
        return (
            f"held at {first} {unit}, the only row"
            if len(points) == 1
            else f"held at {first} {unit}, the smallest"
        )
    low, high, _ = bracket(points.tolist(), query)
    if query > last:
        return f"extrapolated to {query:g}, measured up to {last} {unit}"
    return f"interpolated between {points[low]} and {points[high]} {unit}"


def describe_axis(points: Ints, query: int, name: str) -> str:
    """``KV length 1000 (between 768 and 1024)``; no bracket for a measured point."""
    if query in points:
        return f"{name} {query}"
    low, high, weight = bracket(points.tolist(), query)
    if weight > 1.0:
        return f"{name} {query} (extrapolated, measured up to {points[-1]})"
    if low == high or query < points[0]:
        return f"{name} {query} (clamped to the smallest measured, {points[low]})"
    return f"{name} {query} (between {points[low]} and {points[high]})"


def brackets(points: Ints, queries: ArrayLike) -> tuple[Ints, Ints, Floats]:
    """:func:`bracket` of many queries at once, element for element the same floats."""
    wanted = np.asarray(queries, dtype=np.float64)
    if len(points) == 1:
        zeros = np.zeros(wanted.shape, dtype=np.int64)
        return zeros, zeros, np.zeros(wanted.shape)
    high = np.clip(np.searchsorted(points, wanted, side="right"), 1, len(points) - 1)
    low = high - 1
    weight = np.maximum((wanted - points[low]) / (points[high] - points[low]), 0.0)
    return low, high, weight


def distinct(values: Ints) -> Ints:
    """The different values, rising (numpy's own function imports masked arrays: 20 ms of a process)."""
    ordered = np.sort(values)
    different: Ints = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    return different


def resample(points: Ints, values: Floats, queries: ArrayLike) -> Floats:
    """Values at ``queries`` along the first axis of ``values``, shape (points, ...) → (queries, ...)."""
    low, high, weight = brackets(points, queries)
    weight = weight.reshape((-1,) + (1,) * (values.ndim - 1))
    result: Floats = (1.0 - weight) * values[low] + weight * values[high]
    wanted = np.asarray(queries, dtype=np.float64)
    if len(points) > 1 and (beyond := wanted > points[-1]).any():
        further = (wanted[beyond] - points[-1]).reshape((-1,) + (1,) * (values.ndim - 1))
        result[beyond] = values[-1] + further * slope_beyond(points, values)
    return result


@dataclass(slots=True, frozen=True)
class Curve:
    """One measured quantity over one axis: ``points`` rising (P,), ``values`` (P,) in µs."""

    points: Ints
    values: Floats

    @classmethod
    def from_rows(cls, points: Floats, values: Floats) -> Curve:
        """Sort unordered measurements along the axis."""
        order = np.argsort(points, kind="stable")
        return cls(points[order].astype(np.int64), values[order])

    def at(self, queries: ArrayLike) -> Floats:
        """Values at an array of queries, shape (Q,)."""
        wanted = np.atleast_1d(queries)
        values = resample(self.points, self.values, wanted)
        beyond = wanted > self.points[-1]
        return np.where(beyond, np.maximum(values, self.values[-1]), values) if beyond.any() else values

    def rising(self, end: int) -> Curve:
        """The curve with every value up to the point ``end`` at most that of any point between them."""
        values = self.values.copy()
        first = int(np.searchsorted(self.points, end, side="right"))
        values[:first] = np.minimum.accumulate(values[:first][::-1])[::-1]
        return Curve(self.points, values)


@dataclass(slots=True, frozen=True)
class Surface:
    """A dense tensor of µs on the grid spanned by ``axes`` (each rising, 1-D)."""

    axes: tuple[Ints, ...]
    tensor: Floats

    def at(self, *coordinates: ArrayLike) -> Floats:
        """Values at Q points, one (Q,) array per axis."""
        asked = [np.atleast_1d(x) for x in coordinates]
        ends = [axis[-1] if len(axis) > 1 else np.inf for axis in self.axes]
        beyond = np.logical_or.reduce([x > end for x, end in zip(asked, ends, strict=True)])
        if not beyond.any():
            return self._inside(asked)
        edge = self._inside([np.minimum(x, end) for x, end in zip(asked, ends, strict=True)])
        return np.where(beyond, np.maximum(self.extended()._inside(asked), edge), edge)

    def extended(self) -> Surface:
        """With one more point on every axis of two and more, twice as far out as the last: lookups beyond the
        last go along the line through both."""
        axes, tensor = list(self.axes), self.tensor
        for level, axis in enumerate(axes):
            if len(axis) > 1:
                axes[level] = np.append(axis, 2 * axis[-1])
                values = resample(axis, np.moveaxis(tensor, level, 0), axes[level])
                tensor = np.moveaxis(values, 0, level)
        return Surface(tuple(axes), tensor)

    def _inside(self, coordinates: Sequence[NDArray[Any]]) -> Floats:
        """Weighted sums over the corners of the cells."""
        sides = [brackets(axis, x) for axis, x in zip(self.axes, coordinates, strict=True)]
        total: Floats = np.zeros(())
        for corner in product((0, 1), repeat=len(sides)):
            weight: Floats = np.ones(())
            for high, (_, _, w) in zip(corner, sides, strict=True):
                weight = weight * (w if high else 1.0 - w)
            total = (
                total + weight * self.tensor[tuple(s[high] for high, s in zip(corner, sides, strict=True))]
            )
        return total

    def on(self, axes: Sequence[ArrayLike]) -> Floats:
        """Values on the grid spanned by other axes, one axis after the other."""
        values = self.tensor
        for level, axis in enumerate(axes):
            moved = np.moveaxis(values, level, 0)
            values = np.moveaxis(resample(self.axes[level], moved, axis), 0, level)
        return values

    def along(self, axis: int, query: float) -> Surface:
        """The surface cut at ``query`` on one axis, which disappears."""
        values = resample(self.axes[axis], np.moveaxis(self.tensor, axis, 0), [query])[0]
        return Surface(self.axes[:axis] + self.axes[axis + 1 :], values)


def weighted_sum(parts: Sequence[tuple[Surface, float]]) -> Surface:
    """``Σ weight · surface`` on the union of their axes: a look-up in it is the sum of the look-ups.

    Below the first point of an axis a look-up holds still and beyond the last it goes on, as in each of them.
    """
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    count = len(parts[0][0].axes)
    axes = tuple(
        distinct(np.concatenate([surface.axes[level] for surface, _ in parts])) for level in range(count)
    )
    total: Floats = np.zeros(tuple(len(axis) for axis in axes))
    for surface, weight in parts:
        total += weight * surface.on(axes)
    return Surface(axes, total)


def densify(keys: Ints, values: Floats) -> Surface:
    """Ragged measurements → the dense surface that equals their nested lookup.

    ``keys`` (R, A): the coordinates of R distinct measurements in nesting order, outermost axis first;
    ``values`` (R,). Works from the innermost axis outwards: all groups of rows that share their outer
    coordinates are resampled onto that axis' union grid, groups with the same points in one go.
    """
    order = np.lexsort(keys.T[::-1])
    keys, values = keys[order], values[order]
    axes = tuple(distinct(column) for column in keys.T)
    for level in range(keys.shape[1] - 1, -1, -1):
        outer, points = keys[:, :level], keys[:, level]
        starts = (
            np.flatnonzero(np.r_[True, (outer[1:] != outer[:-1]).any(axis=1)]) if level else np.array([0])
        )
        ends = np.r_[starts[1:], len(keys)]
        same_points: dict[bytes, list[int]] = {}
        for group, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            same_points.setdefault(points[start:end].tobytes(), []).append(group)
        grid = axes[level]
        dense = np.empty((len(starts), len(grid), *values.shape[1:]))
        for groups in same_points.values():
            first, last = starts[groups[0]], ends[groups[0]]
            rows = starts[groups][:, None] + np.arange(last - first)  # (groups, points)
            stacked = np.swapaxes(values[rows], 0, 1)  # (points, groups, ...)
            dense[groups] = np.swapaxes(resample(points[first:last], stacked, grid), 0, 1)
        keys, values = outer[starts], dense
    return Surface(axes, values[0])
