"""Attention times in the form the step timer asks for them: single points, thousands of times a run.

Beyond the measured grid a lookup goes on as :mod:`servesim.cost.beyond` says, but never below the time at the
grid's edge: noise must not turn into negative time far out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

import numpy as np

from servesim.cost.beyond import ChunkGrowth, chunk_growth, slope_beyond
from servesim.cost.bracket import bracket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.skew import SkewTable
    from servesim.cost.tables import Surface


_NO_FRACTIONS: Final = 6755399441055744.0  # 1.5 * 2**52
"""Floats of this size are whole numbers: what is added to one is rounded, halves to even."""
_FEW_ENOUGH: Final = 2251799813685248.0  # 2**51


def whole_ns(ns: float) -> int:
    """``max(round(ns), 1)``, by two additions where that is the same."""
    whole = int(ns + _NO_FRACTIONS - _NO_FRACTIONS) if ns < _FEW_ENOUGH else round(ns)
    return whole if whole > 0 else 1


def together(chunks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """All tokens and all history of the chunks of a step."""
    tokens = histories = 0
    for chunk, history in chunks:
        tokens += chunk
        histories += history
    return tokens, histories


class DecodeRow:
    """Steps of one number of decodes and nothing else: ns over KV length, everything but skew included.

    Segment i covers KV lengths from ``points[i - 1]`` up to ``points[i]`` and is the line of ``slopes[i]``
    through (``anchors[i]``, ``values[i]``); segment 0 lies below the grid and is flat, the last one is open.
    """

    __slots__ = ("alpha", "anchors", "floor_ns", "length_bounds", "points", "rate_bounds", "slopes", "values")

    def __init__(
        self,
        points: list[int],
        anchors: list[int],
        values: list[float],
        slopes: list[float],
        rate_bounds: list[float],
        length_bounds: list[float],
        alpha: list[list[float]] | None,
    ) -> None:
        self.points = points
        self.anchors = anchors
        self.values = values
        self.slopes = slopes
        self.rate_bounds = rate_bounds
        self.length_bounds = length_bounds
        self.alpha = alpha
        """α by (skew rate, greatest KV length) bucket; None: lengths make no difference."""
        self.floor_ns = 0.0
        """Least time that :meth:`add_ends` gives a step."""

    @classmethod
    def through(
        cls, points: list[int], values: list[float], skew: SkewTable | None, decodes: int
    ) -> DecodeRow:
        """The row through measured (KV length, ns) points."""
        slopes = [
            (b - a) / (q - p) for p, q, a, b in zip(points, points[1:], values, values[1:], strict=False)
        ]
        beyond = max(float(slope_beyond(np.array(points), np.array(values))), 0.0) if slopes else 0.0
        rates, lengths, alpha = (
            skew.for_decodes(decodes) if skew is not None and decodes > 1 else ([], [], None)
        )
        return cls(
            points, [points[0], *points], [values[0], *values], [0.0, *slopes, beyond], rates, lengths, alpha
        )

    def wait(self, floor_ns: float) -> None:
        """Let no step of :meth:`add_ends` take less."""
        self.floor_ns = floor_ns

    def ns(self, kv_length: int) -> float:
        """ns of a step whose decodes all have this KV length."""
        i = bisect_right(self.points, kv_length)
        return self.values[i] + self.slopes[i] * (kv_length - self.anchors[i])

    def unequal_ns(self, mean: int, kv_min: int, kv_max: int) -> float:
        """ns of a step whose decodes have this mean, least and greatest KV length.

        α of the way from equal lengths to all as long as the longest; a table that finds longer sequences no
        slower leaves nothing to share out, and a wild α never makes a step faster than its shortest decode.
        """
        points = self.points
        i = bisect_right(points, mean)
        ns = self.values[i] + self.slopes[i] * (mean - self.anchors[i])
        if mean == kv_max or self.alpha is None:
            return ns
        i = bisect_right(points, kv_max)
        longest = self.values[i] + self.slopes[i] * (kv_max - self.anchors[i])
        if longest <= ns:
            return ns
        rate = bisect_left(self.rate_bounds, (mean - kv_min) / (kv_max - kv_min))
        alpha = self.alpha[rate][bisect_left(self.length_bounds, kv_max)]
        skewed = ns + alpha * (longest - ns)
        return skewed if alpha >= 0.0 else max(skewed, min(self.ns(kv_min), ns))

    def add_ends(
        self, ends_ns: list[int], mean: int, kv_min: int, kv_max: int, steps: int, depth: int, until_ns: int
    ) -> None:
        """Add to ``ends_ns`` the ends of steps that follow each other from its last entry on.

        Each takes what :meth:`unequal_ns` says, but no less than :attr:`floor_ns`, rounded, and all lengths
        grow by one a step. Between two measured lengths, for the mean as for the greatest, and in one bucket
        of α, that is a line, which is looked up once: at most ``steps`` steps are added, those that lie on
        the first line. After the first of them, none is added that is scheduled at ``until_ns`` or later:
        when the step ``depth`` before it ends.
        """
        points, alpha = self.points, 0.0
        i = j = bisect_right(points, mean)
        if i < len(points):
            steps = min(steps, points[i] - mean)
        if mean != kv_max and self.alpha is not None:
            j, bucket = bisect_right(points, kv_max), bisect_left(self.length_bounds, kv_max)
            if j < len(points):
                steps = min(steps, points[j] - kv_max)
            alpha = self.alpha[bisect_left(self.rate_bounds, (mean - kv_min) / (kv_max - kv_min))][bucket]
            if alpha < 0.0 or bucket != bisect_left(self.length_bounds, kv_max + steps - 1):
                steps = 1
        value, slope, at = self.values[i], self.slopes[i], mean - self.anchors[i]
        most, rise, top = self.values[j], self.slopes[j], kv_max - self.anchors[j]
        shortest = self.ns(kv_min) if alpha < 0.0 else 0.0
        floor_ns, end_ns = self.floor_ns, ends_ns[-1]
        for step in range(steps):
            ns = value + slope * (at + step)
            if alpha:
                longest = most + rise * (top + step)
                if longest > ns:
                    skewed = ns + alpha * (longest - ns)
                    ns = skewed if alpha > 0.0 else max(skewed, min(shortest, ns))
            end_ns += whole_ns(ns if ns > floor_ns else floor_ns)
            ends_ns.append(end_ns)
            if ends_ns[-depth] >= until_ns:
                return

    def growing_ns(self, kv_length: int, steps: int) -> NDArray[np.float64]:
        """:meth:`ns` of ``kv_length``, ``kv_length + 1``, …, shape (steps,); the same floats."""
        growth = np.arange(steps, dtype=np.float64)
        first = bisect_right(self.points, kv_length)
        if first == bisect_right(self.points, kv_length + steps - 1):
            line: NDArray[np.float64] = self.slopes[first] * (growth + (kv_length - self.anchors[first]))
            return self.values[first] + line
        lengths = growth + kv_length
        i = np.searchsorted(self.points, lengths, side="right")
        values, slopes, anchors = np.array(self.values), np.array(self.slopes), np.array(self.anchors)
        result: NDArray[np.float64] = values[i] + slopes[i] * (lengths - anchors[i])
        return result


class DecodeCorners:
    """The four (n_decode, kv_decode) corners around the decodes of a step, with weights."""

    __slots__ = ("_further", "beyond", "decodes", "kv_length", "offsets", "weights")

    def __init__(
        self,
        decodes: int,
        kv_length: int,
        offsets: tuple[int, int, int, int],
        weights: tuple[float, float, float, float],
        beyond: bool,
    ) -> None:
        self.decodes = decodes
        self.kv_length = kv_length
        self.offsets = offsets
        self.weights = weights
        self.beyond = beyond
        """Whether they lie beyond the grid; offsets and weights are then those of its edge."""
        self._further: DecodeCorners | None = None

    def further(self, tensor: AttentionTensor) -> DecodeCorners:
        """The same in the one tensor that goes further."""
        if self._further is None:
            self._further = tensor.corners(self.decodes, self.kv_length)
        return self._further


_NO_END: Final = 1 << 60


class AttentionTensor:
    """A bundle's attention times (µs) as one flat list, for lookups of single points."""

    __slots__ = (
        "_beside",
        "_cells",
        "_chunk_stride",
        "_chunks",
        "_ends",
        "_further",
        "_growth",
        "_histories",
        "_history_end",
        "_history_stride",
        "_last_chunk",
        "_lengths",
        "_n_stride",
        "_ns",
        "_plane",
        "_surface",
        "smallest_chunk",
    )

    def __init__(self, surface: Surface, *, endless: bool = False) -> None:
        """``endless``: a surface whose last interval goes on on every axis (:meth:`Surface.extended`)."""
        self._surface = surface
        axes: list[list[int]] = [axis.tolist() for axis in surface.axes]
        self._chunks, self._ns, self._histories, self._lengths = axes
        ends = [axis[-1] if len(axis) > 1 and not endless else _NO_END for axis in
                (self._chunks, self._ns, self._histories, self._lengths)]  # fmt: skip
        self._last_chunk: int = ends[0]
        self._history_end: int = ends[2]
        self._ends: tuple[int, int] = (ends[1], ends[3])
        tensor = np.ascontiguousarray(surface.tensor)
        strides: list[int] = [stride // tensor.itemsize for stride in tensor.strides]
        self._chunk_stride, self._n_stride, self._history_stride, _ = strides
        self._cells: list[float] = tensor.ravel().tolist()
        self._further: AttentionTensor | None = None
        self._growth: ChunkGrowth | None = None
        self._beside: dict[int, tuple[int, int, float]] = {}
        """Decodes → where they lie on their axis: offsets of the points around, weight of the upper one."""
        self.smallest_chunk = self._chunks[bisect_right(self._chunks, 0)]
        """The smallest profiled prefill chunk."""
        self._plane = self._chunks.index(self.smallest_chunk) * self._chunk_stride
        """Offset of its times without history."""

    def largest(self) -> tuple[int, int, float]:
        """The largest profiled chunk, the longest history, and the µs of one block for both."""
        chunk, history = self._chunks[-1], self._histories[-1]
        return chunk, history, self.us(chunk, history, self.corners(0, 0))

    def corners(self, decodes: int, kv_length: int) -> DecodeCorners:
        """Where ``decodes`` decodes of ``kv_length`` lie in the tensor."""
        most, longest = self._ends
        at = min(decodes, most)
        low, high, n = self._beside.get(at) or self._place(at)
        k_low, k_high, k = bracket(self._lengths, min(kv_length, longest))
        m, j = 1.0 - n, 1.0 - k
        return DecodeCorners(
            decodes,
            kv_length,
            (low + k_low, low + k_high, high + k_low, high + k_high),
            (m * j, m * k, n * j, n * k),
            decodes > most or kv_length > longest,
        )

    def chunks_us(
        self, chunks: Sequence[tuple[int, int]], decodes: int, mean: int, *, at_once: bool
    ) -> float:
        """µs of one block's attention over all ``chunks`` (tokens, tokens in the cache before) of a step,
        beside ``decodes`` decodes of the mean KV length ``mean``.

        ``at_once``: as one chunk of all tokens and all history. Otherwise every chunk adds to the time of the
        decodes what it alone would add.
        """
        corners = self.corners(decodes, mean)
        if at_once or len(chunks) == 1:
            return self.us(*together(chunks), corners)
        us = base = self.base_us(decodes, corners)
        for chunk, history in chunks:
            us += self.us(chunk, history, corners) - base
        return us

    def base_us(self, decodes: int, corners: DecodeCorners) -> float:
        """µs of the decodes alone in a step that also prefills; 0 without decodes."""
        return self.us(self.smallest_chunk, 0, corners) if decodes else 0.0

    def us(self, chunk: int, history: int, corners: DecodeCorners) -> float:
        """µs of one block's attention over a chunk with history beside the decodes of ``corners``."""
        if corners.beyond or chunk > self._last_chunk or history > self._history_end:
            edge = self._inside_us(min(chunk, self._last_chunk), min(history, self._history_end), corners)
            return max(self._beyond_us(chunk, history, corners), edge)
        return self._inside_us(chunk, history, corners)

    def _inside_us(self, chunk: int, history: int, corners: DecodeCorners) -> float:
        c_low, c_high, c = bracket(self._chunks, chunk)
        h_low, h_high, h = bracket(self._histories, history)
        o0, o1, o2, o3 = corners.offsets
        w0, w1, w2, w3 = corners.weights
        cells = self._cells
        # Four corners in (n_decode, kv_decode) at each of four in (chunk, history), less those of weight 0.
        h_low, h_high = h_low * self._history_stride, h_high * self._history_stride
        o = c_low * self._chunk_stride + h_low
        total = w0 * cells[o + o0] + w1 * cells[o + o1] + w2 * cells[o + o2] + w3 * cells[o + o3]
        if h:
            o += h_high - h_low
            more = w0 * cells[o + o0] + w1 * cells[o + o1] + w2 * cells[o + o2] + w3 * cells[o + o3]
            total = (1.0 - h) * total + h * more
        if c:
            o = c_high * self._chunk_stride + h_low
            upper = w0 * cells[o + o0] + w1 * cells[o + o1] + w2 * cells[o + o2] + w3 * cells[o + o3]
            if h:
                o += h_high - h_low
                more = w0 * cells[o + o0] + w1 * cells[o + o1] + w2 * cells[o + o2] + w3 * cells[o + o3]
                upper = (1.0 - h) * upper + h * more
            total = (1.0 - c) * total + c * upper
        return total

    def _beyond_us(self, chunk: int, history: int, corners: DecodeCorners) -> float:
        """Beyond the end of some axis: lines go on, and a chunk with its tokens and pairs."""
        if self._further is None:
            self._further = AttentionTensor(self._surface.extended(), endless=True)
        us = self._further._inside_us(min(chunk, self._last_chunk), history, corners.further(self._further))
        return us if chunk <= self._last_chunk else us + self.growth.us(chunk, history, self._last_chunk)

    @property
    def growth(self) -> ChunkGrowth:
        """What a chunk beyond the largest takes more."""
        if self._growth is None:
            alone = self._surface.along(3, 0).along(1, 0)  # (chunk, history)
            first = bisect_right(self._chunks, 0)
            self._growth = chunk_growth(alone.axes[0][first:], alone.axes[1], alone.tensor[first:])
        return self._growth

    def tail_us(self, decodes: int, mean: int, kv_max: int) -> float:
        """µs that one block waits for the longest of ``decodes`` > 1 decodes; see
        :meth:`servesim.cost.attention.FullAttention.tail_us`."""
        longest, all_longest = self._decodes_us(decodes, kv_max)
        equal, all_equal = self._decodes_us(decodes, mean)
        if longest <= equal:
            return 0.0
        half, more = 0.5 * (longest - equal), all_longest - all_equal
        if half <= more:
            return half
        return more if more > 0.0 else 0.0

    def _decodes_us(self, decodes: int, kv_length: int) -> tuple[float, float]:
        """µs of the smallest chunk without history beside one decode, and beside ``decodes``, of this length.

        Such a chunk lies on points of its two axes, so that :meth:`us` is one weighted sum of four corners in
        (n_decode, kv_decode): that sum is made here, in the same order, without the objects on the way to it.
        What lies beyond the grid is left to :meth:`us`.
        """
        lengths, cells, plane = self._lengths, self._cells, self._plane
        low_1, high_1, n_1 = self._beside.get(1) or self._place(1)
        low, high, n = self._beside.get(decodes) or self._place(decodes)
        above = bisect_right(lengths, kv_length)
        if n > 1.0 or n_1 > 1.0 or not 0 < above < len(lengths):
            chunk = self.smallest_chunk
            alone, together = self.corners(1, kv_length), self.corners(decodes, kv_length)
            return self.us(chunk, 0, alone), self.us(chunk, 0, together)
        k = (kv_length - lengths[above - 1]) / (lengths[above] - lengths[above - 1])
        above += plane
        below = above - 1
        j, m, m_1 = 1.0 - k, 1.0 - n, 1.0 - n_1
        return (
            m_1 * j * cells[low_1 + below]
            + m_1 * k * cells[low_1 + above]
            + n_1 * j * cells[high_1 + below]
            + n_1 * k * cells[high_1 + above]
        ), (
            m * j * cells[low + below]
            + m * k * cells[low + above]
            + n * j * cells[high + below]
            + n * k * cells[high + above]
        )

    def _place(self, decodes: int) -> tuple[int, int, float]:
        """See :attr:`_beside`."""
        low, high, weight = bracket(self._ns, decodes)
        place = low * self._n_stride, high * self._n_stride, weight
        self._beside[decodes] = place
        return place
