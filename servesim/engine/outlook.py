"""What the next steps of an instance will be if nothing comes, laid out without taking them.

Behind a router, the next arrival is mostly somebody else's, so an instance looks past it: it lays out when
its next steps end and when requests leave, takes its place on the clock at the end of that, and does nothing.
When something comes for it, it takes the steps that are scheduled by then, and the rest of the outlook is
void. What has been priced is not priced again. A run step by step (``--stepped``) never looks ahead, and
makes the same steps; the tests compare the two.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.glide import StepTimes
    from servesim.engine.scheduler import Scheduler

LONG = 48
"""Steps of the same decodes from which on a vectorised jump is faster."""


class Outlook:
    """The next steps of an instance, of decodes alone, that follow each other without a gap."""

    __slots__ = ("_depth", "_ends_ns", "_first", "_leaves_ns", "_passed", "until_ns")

    def __init__(self, first: int, ends_ns: list[int], depth: int, leaves_ns: list[int]) -> None:
        """
        Args:
            first: number of the first step.
            ends_ns: ends of the ``depth`` steps in flight before it, and then of these steps. A step is
                scheduled when the one ``depth`` before it has ended.
            depth: steps in flight at once.
            leaves_ns: when requests leave, one entry each, in order; those may lack at whose time the outlook
                is over.
        """
        self._first = first
        self._ends_ns = ends_ns
        self._depth = depth
        self._leaves_ns = leaves_ns
        self._passed = 0
        self.until_ns = ends_ns[-depth]
        """When the first step is scheduled that is not laid out here, or something has come."""

    def ends_before(self, step: int, ns: int) -> list[int]:
        """Ends of the steps from number ``step`` on that are scheduled before ``ns``."""
        ends_ns, depth = self._ends_ns, self._depth
        count = bisect_left(ends_ns, ns, 0, len(ends_ns) - depth)
        return ends_ns[step - self._first + depth : count + depth]

    def cut(self, ns: int, *, after: bool) -> None:
        """Something comes at ``ns``: a step that is scheduled then or later is another one, with ``after``
        only if later."""
        ends_ns, last = self._ends_ns, len(self._ends_ns) - self._depth
        found = bisect_right(ends_ns, ns, 0, last) if after else bisect_left(ends_ns, ns, 0, last)
        self.until_ns = min(self.until_ns, ends_ns[found])

    def left_by(self, now_ns: int) -> int:
        """How many requests have left by ``now_ns``."""
        leaves = self._leaves_ns
        while self._passed < len(leaves) and leaves[self._passed] <= now_ns:
            self._passed += 1
        return self._passed

    def next_ns(self) -> int:
        """When the next request leaves after the last time asked for, or the outlook is over."""
        if self._passed < len(self._leaves_ns):
            return min(self._leaves_ns[self._passed], self.until_ns)
        return self.until_ns


def look_ahead(
    scheduler: Scheduler,
    first: int,
    times: StepTimes,
    flying: Sequence[Batch],
    most: int,
    before_ns: int,
    through_ends: bool,
) -> Outlook | None:
    """Lay out steps of an instance in which nothing but its decodes can take part.

    A round prices the steps up to one that ends requests: the number of decodes and the sum, least and
    greatest of their KV lengths give each duration. Then those requests are gone, and the next round has
    fewer decodes.

    Args:
        scheduler: a plain one, see :attr:`Scheduler.plain`.
        first: number of the first step.
        times: durations of its steps.
        flying: what is in flight: as many as may be.
        most: steps at most.
        before_ns: steps that are scheduled at this time or later are not laid out.
        through_ends: whether to go on when a request leaves.

    Returns:
        None where something else may happen in the next step.
    """
    if not scheduler.only_decodes():
        return None
    through_ends = through_ends and not scheduler.waiting  # what leaves may let others in
    depth = len(flying)
    ends_ns, leaves_ns = [batch.end_ns for batch in flying], list[int]()
    for place, batch in enumerate(flying):
        if batch.finishing:
            if not through_ends or any(state.stops for state in batch.finishing):
                most = min(most, place)
                break
            leaves_ns += [batch.end_ns] * len(batch.finishing)
    most = scheduler.steps_with_room(most)
    if most <= 0:
        return None
    decodes = scheduler.decodes
    bases, tick = decodes.bases(), decodes.tick - depth
    for last, ending in [*decodes.coming_ends(most), (most - 1, [])]:
        steps = min(last + 1, most) - len(ends_ns) + depth
        if steps > 0:
            at, count = tick + len(ends_ns), len(bases)
            lengths = sum(bases) + count * at, bases[0] + at, bases[-1] + at
            if steps < LONG:
                times.decode_ends(ends_ns, count, *lengths, steps)
            else:
                durations = times.decode_run_ns(count, *lengths, steps)
                ends_ns += (np.cumsum(durations) + ends_ns[-1]).tolist()
        if last >= most:
            break
        for state in ending:
            if state.stops or not through_ends:
                most = min(most, last + depth)
            if not state.stops:
                del bases[bisect_left(bases, state.decode_base)]
            leaves_ns.append(ends_ns[-1])
        if not bases:
            break
    if ends_ns[-1] >= before_ns:
        del ends_ns[bisect_left(ends_ns, before_ns, 0, len(ends_ns) - depth) + depth :]
    return Outlook(first, ends_ns, depth, leaves_ns) if len(ends_ns) > depth else None
