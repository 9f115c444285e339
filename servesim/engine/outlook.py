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
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.glide import StepTimes
    from servesim.engine.request_state import RequestState
    from servesim.engine.scheduler import Scheduler

LONG: Final = 48
"""Steps of the same decodes from which on a vectorised jump is faster."""


class Outlook:
    """The next steps of an instance, of decodes alone, that follow each other without a gap.

    It is laid out piece by piece. A piece reaches to the next step that ends requests: the number of decodes
    and the sum, least and greatest of their KV lengths give each duration. The next piece goes on without the
    requests that have ended.
    """

    __slots__ = (
        "_bases",
        "_depth",
        "_ended",
        "_ends_ns",
        "_first",
        "_is_over",
        "_leaves_ns",
        "_plain",
        "_room",
        "_scheduler",
        "_sum",
        "_through_ends",
        "_tick",
        "_times",
        "is_open",
        "left",
        "until_ns",
    )

    def __init__(self, scheduler: Scheduler, times: StepTimes, depth: int, *, through_ends: bool) -> None:
        """
        Args:
            scheduler: of the instance.
            times: durations of its steps.
            depth: steps in flight at once.
            through_ends: whether an outlook goes on when requests leave.
        """
        self._scheduler = scheduler
        self._times = times
        self._depth = depth
        self._through_ends = through_ends
        self.is_open = False
        """Whether steps are laid out."""
        self.until_ns = 0
        """When the first step is scheduled that may be another one, or when to lay out more."""
        self.left = 0
        """Requests that have left by the last time that :meth:`pass_to` was told."""
        self._first = 0
        """Number of the first step."""
        self._ends_ns: list[int] = []
        """Ends of the ``depth`` steps in flight before it, and then of those laid out. A step is scheduled
        when the one ``depth`` before it has ended."""
        self._leaves_ns: list[int] = []
        """When requests leave, one entry each, in order; those may lack at whose time the outlook is over."""
        self._plain = False
        """Whether it goes on when requests leave that were known to end."""
        self._is_over = True
        """Whether something else may happen behind it."""
        self._room = 0
        """So many steps are sure to find blocks, or more."""
        self._tick = 0
        """Of the decodes, at the next step to lay out."""
        self._bases: list[int] = []
        """``decode_base`` of those that are left then, rising."""
        self._sum = 0
        """Sum of these."""
        self._ended: Sequence[RequestState] = ()
        """Requests that end in the last step so far, still among them."""

    # ------------------------------------------------------------------ laying out

    def open(self, first: int, flying: Sequence[Batch], most: int) -> bool:
        """Lay out up to ``most`` steps from number ``first`` on, behind those in ``flying``, which are as
        many as may be. The scheduler is a plain one, see :attr:`Scheduler.plain`.

        Returns:
            False, and nothing is laid out, where something else may happen in the next step.
        """
        scheduler = self._scheduler
        decodes, waiting = scheduler.decodes, scheduler.waiting
        if not scheduler.only_decodes():
            return False
        if waiting and decodes.count >= scheduler.limits.max_num_batched_tokens:
            return False  # the step behind one that ends a request may have room for them
        self._start(first, [batch.end_ns for batch in flying])
        self._plain = self._through_ends and not waiting  # what leaves may let others in
        self._is_over, self._ended, self._room = False, (), 0
        self._tick, self._bases, self._sum = decodes.tick, decodes.bases.copy(), decodes.base_sum
        for place, batch in enumerate(flying):
            if batch.finishing:
                if not self._plain or any(state.stops for state in batch.finishing):
                    # not beyond that end, whose requests are among the decodes no more, or for a step still
                    self.is_open = self.extend(min(place, most))
                    self._is_over, self.until_ns = True, min(self.until_ns, batch.end_ns)
                    return self.is_open
                self._leaves_ns += [batch.end_ns] * len(batch.finishing)
        self.is_open = self.extend(most)
        return self.is_open

    def open_with(self, first: int, ends_ns: list[int], leaves_ns: Sequence[int] = ()) -> None:
        """Lay out steps from number ``first`` on, which with the ``depth`` in flight before them end at
        ``ends_ns``; requests leave at ``leaves_ns``."""
        self._start(first, ends_ns)
        self._leaves_ns += leaves_ns
        self.is_open = self._is_over = True
        self.until_ns = ends_ns[-self._depth]

    def close(self) -> None:
        """Nothing is laid out any more."""
        self.is_open = False

    def _start(self, first: int, ends_ns: list[int]) -> None:
        self._first, self._ends_ns = first, ends_ns
        self._leaves_ns, self.left = [], 0

    def extend(self, most: int) -> bool:
        """Lay out up to ``most`` steps more; False: something else may happen in the next one."""
        if self._is_over:
            return False
        ends_ns, tick = self._ends_ns, self._tick
        if self._ended:
            self._let_go(self._ended)
            self._ended = ()
        bases, decodes = self._bases, self._scheduler.decodes
        if not bases:
            return False
        last_tick = decodes.next_end_from(tick)
        # blocks are needed also in the steps that are scheduled behind these before the last of them ends
        behind = len(ends_ns) - 1
        steps = min(last_tick - tick + 1, most)
        if behind + steps > self._room:
            self._room = self._scheduler.steps_with_room(2 * (behind + steps))
            steps = min(steps, self._room - behind)
        if steps <= 0:
            return False
        count = len(bases)
        lengths = self._sum + count * tick, bases[0] + tick, bases[-1] + tick
        if steps < LONG:
            self._times.decode_ends(ends_ns, count, *lengths, steps)
        else:
            durations = self._times.decode_run_ns(count, *lengths, steps)
            ends_ns += (np.cumsum(durations) + ends_ns[-1]).tolist()
        self._tick = tick + steps
        self.until_ns = end_ns = ends_ns[-1]
        if self._tick > last_tick:
            self._ended = decodes.ending_at(last_tick)
            self._is_over = not self._plain
            for state in self._ended:
                self._leaves_ns.append(end_ns)
                self._is_over |= state.stops  # known only then, so it stays for a step
        return True

    def _let_go(self, ended: Sequence[RequestState]) -> None:
        """Go on without these requests."""
        for state in ended:
            self._sum -= state.decode_base
            del self._bases[bisect_left(self._bases, state.decode_base)]

    def steps_taken(self, left: int) -> None:
        """The first steps are taken, by which ``left`` requests have left; the rest stays."""
        del self._leaves_ns[:left]
        self.left -= left

    # ------------------------------------------------------------------ looking at it

    @property
    def steps(self) -> int:
        """How many are laid out."""
        return len(self._ends_ns) - self._depth

    def covers(self, ns: int) -> bool:
        """Whether every step is laid out that is scheduled before ``ns``."""
        return self._ends_ns[-self._depth] >= ns

    def ends_before(self, step: int, ns: int) -> list[int]:
        """Ends of the steps from number ``step`` on that are scheduled before ``ns``."""
        ends_ns, depth = self._ends_ns, self._depth
        count = bisect_left(ends_ns, ns, 0, len(ends_ns) - depth)
        return ends_ns[step - self._first + depth : count + depth]

    def cut(self, ns: int, *, after: bool) -> None:
        """Something comes at ``ns``: a step that is scheduled then or later is another one, with ``after``
        only if later."""
        ends_ns, last = self._ends_ns, len(self._ends_ns) - 1
        found = bisect_right(ends_ns, ns, 0, last) if after else bisect_left(ends_ns, ns, 0, last)
        self.until_ns = min(self.until_ns, ends_ns[found])

    def pass_to(self, now_ns: int) -> None:
        """Time has gone on to ``now_ns``."""
        leaves = self._leaves_ns
        while self.left < len(leaves) and leaves[self.left] <= now_ns:
            self.left += 1

    def next_ns(self) -> int:
        """When the next request leaves after the last time told, or the outlook is over."""
        if self.left < len(self._leaves_ns):
            return min(self._leaves_ns[self.left], self.until_ns)
        return self.until_ns
