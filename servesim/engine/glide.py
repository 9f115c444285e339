"""Steps of decodes alone, taken one after the other in a tight loop, through the ends of requests.

Between two arrivals of a busy instance lie a dozen steps and an end or two: too few for a vectorised jump to
pay, and an end stops one. What such a step needs beyond the present decodes' calendars is one duration and
one row of the log. Taken step by step (``--stepped``), a run makes the same steps; the tests compare the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from servesim.engine.batch import Batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState

LONG = 48
"""Quiet steps from which on a vectorised jump is faster."""


class StepTimes(Protocol):
    """Durations of the steps of one instance; see :class:`servesim.cost.stage_cost.StageCost`."""

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int: ...

    def decode_run_ns(
        self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int
    ) -> NDArray[np.int64]: ...


class Glider:
    """An instance in which nothing but decodes can take part in a step: no drafts, windows, connectors, hook,
    noise, or steps held back for prefills."""

    __slots__ = ("_depth", "_member", "_times", "in_flight", "left", "now_ns")

    def __init__(self, member: Instance, times: StepTimes, depth: int) -> None:
        """``depth``: steps in flight at most; see :class:`~servesim.engine.step_loop.StepLoop`."""
        self._member = member
        self._times = times
        self._depth = depth
        self.in_flight: list[Batch] = []
        """What is in flight when a glide ends."""
        self.left: list[RequestState] = []
        """Requests that left the system in it."""
        self.now_ns = 0
        """When it stopped."""

    def run(self, in_flight: list[Batch], free_ns: int, now_ns: int, horizon_ns: int, one_end: bool) -> int:
        """Take steps until something else may take part in one, or the next would be at ``horizon_ns`` or
        later.

        A round computes one step: the decodes at a block boundary get a block each; the number of decodes and
        the sum, least and greatest of their KV lengths give its duration and a row of the log; the calendar
        names those it ends. Then the step that has been in flight for longest ends, and its requests leave.

        Args:
            in_flight: one step less than may be in flight.
            free_ns: when the NPUs are free.
            now_ns: when the first step is scheduled.
            horizon_ns: when something else may happen.
            one_end: stop also when a request has left.

        Returns:
            the steps taken.
        """
        member, depth, decode_ns = self._member, self._depth, self._times.decode_ns
        scheduler, steps = member.scheduler, member.log.steps
        decodes, pool, running = scheduler.decodes, scheduler.kv.pool, scheduler.running
        log_step, first = steps.append, len(steps)
        step, ends_ns = first, steps.latest_ends(depth)
        waiting = len(scheduler.waiting)
        watched = {batch.step: batch for batch in in_flight}  # whose end does something
        self.left = []
        full = False
        goes_on = scheduler.only_decodes()
        while goes_on:
            boundary = decodes.at_boundary()
            if boundary:
                if len(boundary) > pool.num_free:
                    break
                scheduler.grow(boundary)
            count = decodes.count
            kv_sum, kv_min, kv_max = decodes.lengths()
            start_ns = free_ns if free_ns > now_ns else now_ns
            free_ns = start_ns + decode_ns(count, kv_sum, kv_min, kv_max)
            log_step(start_ns, free_ns, count, len(running), waiting, pool.num_used)
            ends_ns.append(free_ns)
            ended = decodes.advance()
            if ended:
                watched[step] = batch = Batch(step, free_ns)
                batch.end_with(ended)
                goes_on = scheduler.only_decodes()
            step += 1
            if ends_ns[-depth] >= horizon_ns:
                full = True
                break
            now_ns = ends_ns[-depth]
            oldest = watched.pop(step - depth, None)
            if oldest is not None:
                self.left += member.finish(oldest)
                if self.left and one_end:
                    break
                goes_on = scheduler.only_decodes() and (
                    bool(watched) or decodes.next_end - decodes.tick < LONG
                )
        self.now_ns = now_ns
        if step > first:
            scheduler.stepped(alone=depth == 1)
        flying = range(step - depth + (not full), step)
        self.in_flight = [watched.get(at) or Batch(at, ends_ns[at - step]) for at in flying]
        return step - first
