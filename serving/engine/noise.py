"""Seeded noise on step times: what a run would have been had every step been a little faster or slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHIFT = 20
"""Factors are whole multiples of 2^-20, so that a last-bit difference between two machines cannot show."""
_HALF = 1 << (_SHIFT - 1)
_CHUNK = 4096  # factors drawn at a time


class StepNoise:
    """One random factor for each step of one instance, a function of the seed and the step's number alone.

    Factors are log-normal with mean 1: ``exp(sigma z - sigma^2 / 2)``, z standard normal. However the steps
    are run, one by one or many at once, step ``i`` gets factor ``i``.
    """

    def __init__(self, sigma: float, seed: tuple[int, ...]) -> None:
        """
        Args:
            sigma: relative noise of one step; 0.01 keeps two steps in three within 1 %.
            seed: non-negative integers.
        """
        self._sigma = sigma
        self._rng = np.random.default_rng(seed)
        self._factors = np.empty(0, dtype=np.int64)

    def factors(self, first: int, count: int) -> NDArray[np.int64]:
        """Factors of the steps from ``first`` on in units of 2^-20, shape (count,)."""
        while len(self._factors) < first + count:
            normal = self._rng.standard_normal(_CHUNK)
            drawn = np.exp(self._sigma * normal - self._sigma**2 / 2)
            units = np.rint(drawn * (1 << _SHIFT)).astype(np.int64)
            self._factors = np.concatenate((self._factors, units))
        return self._factors[first : first + count]

    def step_ns(self, step: int, duration_ns: int) -> int:
        """The duration of one step with its noise."""
        return (duration_ns * int(self.factors(step, 1)[0]) + _HALF) >> _SHIFT

    def run_ns(self, first: int, durations_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The durations of consecutive steps with their noise; element i equals ``step_ns(first + i, …)``."""
        factors = self.factors(first, len(durations_ns))
        return (durations_ns * factors + _HALF) >> _SHIFT
