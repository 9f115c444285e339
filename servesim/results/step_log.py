"""The log of an instance's steps: a row a step, in columns that take what their values need.

A long run has tens of millions of steps, and most columns are 0 in nearly all of them. So times are kept in
64 bits, the counts that every step has in 32, and of the other columns only the steps that have something
there. A step mostly starts when the one before ends: only the other starts are kept.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class SparseColumn(Sequence[int]):
    """A number of every step, of which only those are kept that are not what they are expected to be: 0."""

    __slots__ = ("_rows", "_steps", "_values")

    def __init__(self, rows: array[int]) -> None:
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
            return list(self._between(*step.indices(len(self))))
        wanted = step if step >= 0 else step + len(self)
        if not 0 <= wanted < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        place = bisect_left(self._steps, wanted)
        if place < len(self._steps) and self._steps[place] == wanted:
            return self._values[place]
        return self._expected(wanted)

    def __iter__(self) -> Iterator[int]:
        return self._between(0, len(self), 1)

    def _between(self, start: int, stop: int, stride: int) -> Iterator[int]:
        place = bisect_left(self._steps, start) if stride == 1 else 0
        for step in range(start, stop, stride):
            if stride != 1:
                yield self[step]
            elif place < len(self._steps) and self._steps[place] == step:
                yield self._values[place]
                place += 1
            else:
                yield self._expected(step)

    def total(self, start: int = 0, stop: int | None = None) -> int:
        """The sum of the steps from ``start`` to ``stop - 1``, of all by default; costs what is kept of
        them."""
        steps = self._steps
        end = len(steps) if stop is None else bisect_left(steps, stop)
        return sum(self._values[bisect_left(steps, start) : end])

    def array(self) -> NDArray[np.int64]:
        """All steps, shape (steps,)."""
        every = self._all_expected()
        every[np.frombuffer(self._steps, dtype=np.int64)] = np.frombuffer(self._values, dtype=np.int64)
        return every

    def _all_expected(self) -> NDArray[np.int64]:
        return np.zeros(len(self), dtype=np.int64)


class StartColumn(SparseColumn):
    """When every step started: at the end of the one before, unless it is kept."""

    __slots__ = ()

    def _expected(self, step: int) -> int:
        return self._rows[step - 1] if step else 0

    def _all_expected(self) -> NDArray[np.int64]:
        every = np.zeros(len(self), dtype=np.int64)
        every[1:] = np.frombuffer(self._rows, dtype=np.int64)[:-1]
        return every

    def total(self, start: int = 0, stop: int | None = None) -> int:
        """The sum of the steps from ``start`` to ``stop - 1``, of all by default."""
        return int(self.array()[start:stop].astype(object).sum()) if len(self) else 0


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

    end_ns: array[int]
    start_ns: StartColumn
    prefill_tokens: SparseColumn
    decode_tokens: array[int]
    running: array[int]
    waiting: array[int]
    kv_blocks_used: array[int]
    preempted: SparseColumn
    hit_tokens: SparseColumn
    lookup_tokens: SparseColumn
    recalled_tokens: SparseColumn
    recalled_bytes: SparseColumn
    tier_bytes: SparseColumn
    recomputed_tokens: SparseColumn

    def __init__(self) -> None:
        self.end_ns = array("q")
        self.start_ns = StartColumn(self.end_ns)
        for name in self.EACH:
            setattr(self, name, array("i"))
        for name in self.FEW:
            setattr(self, name, SparseColumn(self.end_ns))

    def __len__(self) -> int:
        return len(self.end_ns)

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

    def append_quiet(
        self,
        start_ns: int,
        ends: Sequence[int],
        used: Sequence[int],
        decodes: int,
        running: int,
        waiting: int,
    ) -> None:
        """Add steps of the same decodes alone that follow each other from ``start_ns`` on, ending at ``ends``
        with ``used`` blocks in use."""
        step = len(self.end_ns)
        if start_ns != (self.end_ns[-1] if step else 0):
            self.start_ns.put(step, start_ns)
        self.end_ns.extend(ends)
        self.kv_blocks_used.extend(used)
        one = array("i", (0,))
        for column, value in (
            (self.decode_tokens, decodes),
            (self.running, running),
            (self.waiting, waiting),
        ):
            one[0] = value
            column.extend(one * len(ends))

    def most(self, name: str) -> int:
        """The largest number of a column; 0 without steps."""
        found: Any = getattr(self, name)
        return int(np.asarray(found.array() if isinstance(found, SparseColumn) else found).max(initial=0))

    def durations(self) -> NDArray[np.int64]:
        """ns of every step, shape (steps,)."""
        durations = self.start_ns.array()
        np.subtract(np.asarray(self.end_ns), durations, out=durations)
        return durations

    def column(self, name: str) -> NDArray[np.int64]:
        """A copy of one column, shape (steps,)."""
        found: Any = getattr(self, name)
        if isinstance(found, SparseColumn):
            return found.array()
        return np.array(found, dtype=np.int64)
