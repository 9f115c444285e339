"""Exact means and percentiles, of plain samples and of values with multiplicities."""

from __future__ import annotations

import math
from array import array
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.results.columns import PACKED
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from servesim.results.columns import Column
    from servesim.results.request_log import RequestLog
    from servesim.results.request_record import RequestRecord

    Integers = NDArray[np.signedinteger[Any]]

PERCENTILES = (50, 90, 95, 99)
_SORTED = 1 << 12
"""Values that are sorted as they are."""
_BINS = 1 << 14
_PART = 1 << 20
"""Values that are computed with at once."""


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


def exact_sum(values: Integers, counts: Integers | None = None) -> int:
    """Sum of ``values``, or of ``values * counts``: exact, so the same on every machine, and of any size.

    Sums of times in ns do not fit 64 bits for long: 60,000 requests that wait a hundred days are too much.
    """
    if len(values) > _PART:  # a part at a time, so that nothing as large is copied
        parts = [slice(at, at + _PART) for at in range(0, len(values), _PART)]
        return sum(exact_sum(values[part], None if counts is None else counts[part]) for part in parts)
    if not len(values):
        return 0
    most = float(max(int(values.max()), -int(values.min()))) * len(values)
    if counts is not None:
        most *= float(counts.max())
    if most < 2.0**62:
        wide = values.astype(np.int64)
        return int(wide.sum() if counts is None else np.dot(wide, counts.astype(np.int64)))
    listed: list[int] = values.tolist()
    return sum(listed) if counts is None else sum(map(mul, listed, counts.tolist()))


def weighted_percentiles(values: Integers, counts: Integers, percents: Sequence[float]) -> list[float]:
    """Percentiles of the sample in which ``values[i]`` occurs ``counts[i]`` times.

    The sample is never written out: equal to ``np.percentile(np.repeat(values, counts), percents)`` (linear
    interpolation between the neighbouring order statistics), in time O(values).

    Args:
        values: shape (n,), any order.
        counts: shape (n,), non-negative; their sum must be positive.
        percents: 0 to 100.
    """
    total = int(counts.sum())
    results = []
    for percent in percents:
        rank = percent / 100 * (total - 1)
        below = math.floor(rank)
        low, high = (_at_rank(values, counts, at) for at in (below, min(below + 1, total - 1)))
        results.append(low + (high - low) * (rank - below))
    return results


def _at_rank(values: Integers, counts: Integers, rank: int) -> int:
    """The value at ``rank`` (from 0) of the ordered sample.

    Values are counted into bins, and those of the bin with the rank are looked at again: so nothing as large
    as the sample is sorted or copied.
    """
    while len(values) > _SORTED:
        least = int(values.min())
        width = (int(values.max()) - least) // _BINS + 1
        held = np.zeros(_BINS, dtype=np.int64)
        for start in range(0, len(values), _BINS):
            part = slice(start, start + _BINS)
            bins = (values[part] - least) // width
            # sums of whole numbers below 2^53 are exact in floating point
            held += np.bincount(bins, weights=counts[part], minlength=_BINS).astype(np.int64)
        below = np.cumsum(held)
        place = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[place - 1]) if place else 0
        least += place * width
        inside = (values >= least) & (values < least + width)
        values, counts = values[inside], counts[inside]
        if width == 1:
            return least
    order = np.argsort(values, kind="stable")
    last_rank = np.cumsum(counts[order])  # ranks below last_rank[i] hold a value <= that of order[i]
    return int(values[order[np.searchsorted(last_rank, rank, side="right")]])


def describe(values: Integers, counts: Integers | None = None) -> Distribution:
    """Mean, standard deviation, percentiles and maximum of integer times in ns.

    Args:
        values: shape (n,).
        counts: multiplicity of each value, shape (n,); None: each occurs once.
    """
    if counts is None:
        counts = np.ones(len(values), dtype=np.int64)
    elif not counts.all():
        present = counts > 0
        values, counts = values[present], counts[present]
    total = int(counts.sum())
    if total == 0:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    mean = exact_sum(values, counts) / total
    squares = 0.0
    for at in range(0, len(values), _PART):
        part = slice(at, at + _PART)
        squares += float((counts[part] * (values[part] - mean) ** 2).sum())
    variance = squares / total
    median, p90, p95, p99 = weighted_percentiles(values, counts, PERCENTILES)
    return Distribution(total, mean, math.sqrt(variance), median, p90, p95, p99, int(values.max()))


def _differences(times: Column) -> Integers:
    """Those between neighbours, shape (n - 1,), in 32 bits if they fit."""
    found = np.empty(max(len(times) - 1, 0), dtype=np.int32)
    for at in range(0, len(found), _PART):
        part = np.diff(times.between(at, min(at + _PART, len(found)) + 1))
        if part.max() > np.iinfo(np.int32).max:
            return np.diff(times.array())
        found[at : at + len(part)] = part
    return found


