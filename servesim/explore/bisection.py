"""The largest load that passes a test: a bracket, then halves of it, on a logarithmic scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable


_STEEP = 10.0
"""From this ratio of the scores of both ends on, a line says little about where between them the edge is:
latencies hardly rise at first, and then all at once."""


@dataclass(slots=True, frozen=True)
class Range:
    """Where a search may look."""

    lowest: float
    highest: float
    precision: float
    """The search ends when the least load that fails is within this share above the largest that passes."""
    whole: bool = False
    """Whether loads are whole numbers."""

    def clamped(self, load: float) -> float:
        """The nearest load of the range."""
        inside = min(max(load, self.lowest), self.highest)
        return float(round(inside)) if self.whole else inside


@dataclass(slots=True, frozen=True)
class Edge:
    """What a search found."""

    passes: float | None
    """Largest load seen to pass; None: even the lowest fails."""
    fails: float | None
    """Least load above it seen to fail; None: even the highest passes."""

    @property
    def width(self) -> float:
        """By what share the load that fails is above the one that passes; 0 where one of them is missing."""
        return self.fails / self.passes - 1 if self.passes and self.fails else 0.0


def largest(
    score: Callable[[float], float],
    where: Range,
    first: float,
    factor: float,
    *,
    middle: float = 0.5,
    spent: Callable[[], bool] = lambda: False,
) -> Edge:
    """Search for the largest load that passes: whose score is at most 1.

    From ``first`` it goes up by ``factor`` while loads pass, or down while they fail: ever faster, unless
    what passes is dearer than what fails. Then it draws a line through the scores of both ends, on
    logarithmic scales, and tries where that reaches 1; where the scores are far apart or the last try did not
    halve the range, the middle itself. What passes is taken to pass everywhere below.

    Args:
        score: of a load; is asked about every load once at most.
        where: the range, both ends of which may be asked about.
        first: a guess.
        factor: of a step, above 1.
        middle: where a range is cut, from 0 to 1; above 0.5 where runs that pass are dearer than those that
            fail.
        spent: asked before a range is cut: whether the range has to do as it is.
    """
    load = where.clamped(first)
    low = high = 0.0  # 0: not found yet
    low_score = high_score = math.nan
    while not low or not high:
        found = score(load)
        if found <= 1:
            low, low_score = load, found
            if not high and load >= where.highest:
                return Edge(low, None)
            following = where.clamped(max(load * factor, load + where.whole))
        else:
            high, high_score = load, found
            if not low and load <= where.lowest:
                return Edge(None, high)
            following = where.clamped(min(load / factor, load - where.whole))
            if middle == 0.5:
                factor *= factor
        load = following
    halve = False
    while high > low * (1 + where.precision) and not spent():
        width = math.log(high / low)
        share = middle if halve else _share(low_score, high_score, where.precision / width, middle)
        load = low * math.exp(width * share)
        if where.whole:
            load = min(max(float(round(load)), low + 1), high - 1)
            if not low < load < high:
                break
        found = score(load)
        if found <= 1:
            low, low_score = load, found
        else:
            high, high_score = load, found
        halve = math.log(high / low) > width / 2
    return Edge(low, high)


def _share(low_score: float, high_score: float, precision: float, middle: float) -> float:
    """Where between both ends, from 0 to 1, the score is expected to reach 1; ``middle`` if that is open.

    A little is added towards the farther end, so that the next one may close the bracket.
    """
    if not (0 < low_score <= 1 < high_score < _STEEP * low_score):
        return middle
    crossing = -math.log(low_score) / math.log(high_score / low_score)
    nudge = min(precision * 0.45, 0.25)
    return min(max(crossing + (nudge if crossing < 0.5 else -nudge), nudge), 1 - nudge)
