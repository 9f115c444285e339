"""What the next steps of an instance will be if nothing comes, laid out without taking them.

Behind a router, the next arrival is mostly somebody else's, so an instance looks past it: it lays out when
its next steps end, up to one that ends requests, takes its place on the clock at the time when those leave,
and does nothing. If nothing has come for it by then, it lays out more. When something comes, it takes the
steps that are scheduled by then, and the rest of the outlook is void. What has been priced is not priced
again. A run step by step (``--stepped``) never looks ahead, and makes the same steps; the tests compare the
two.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.glide import StepTimes
    from servesim.engine.request_state import RequestState
    from servesim.engine.scheduler import Scheduler

LONG = 48
"""Steps of the same decodes from which on a vectorised jump is faster."""


class Outlook:
    """The next steps of an instance, of decodes alone, that follow each other without a gap."""

    __slots__ = ("_first", "_passed", "depth", "ends_ns", "leaves_ns", "until_ns")

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
        self._passed = 0
        self.depth = depth
        """Steps in flight at once."""
        self.ends_ns = ends_ns
        """See above; a :class:`Lookout` adds to them."""
        self.leaves_ns = leaves_ns
        """See above; a :class:`Lookout` adds to them."""
        self.until_ns = ends_ns[-depth]
        """When the first step is scheduled that may be another one, or when to lay out more."""

    @property
    def steps(self) -> int:
        """How many are laid out."""
        return len(self.ends_ns) - self.depth

    def ends_before(self, step: int, ns: int) -> list[int]:
        """Ends of the steps from number ``step`` on that are scheduled before ``ns``."""
        ends_ns, depth = self.ends_ns, self.depth
        count = bisect_left(ends_ns, ns, 0, len(ends_ns) - depth)
        return ends_ns[step - self._first + depth : count + depth]

    def cut(self, ns: int, *, after: bool) -> None:
        """Something comes at ``ns``: a step that is scheduled then or later is another one, with ``after``
        only if later."""
        ends_ns, last = self.ends_ns, len(self.ends_ns) - 1
        found = bisect_right(ends_ns, ns, 0, last) if after else bisect_left(ends_ns, ns, 0, last)
        self.until_ns = min(self.until_ns, ends_ns[found])

    def left_by(self, now_ns: int) -> int:
        """How many requests have left by ``now_ns``."""
        leaves = self.leaves_ns
        while self._passed < len(leaves) and leaves[self._passed] <= now_ns:
            self._passed += 1
        return self._passed

    def next_ns(self) -> int:
        """When the next request leaves after the last time asked for, or the outlook is over."""
        if self._passed < len(self.leaves_ns):
            return min(self.leaves_ns[self._passed], self.until_ns)
        return self.until_ns


class Lookout:
    """Lays out the steps of an instance in which nothing but its decodes can take part, piece by piece.

    A piece reaches to the next step that ends requests. The number of decodes and the sum, least and greatest
    of their KV lengths give each duration. The next piece goes on without the requests that have ended.
    """

    __slots__ = (
        "_bases",
        "_ended",
        "_is_over",
        "_plain",
        "_scheduler",
        "_sum",
        "_through_ends",
        "_tick",
        "_times",
    )

    def __init__(self, scheduler: Scheduler, times: StepTimes, *, through_ends: bool) -> None:
        """
        Args:
            scheduler: of the instance, a plain one, see :attr:`Scheduler.plain`.
            times: durations of its steps.
            through_ends: whether an outlook goes on when requests leave.
        """
        self._scheduler = scheduler
        self._times = times
        self._through_ends = through_ends
        self._plain = False
        """Whether the present outlook goes on when requests leave that were known to end."""
        self._is_over = True
        """Whether something else may happen behind it."""
        self._tick = 0
        """Of the decodes, at the next step to lay out."""
        self._bases: list[int] = []
        """``decode_base`` of those that are left then, rising."""
        self._sum = 0
        """Sum of these."""
        self._ended: Sequence[RequestState] = ()
        """Requests that end in the last step so far, still among them."""

    def look_ahead(self, first: int, flying: Sequence[Batch], most: int) -> Outlook | None:
        """Lay out up to ``most`` steps from number ``first`` on, behind those in ``flying``, which are as
        many as may be.

        Returns:
            None where something else may happen in the next step.
        """
        scheduler = self._scheduler
        decodes, waiting = scheduler.decodes, scheduler.waiting
        if not scheduler.only_decodes():
            return None
        if waiting and decodes.count >= scheduler.limits.max_num_batched_tokens:
            return None  # the step behind one that ends a request may have room for them
        self._plain = self._through_ends and not waiting  # what leaves may let others in
        self._is_over, self._ended = False, ()
        self._tick, self._bases, self._sum = decodes.tick, decodes.bases, decodes.base_sum
        outlook = Outlook(first, [batch.end_ns for batch in flying], len(flying), [])
        for place, batch in enumerate(flying):
            if batch.finishing:
                if not self._plain or any(state.stops for state in batch.finishing):
                    # not beyond that end, whose requests are among the decodes no more, or for a step still
                    found = self.look_further(outlook, min(place, most))
                    self._is_over, outlook.until_ns = True, min(outlook.until_ns, batch.end_ns)
                    return outlook if found else None
                outlook.leaves_ns += [batch.end_ns] * len(batch.finishing)
        return outlook if self.look_further(outlook, most) else None

    def look_further(self, outlook: Outlook, most: int) -> bool:
        """Lay out up to ``most`` steps more; False: something else may happen in the next one."""
        scheduler, times, tick, ends_ns = self._scheduler, self._times, self._tick, outlook.ends_ns
        if self._ended:
            self._let_go(self._ended)
            self._ended = ()
        count = len(self._bases)
        if self._is_over or not count:
            return False
        decodes = scheduler.decodes
        last_tick = decodes.next_end_from(tick)
        # blocks also for what is scheduled behind these steps before the last of them ends
        behind = outlook.steps + outlook.depth - 1
        steps = min(last_tick - tick + 1, most)
        steps = scheduler.steps_with_room(behind + steps) - behind
        if steps <= 0:
            return False
        lengths = self._sum + count * tick, self._bases[0] + tick, self._bases[-1] + tick
        if steps < LONG:
            times.decode_ends(ends_ns, count, *lengths, steps)
        else:
            durations = times.decode_run_ns(count, *lengths, steps)
            ends_ns += (np.cumsum(durations) + ends_ns[-1]).tolist()
        self._tick = tick + steps
        if self._tick > last_tick:
            self._ended = decodes.ending_at(last_tick)
            self._is_over = not self._plain
            for state in self._ended:
                outlook.leaves_ns.append(ends_ns[-1])
                self._is_over |= state.stops  # known only then, so it stays for a step
        outlook.until_ns = ends_ns[-1]
        return True

    def _let_go(self, ended: Sequence[RequestState]) -> None:
        """Go on without these requests."""
        if self._bases is self._scheduler.decodes.bases:
            self._bases = self._bases.copy()
        for state in ended:
            self._sum -= state.decode_base
            del self._bases[bisect_left(self._bases, state.decode_base)]
