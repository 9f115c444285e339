"""Seeded noise on step times: what a run would have been had every step been a little faster or slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHIFT = 20
"""Factors are whole multiples of 2^-20, so that a last-bit difference between two machines cannot show."""
_HALF = 1 << (_SHIFT - 1)
_REST = (1 << _SHIFT) - 1
_CHUNK = 4096  # factors drawn at a time


def log_normal(sigma: float, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positive factors of mean 1 and relative deviation of about ``sigma``: ``exp(sigma z - sigma^2 / 2)``.

    Args:
        sigma: 0.01 keeps two factors in three within 1 % of 1.
        normal: standard normal numbers z, any shape.
    """
    factors: NDArray[np.float64] = np.exp(sigma * normal - sigma**2 / 2)
    return factors


class StepNoise:
    """One random factor for each step of one instance, a function of the seed and the step's number alone.

    However the steps are run, one by one or many at once, step ``i`` gets factor ``i``.
    """

    def __init__(self, sigma: float, seed: tuple[int, ...], common: float = 1.0) -> None:
        """
        Args:
            sigma: relative noise of one step, independent of the others; see :func:`log_normal`.
            seed: non-negative integers.
            common: a factor that all steps share.
        """
        self._common = common
        self._sigma = sigma
        self._rng = np.random.default_rng(seed)
        self._factors = np.empty(0, dtype=np.int64)

    def factors(self, first: int, count: int) -> NDArray[np.int64]:
        """Factors of the steps from ``first`` on in units of 2^-20, shape (count,)."""
        while len(self._factors) < first + count:
            normal = self._rng.standard_normal(_CHUNK)
            drawn = log_normal(self._sigma, normal) * self._common
            units = np.rint(drawn * (1 << _SHIFT)).astype(np.int64)
            self._factors = np.concatenate((self._factors, units))
        return self._factors[first : first + count]

    def step_ns(self, step: int, duration_ns: int, mixed: bool = False) -> int:  # noqa: ARG002 - as StepShift
        """The duration of one step with its noise."""
        return (duration_ns * int(self.factors(step, 1)[0]) + _HALF) >> _SHIFT

    def run_ns(self, first: int, durations_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The durations of consecutive steps with their noise; element i equals ``step_ns(first + i, …)``."""
        factors = self.factors(first, len(durations_ns))
        # in two parts, since the product with a duration of some hours does not fit 64 bits
        units, rest = durations_ns >> _SHIFT, durations_ns & _REST
        return units * factors + ((rest * factors + _HALF) >> _SHIFT)


class StepShift:
    """Every step a little longer, or shorter, than its kernel times say: what a run would be if they err."""

    def __init__(self, prefill: float, decode: float) -> None:
        """
        Args:
            prefill: factor of steps with a prefill chunk.
            decode: factor of steps that only decode.
        """
        self._prefill, self._decode = prefill, decode

    def step_ns(self, step: int, duration_ns: int, mixed: bool = False) -> int:  # noqa: ARG002 - as StepNoise
        """The duration of one step; ``mixed``: it has a prefill chunk."""
        return max(round(duration_ns * (self._prefill if mixed else self._decode)), 1)

    def run_ns(self, first: int, durations_ns: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG002 - likewise
        """The durations of consecutive steps that only decode."""
        shifted: NDArray[np.int64] = np.rint(durations_ns * self._decode).astype(np.int64)
        return np.maximum(shifted, 1)
