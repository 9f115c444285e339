"""The log of an instance's steps: a row a step, in columns that take what their values need.

A long run has tens of millions of steps, and most columns are 0 in nearly all of them. So times and the
counts that every step has are packed (:class:`~servesim.results.columns.Column`), and of the other columns
only the steps are kept that have something there. A step mostly starts when the one before ends: only the
other starts are kept.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, overload

import numpy as np

from servesim.results.columns import PACKED, Column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


_AT_ONCE = 1 << 16
"""Steps that are computed with at once."""


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


class StepLog:
    """One row per engine step of one instance."""

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "start_ns",
        "end_ns",
        "prefill_tokens",  # tokens of chunks (more than one scheduled token)
        "decode_tokens",  # sequences with exactly one scheduled token
        "running",  # running requests while the step runs
        "waiting",  # requests queued while the step runs
        "kv_blocks_used",
        "preempted",  # requests preempted while the step was scheduled
        "hit_tokens",  # prompt tokens found in the prefix cache by requests first admitted in this step
        "lookup_tokens",  # prompt tokens looked up in it by those requests
        "recalled_tokens",  # those of hit_tokens that were read from the lower tier of the prefix cache
        "recalled_bytes",  # bytes read for them
        "tier_bytes",  # bytes read from and written to the lower tier
        "recomputed_tokens",  # those of prefill_tokens and decode_tokens computed again after a preemption
    )
    EACH: ClassVar[tuple[str, ...]] = ("decode_tokens", "running", "waiting", "kv_blocks_used")
    """Counts that are kept for every step."""
    FEW: ClassVar[tuple[str, ...]] = (
        "prefill_tokens",
        "preempted",
        "hit_tokens",
        "lookup_tokens",
        "recalled_tokens",
        "recalled_bytes",
        "tier_bytes",
        "recomputed_tokens",
    )
    """Numbers that are kept where they are not 0."""
    __slots__ = COLUMNS

    end_ns: Column
    start_ns: StartColumn
    prefill_tokens: SparseColumn
    decode_tokens: Column
    running: Column
    waiting: Column
    kv_blocks_used: Column
    preempted: SparseColumn
    hit_tokens: SparseColumn
    lookup_tokens: SparseColumn
    recalled_tokens: SparseColumn
    recalled_bytes: SparseColumn
    tier_bytes: SparseColumn
    recomputed_tokens: SparseColumn

    def __init__(self) -> None:
        self.end_ns = Column("q")
        self.start_ns = StartColumn(self.end_ns)
        for name in self.EACH:
            setattr(self, name, Column("i"))
        for name in self.FEW:
            setattr(self, name, SparseColumn(self.end_ns))

    def __len__(self) -> int:
        return len(self.end_ns)

    def new_track(self) -> array[int]:
        """Another column of times, for tokens that do not come at the ends of steps."""
        return array("q")

    def append(self, start_ns: int, end_ns: int, decodes: int, running: int, waiting: int, used: int) -> int:
        """Add a step with what every step has; returns its index."""
        ends = self.end_ns
        step = len(ends)
        if start_ns != (ends[-1] if step else 0):
            self.start_ns.put(step, start_ns)
        ends.append(end_ns)
        self.decode_tokens.append(decodes)
        self.running.append(running)
        self.waiting.append(waiting)
        self.kv_blocks_used.append(used)
        return step

    def extend(
        self, ends: list[int], decodes: list[int], running: list[int], waiting: list[int], used: list[int]
    ) -> None:
        """Add steps that follow each other, or whose starts are put into ``start_ns``."""
        self.end_ns.extend(ends)
        self.decode_tokens.extend(decodes)
        self.running.extend(running)
        self.waiting.extend(waiting)
        self.kv_blocks_used.extend(used)

    def append_quiet(
        self,
        start_ns: int,
        ends: list[int],
        used: list[int],
        decodes: int,
        running: int,
        waiting: int,
    ) -> None:
        """Add steps of the same decodes alone that follow each other from ``start_ns`` on, ending at ``ends``
        with ``used`` blocks in use."""
        step, count = len(self.end_ns), len(ends)
        if start_ns != (self.end_ns[-1] if step else 0):
            self.start_ns.put(step, start_ns)
        self.extend(ends, [decodes] * count, [running] * count, [waiting] * count, used)

    def latest_ends(self, steps: int) -> list[int]:
        """When the last ``steps`` steps ended, fewer where there are not as many."""
        return self.end_ns[-steps:] if steps else []

    def most(self, name: str) -> int:
        """The largest number of a column; 0 without steps."""
        found: Column | SparseColumn = getattr(self, name)
        return found.most()

    def durations(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """ns of steps ``start`` to ``stop - 1``, of all by default."""
        return self.column("end_ns", start, stop) - self.column("start_ns", start, stop)

    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """A copy of steps ``start`` to ``stop - 1`` of one column, of all by default."""
        found: Column | SparseColumn = getattr(self, name)
        return found.between(start, len(self) if stop is None else stop)

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """(first, behind the last) of stretches of steps that together are ``start`` to ``stop - 1``, for
        those who would not hold whole columns."""
        end = len(self) if stop is None else min(stop, len(self))
        for at in range(start, end, _AT_ONCE):
            yield at, min(at + _AT_ONCE, end)
