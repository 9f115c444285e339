"""Columns of a step log that keep only the steps that have something there."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from servesim.results.columns import PACKED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.results.columns import Column


class SparseColumn(Sequence[int]):
    """A number of every step, of which only those are kept that are not what they are expected to be: 0."""

    __slots__ = ("_rows", "_steps", "_values")

    def __init__(self, rows: Column) -> None:
        """``rows``: a column that has an entry for every step."""
        self._rows = rows
        self._steps = array("q")
        self._values = array("q")

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, step: int, value: int) -> None:
        """Set the number of a step; steps mostly come in order."""
        steps, values = self._steps, self._values
        if not steps or step > steps[-1]:
            steps.append(step)
            values.append(value)
            return
        place = bisect_left(steps, step)
        if steps[place] == step:
            values[place] = value
        else:
            steps.insert(place, step)
            values.insert(place, value)

    def _expected(self, step: int) -> int:
        del step
        return 0

    @overload
    def __getitem__(self, step: int) -> int: ...
    @overload
    def __getitem__(self, step: slice) -> list[int]: ...
    def __getitem__(self, step: int | slice) -> int | list[int]:
        if isinstance(step, slice):
            start, stop, stride = step.indices(len(self))
            if stride != 1:
                return [self[at] for at in range(start, stop, stride)]
            found: list[int] = self.between(start, stop).tolist()
            return found
        wanted = step if step >= 0 else step + len(self)
        if not 0 <= wanted < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        place = bisect_left(self._steps, wanted)
        if place < len(self._steps) and self._steps[place] == wanted:
            return self._values[place]
        return self._expected(wanted)

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), PACKED):
            yield from self.between(start, min(start + PACKED, len(self))).tolist()

    def total(self, start: int = 0, stop: int | None = None) -> int:
        """The sum of the steps from ``start`` to ``stop - 1``, of all by default; costs what is kept of
        them."""
        steps = self._steps
        end = len(steps) if stop is None else bisect_left(steps, stop)
        return sum(self._values[bisect_left(steps, start) : end])

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Steps ``start`` to ``stop - 1``, as far as there are any."""
        stop = min(stop, len(self))
        found = self._all_expected(start, stop)
        kept = slice(bisect_left(self._steps, start), bisect_left(self._steps, stop))
        steps = np.array(self._steps[kept], dtype=np.int64)
        found[steps - start] = np.array(self._values[kept], dtype=np.int64)
        return found

    def array(self) -> NDArray[np.int64]:
        """All steps, shape (steps,)."""
        return self.between(0, len(self))

    def most(self) -> int:
        """The largest number, 0 at least."""
        return max(self._values, default=0)

    def _all_expected(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.zeros(max(stop - start, 0), dtype=np.int64)


class StartColumn(SparseColumn):
    """When every step started: at the end of the one before, unless it is kept."""

    __slots__ = ()

    def _expected(self, step: int) -> int:
        return self._rows[step - 1] if step else 0

    def _all_expected(self, start: int, stop: int) -> NDArray[np.int64]:
        if start:
            return self._rows.between(start - 1, stop - 1)
        every = np.zeros(max(stop, 0), dtype=np.int64)
        every[1:] = self._rows.between(0, stop - 1)
        return every

    def total(self, start: int = 0, stop: int | None = None) -> int:
        """The sum of the steps from ``start`` to ``stop - 1``, of all by default."""
        end = len(self) if stop is None else min(stop, len(self))
        return sum(sum(self.between(at, min(at + PACKED, end)).tolist()) for at in range(start, end, PACKED))

    def most(self) -> int:
        """The latest start."""
        return self[-1] if len(self) else 0
