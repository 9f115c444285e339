"""The log of an instance's steps: a row a step, in columns that take what their values need.

A long run has tens of millions of steps, and most columns are 0 in nearly all of them. So times and the
counts that every step has are packed (:class:`~servesim.results.columns.Column`), and of the other columns
only the steps are kept that have something there. A step mostly starts when the one before ends: only the
other starts are kept.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from servesim.results.columns import Column
from servesim.results.sparse_columns import SparseColumn, StartColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


_AT_ONCE = 1 << 16
"""Steps that are computed with at once."""


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