def _that_occur(values: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Values and counts without those that are counted 0 times, moved together in place."""
    kept = 0
    for at in range(0, len(values), _PART):
        part = slice(at, at + _PART)
        present = counts[part] > 0
        more = int(np.count_nonzero(present))
        values[kept : kept + more] = values[part][present]
        counts[kept : kept + more] = counts[part][present]
        kept += more
    return values[:kept], counts[:kept]


@dataclass(slots=True)
class TokenGaps:
    """Token times of a run and the runs of entries of every request."""

    tracks: list[Column]
    """Per track of the run log: token times in ns."""
    records: RequestLog

    def tokens(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Tokens generated by requests ``start`` to ``stop - 1``, by all by default."""
        records, later = self.records, self.records.later_runs
        end = len(records) if stop is None else min(stop, len(records))
        tracks, first, last = records.runs(start, end)
        tokens = np.where(tracks >= 0, last - first + 1, 0) + records.column("extra_tokens", start, end)
        rows = later if end - start == len(records) else [row for row in range(start, end) if row in later]
        for row in rows:
            tokens[row - start] += sum(end - begin + 1 for _, begin, end in later[row])
        return tokens

    def of(self, record: RequestRecord) -> NDArray[np.int64]:
        """Gaps between successive tokens of one request in ns, shape (tokens - 1,)."""
        times = [self.tracks[track].between(first, last + 1) for track, first, last in record.token_steps]
        if not times:
            return np.empty(0, dtype=np.int64)
        every = np.concatenate(times)
        return every[1:] - every[:-1]

    def histogram(self) -> tuple[Integers, Integers]:
        """All gaps of all requests as (values in ns, how often each occurs, at least once); a value may be
        listed twice.

        O(steps + requests): a run over steps first..last adds one to the multiplicity of the gaps that end at
        steps first+1..last, which is two entries of a difference array.
        """
        on, firsts, lasts = self.records.runs()
        more: list[tuple[list[int], list[int]]] = [([], []) for _ in self.tracks]
        between: list[int] = []
        for row, later in self.records.later_runs.items():
            previous, last = int(on[row]), int(lasts[row])
            for track, start, end in later:
                between.append(self.tracks[track][start] - self.tracks[previous][last])
                more[track][0].append(start)
                more[track][1].append(end)
                previous, last = track, end
        values: list[Integers] = []
        counts: list[Integers] = []
        for track, (ends, (starts, stops)) in enumerate(zip(self.tracks, more, strict=True)):
            here = on == track
            occurs = np.zeros(len(ends) + 1, dtype=np.int32)
            for change, first_runs, later_runs in ((1, firsts, starts), (-1, lasts, stops)):
                np.add.at(occurs, first_runs[here] + 1, change)
                np.add.at(occurs, np.array(later_runs, dtype=np.int64) + 1, change)
            occurs = np.cumsum(occurs, dtype=np.int32, out=occurs)[1:-1]
            gaps, occurs = _that_occur(_differences(ends), occurs)
            counts.append(occurs)
            values.append(gaps)
        if between:
            values.append(np.array(between, dtype=np.int64))
            counts.append(np.ones(len(between), dtype=np.int64))
        if len(values) == 1:
            return values[0], counts[0]
        return np.concatenate(values), np.concatenate(counts)


class GapText:
    """The gaps of a request as the text ``[7780422, 7779379]``, at the price of copying that text.

    The gaps of an instance's steps are rendered once, :data:`~servesim.results.columns.PACKED` at a time; the
    list of a run of steps is cut out of them.
    """

    __slots__ = ("_ends", "_parts")

    def __init__(self, gaps: TokenGaps) -> None:
        self._ends = gaps.tracks
        self._parts: list[dict[int, tuple[str, array[int]]]] = [{} for _ in gaps.tracks]
        """Per track: number of a part -> its text, and where in it each gap begins."""

    def of(self, record: RequestRecord) -> str:
        """The record's list of inter-token latencies in ns."""
        parts: list[str] = []
        previous_end: int | None = None
        for track, first, last in record.token_steps:
            ends = self._ends[track]
            if previous_end is not None:
                parts.append(str(ends[first] - previous_end))
            if last > first:
                parts += self._between(track, first + 1, last)
            previous_end = ends[last]
        return f"[{', '.join(parts)}]"

    def _between(self, track: int, first: int, last: int) -> Iterator[str]:
        """The gaps that end entries ``first`` to ``last`` of a track."""
        while first <= last:
            number, place = divmod(first, PACKED)
            text, begins = self._parts[track].get(number) or self._render(track, number)
            behind = min(place + last - first + 1, PACKED)
            yield text[begins[place] : begins[behind] - 2]
            first += behind - place

    def _render(self, track: int, number: int) -> tuple[str, array[int]]:
        ends, start = self._ends[track], number * PACKED
        times = ends.between(max(start - 1, 0), min(start + PACKED, len(ends)))
        gaps = [str(gap) for gap in (np.diff(times) if start else np.diff(times, prepend=0)).tolist()]
        begins = array("i", accumulate((len(gap) + 2 for gap in gaps), initial=0))
        self._parts[track][number] = found = ", ".join(gaps), begins
        return found
