"""Distributions written as text, such as ``lognormal:600:500:16:4000``, for lengths and durations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST = 2**31 - 1  # a lognormal one has no upper bound of its own
FORMS = "fixed:VALUE, uniform:LOW:HIGH or lognormal:MEAN:STD[:MIN:MAX]"


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution of non-negative numbers, cut off to [low, high].

    `mean` and `std` are those of the numbers themselves, not of their logarithms, and before the cut.
    """

    kind: str
    mean: float
    std: float
    low: float
    high: float

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`count` independent numbers."""
        if self.kind == "fixed":
            return np.full(count, self.mean)
        if self.kind == "uniform":
            return self.low + (self.high - self.low) * rng.random(count)
        # a lognormal of mean m and deviation s: sigma² = ln(1 + s²/m²), mu = ln m - sigma²/2
        sigma2 = math.log1p((self.std / self.mean) ** 2)
        drawn = np.exp(math.log(self.mean) - sigma2 / 2 + math.sqrt(sigma2) * normal(count, rng))
        clipped: NDArray[np.float64] = np.clip(drawn, self.low, self.high)
        return clipped

    def draw_whole(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` independent integers; a uniform one takes both ends equally often."""
        if self.kind == "uniform":
            low, high = math.ceil(self.low), math.floor(self.high)
            return low + whole_below(high - low + 1, count, rng)
        return np.rint(np.minimum(self.draw(count, rng), _MOST)).astype(np.int64)


def parse_distribution(words: str, what: str, *, whole: bool = True, least: float = 1) -> Distribution:
    """The distribution that `words` describe; `what` (``--input-len``) names it in InputErrors.

    Every number it can give is >= `least`; with `whole` the given values must be integers. A bare number is
    fixed.
    """
    kind, *figures = words.split(":") if ":" in words else ["fixed", words]
    values = [_number(figure, words, what) for figure in figures]
    match kind, values:
        case "fixed", [value]:
            found = Distribution(kind, value, 0.0, value, value)
        case "uniform", [low, high]:
            found = Distribution(kind, (low + high) / 2, 0.0, low, high)
        case "lognormal", [mean, std]:
            found = Distribution(kind, mean, std, least, math.inf)
        case "lognormal", [mean, std, low, high]:
            found = Distribution(kind, mean, std, low, high)
        case _:
            raise InputError(f"{what}: {words!r} is not a distribution; must be {FORMS}")
    bounds = [found.low] if found.high == math.inf else [found.low, found.high]
    if whole and any(bound != round(bound) for bound in bounds):
        raise InputError(f"{what}: {words!r} is not possible; its values must be integers")
    if found.low < least:
        raise InputError(f"{what}: {words!r} is not possible; no value may be below {least:g}")
    if found.low > found.high:
        raise InputError(f"{what}: {words!r} is not possible; the lower bound is above the upper one")
    if kind == "lognormal" and not (found.mean > 0 and found.std >= 0):
        raise InputError(f"{what}: {words!r} is not possible; the mean must be > 0 and the deviation >= 0")
    return found


def _number(figure: str, words: str, what: str) -> float:
    try:
        value = float(figure)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and abs(value) <= 2**31):
        raise InputError(f"{what}: {figure!r} in {words!r} is not a number up to {2**31}; must be {FORMS}")
    return value


def normal(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`count` standard normal numbers, by the Box-Muller transform.

    NumPy keeps the stream behind `random()` the same from version to version but not that of
    `standard_normal()`; a seed shall mean the same workload for good.
    """
    radius = np.sqrt(-2 * np.log1p(-rng.random(count)))
    numbers: NDArray[np.float64] = radius * np.cos(2 * np.pi * rng.random(count))
    return numbers


def whole_below(bound: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` independent integers in [0, bound), equally likely, from the same stream as `normal`."""
    return np.floor(rng.random(count) * bound).astype(np.int64)
