"""Measured times over (sequences, tokens of KV), and what every source of attention times can be asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from servesim.cost.beyond import slope_beyond

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


class AttentionKernels(Protocol):
    """Times of one layer's attention on one rank, in us."""

    @property
    def version(self) -> str:
        """Of vLLM, that the kernels were measured with."""

    @property
    def decode_kernels(self) -> list[str]: ...

    @property
    def prefill_kernels(self) -> list[str]: ...

    @property
    def longest_decode(self) -> int:
        """Tokens of KV of the longest decodes measured, whatever their number."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt measured."""

    @property
    def notes(self) -> list[str]:
        """What is not as measured, for meta.yaml."""

    def prefill_us(self, chunk: int, history: int) -> float:
        """A chunk whose tokens also attend to ``history`` tokens before it."""

    def decode_us(self, sequences: int, kv: int) -> float:
        """``sequences`` decodes with ``kv`` tokens in cache each."""

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        """Both in one step; either may be none."""


@dataclass(slots=True)
class DecodeGrid:
    """Times at (sequences, length), log-log bilinear between measured points, which are returned as they are.

    Beyond the largest batch of a length, and beyond the longest length, a time goes on with the rate that the
    points before tell (:func:`servesim.cost.beyond.slope_beyond`), beyond the longest length not at all if
    ``flat``. A module's time is mostly its weights, and a decode with an indexer reads no more than so many
    tokens: in proportion to batch or length they were 50 % too slow in the median where it was measured. Of a
    single batch size the time is in proportion.
    """

    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    us: Floats
    """(sizes, lengths); NaN where nothing was measured."""
    flat: bool = False
    _known: list[tuple[Floats, Floats]] = field(init=False)

    def __post_init__(self) -> None:
        self._known = []
        for column in range(len(self.lengths)):
            there = np.isfinite(self.us[:, column])
            self._known.append((self.sizes[there].astype(np.float64), self.us[there, column]))

    @classmethod
    def of_rows(
        cls, sizes: NDArray[np.int64], lengths: NDArray[np.int64], us: Floats, *, flat: bool = False
    ) -> DecodeGrid:
        """From unordered rows; of two kernels at one point the quicker one counts."""
        rows, columns = np.unique(sizes), np.unique(lengths)
        grid = np.full((len(rows), len(columns)), np.inf)
        np.minimum.at(grid, (np.searchsorted(rows, sizes), np.searchsorted(columns, lengths)), us)
        return cls(rows, columns, np.where(np.isfinite(grid), grid, np.nan), flat)

    def at(self, size: int, length: int) -> float:
        """us of ``size`` sequences of ``length`` tokens."""
        lengths = self.lengths
        if self.flat:  # many sequences were measured over short lengths alone, which says all there is to say
            reach = [last for last, (sizes, _) in zip(lengths, self._known, strict=True) if sizes[-1] >= size]
            length = min(length, int(reach[-1] if reach else lengths[0]))
        if length >= lengths[-1]:
            longest = self._at_size(len(lengths) - 1, size)
            further = length - int(lengths[-1])
            return longest if self.flat or not further else longest + self._token_us(size) * further
        if length <= lengths[0]:
            return self._at_size(0, size)
        above = int(np.searchsorted(lengths, length))
        high = self._at_size(above, size)
        if lengths[above] == length:
            return high
        low = self._at_size(above - 1, size)
        weight = math.log(length / lengths[above - 1]) / math.log(lengths[above] / lengths[above - 1])
        return float(low ** (1 - weight) * high**weight)

    def _token_us(self, size: int) -> float:
        """What ``size`` sequences take longer for every token beyond the longest length."""
        times = np.array([self._at_size(column, size) for column in range(len(self.lengths))])
        if len(times) == 1:
            return float(times[-1] / self.lengths[-1])
        return max(float(slope_beyond(self.lengths, times)), 0.0)

    def _at_size(self, column: int, size: int) -> float:
        sizes, times = self._known[column]
        if size > sizes[-1]:
            if len(sizes) == 1:
                return float(times[-1] * size / sizes[-1])
            slope = max(float(slope_beyond(sizes, times)), 0.0)
            return float(times[-1] + slope * (size - sizes[-1]))
        place = int(np.searchsorted(sizes, size))
        if sizes[place] == size:
            return float(times[place])
        return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(times))))


@dataclass(slots=True)
class Prompts:
    """Times of prompts without history, linear between the measured ones."""

    tokens: Floats
    us: Floats

    @classmethod
    def of_rows(cls, tokens: NDArray[np.int64], us: Floats) -> Prompts:
        """From unordered rows of one prompt each; of two kernels at one point the quicker one counts."""
        points, place = np.unique(tokens, return_inverse=True)
        least = np.full(len(points), np.inf)
        np.minimum.at(least, place, us)
        return cls(points.astype(np.float64), least)

    def at(self, chunk: int, *, squared: float = 1.0) -> float:
        """us of a chunk; beyond the longest prompt the last slope goes on, growing with ``squared`` (1: not).

        A quadratic goes on through the last three prompts.
        """
        tokens, us = self.tokens, self.us
        if chunk <= tokens[-1]:
            return float(np.interp(chunk, tokens, us))
        if squared and len(tokens) > 2:
            a, b = self.growth
            beyond = chunk - tokens[-1]
            return float(us[-1] + beyond * (a + 2 * b * tokens[-1]) + b * beyond**2)
        slope = (us[-1] - us[-2]) / (tokens[-1] - tokens[-2])
        return float(us[-1] + slope * (chunk - tokens[-1]))

    @property
    def growth(self) -> tuple[float, float]:
        """(us per token, us per squared token) of the parabola through the three longest prompts, neither
        below 0."""
        (x0, x1, x2), (y0, y1, y2) = self.tokens[-3:], self.us[-3:]
        first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        curve = max((second - first) / (x2 - x0), 0.0)
        return max(float(second - curve * (x1 + x2)), 0.0), float(curve)
