"""Steps of a single instance, taken one after the other in a tight loop until something else may happen.

Between two arrivals of a busy instance lie a dozen steps and an end or two: too few for a vectorised jump to
pay, and an end stops one. Most of these steps are decodes alone. What such a step needs beyond the present
decodes' calendars is one duration and one row of the log. The others, in which requests are admitted or
prompts computed, are the scheduler's. Taken step by step (``--stepped``), a run makes the same steps; the
tests compare the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from servesim.engine.batch import Batch
from servesim.engine.clock import NEVER
from servesim.engine.outlook import LONG

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState


class StepTimes(Protocol):
    """Durations of the steps of one instance; see :class:`servesim.cost.stage_cost.StageCost`."""

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int: ...

    def decode_ends(
        self,
        ends_ns: list[int],
        n: int,
        kv_sum: int,
        kv_min: int,
        kv_max: int,
        steps: int,
        depth: int = 1,
        until_ns: int = NEVER,
    ) -> None: ...

    def decode_run_ns(
        self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int
    ) -> NDArray[np.int64]: ...

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int: ...


class Rows:
    """Rows for the step log, which gets those of a glide together."""

    __slots__ = ("decodes", "ends_ns", "running", "used", "waiting")

    def __init__(self, free_ns: int) -> None:
        """``free_ns``: the end of the step before them."""
        self.ends_ns = [free_ns]
        """That, and the end of every step."""
        self.used: list[int] = []
        """Blocks in use in every step."""
        self.decodes: list[int] = []
        self.running: list[int] = []
        self.waiting: list[int] = []

    def add(self, steps: int, decodes: int, running: int, waiting: int) -> None:
        """Note what so many steps have in common, whose ends and blocks are noted one by one."""
        self.decodes += [decodes] * steps
        self.running += [running] * steps
        self.waiting += [waiting] * steps


class Glider:
    """The steps of an instance of one stage without drafts, windows, connectors, hook, noise, or steps held
    back for prefills."""

    __slots__ = ("_depth", "_member", "_times", "free_ns", "in_flight", "left", "now_ns", "quiet", "starved")

    def __init__(self, member: Instance, times: StepTimes, depth: int) -> None:
        """``depth``: steps in flight at most, 1 or 2; see :class:`~servesim.engine.step_loop.StepLoop`."""
        self._member = member
        self._times = times
        self._depth = depth
        self.in_flight: list[Batch] = []
        """What is in flight when a glide ends."""
        self.left: list[RequestState] = []
        """Requests that left the system in it."""
        self.now_ns = 0
        """When it stopped."""
        self.free_ns = 0
        """When the NPUs are free then."""
        self.starved = False
        """Whether it stopped since nothing could be scheduled."""
        self.quiet = False
        """Whether it stopped since the coming steps are better jumped over."""

    def run(
        self,
        in_flight: list[Batch | None],
        free_ns: int,
        now_ns: int,
        horizon_ns: int,
        one_end: bool,
        priced: list[int],
        mail_ns: int,
    ) -> int:
        """Take steps until nothing can be scheduled, the next would be at ``horizon_ns`` or later, or so many
        of decodes alone are ahead that they are better jumped over.

        A round takes steps of the present decodes alone, up to one that ends any of them and no further than
        something else may follow: their number and the sum, least and greatest of their KV lengths give the
        durations, and those at a block boundary get a block each. Where it takes more than that, or there are
        no blocks, a round is one step, which the scheduler makes. Then the step that has been in flight for
        longest ends, and its requests leave.

        Args:
            in_flight: one step less than may be in flight.
            free_ns: when the NPUs are free.
            now_ns: when the first step is scheduled.
            horizon_ns: when something else may happen.
            one_end: when requests have left, take what is scheduled at that very time and stop.
            priced: when the first steps end, as far as that was laid out: steps of decodes alone without a
                gap, for which there are blocks, that are scheduled before the horizon.
            mail_ns: when the instance takes in requests, at the earliest.

        Returns:
            the steps taken.
        """
        member, depth, times = self._member, self._depth, self._times
        scheduler, steps = member.scheduler, member.log.steps
        decodes, running, pool = scheduler.decodes, scheduler.running, scheduler.kv.pool
        first = step = len(steps)
        rows = Rows(free_ns)  # the log gets them before somebody looks at it
        ends, used = rows.ends_ns, rows.used
        waiting = len(scheduler.waiting)
        # steps in flight whose end does something
        watched = {batch.step: batch for batch in in_flight if batch is not None and batch.finishing}
        ahead, mail = len(priced), member.has_mail
        self.left = []
        self.starved = self.quiet = full = False
        untold = False  # whether steps were taken that the scheduler knows nothing of
        if ahead:
            self._take_priced(step, priced, watched, rows)
        alone = scheduler.only_decodes()
        while True:
            before_ns = free_ns  # the end of the step before
            start_ns = free_ns if free_ns > now_ns else now_ns
            taken = 0
            if alone and not ahead:
                # as far as nothing else can follow: what is in flight may end requests, others may come
                most = 1
                if not watched and start_ns == before_ns:
                    most = min(decodes.next_end - decodes.tick + 1, LONG)
                until_ns = mail_ns if mail and mail_ns < horizon_ns else horizon_ns
                line = ends if start_ns == before_ns else [start_ns]
                kv_sum, kv_min, kv_max = decodes.lengths()
                told = len(line)
                times.decode_ends(line, decodes.count, kv_sum, kv_min, kv_max, most, depth, until_ns)
                taken = scheduler.grow_on(len(line) - told, used)
                del line[told + taken :]
                if line is not ends:
                    ends += line[1:]
            if ahead:
                before_ns, free_ns = priced[-2] if ahead > 1 else free_ns, priced[-1]
                step += ahead
                ahead, untold = 0, True
            elif taken:
                if start_ns != before_ns:
                    steps.start_ns.put(step, start_ns)
                if taken > 1:
                    now_ns, before_ns = ends[-1 - depth], ends[-2]
                free_ns = ends[-1]
                rows.add(taken, decodes.count, len(running), waiting)
                step += taken
                untold = True
                if self._pass(taken, step - 1, free_ns, watched):
                    alone = scheduler.only_decodes()
            else:
                if untold:
                    scheduler.stepped(alone=depth == 1)
                    untold = False
                batch = member.schedule(step, now_ns, depth > 1)
                if batch is None:
                    self.starved = True
                    break
                free_ns = batch.end_ns = start_ns + self._step_ns(batch)
                waiting = len(scheduler.waiting)
                ends.append(free_ns)
                used.append(pool.usable - pool.num_free)
                rows.add(1, batch.num_decodes, len(running), waiting)
                member.note_batch(batch, start_ns)
                if start_ns != before_ns:
                    steps.start_ns.put(step, start_ns)
                if batch.finishing:
                    watched[step] = batch
                alone = scheduler.only_decodes()
                step += 1
            next_ns = before_ns if depth > 1 else free_ns
            if next_ns >= horizon_ns:
                full = True
                break
            now_ns = next_ns
            oldest = watched.pop(step - depth, None)
            if oldest is not None:
                self.left += member.finish(oldest)
                if self.left and one_end:
                    horizon_ns = now_ns + 1
            comes = mail and now_ns >= mail_ns
            if comes:
                member.take_in(now_ns)
                mail = False
            if comes or oldest is not None:
                waiting = len(scheduler.waiting)
                alone = scheduler.only_decodes()
            if alone and not mail and not watched and decodes.next_end - decodes.tick >= LONG:
                self.quiet = horizon_ns - now_ns >= LONG * (free_ns - before_ns)
                if self.quiet:
                    break
        self.now_ns, self.free_ns = now_ns, free_ns
        if untold:
            scheduler.stepped(alone=depth == 1)
        steps.extend(ends[1:], rows.decodes, rows.running, rows.waiting, used)
        flying = [(step - 2, before_ns), (step - 1, free_ns)][2 - depth + (not full) :]
        self.in_flight = [watched.get(at) or Batch(at, end_ns) for at, end_ns in flying]
        return step - first

    def _take_priced(self, first: int, priced: list[int], watched: dict[int, Batch], rows: Rows) -> None:
        """Take the steps from number ``first`` on that end at the times ``priced``, of which is known that
        each has blocks, follows the one before without a gap, and is of decodes alone; nothing comes before
        the last of them is scheduled.

        ``watched``: steps in flight whose end does something; those that are in flight behind are added.
        """
        member, scheduler, depth = self._member, self._member.scheduler, self._depth
        decodes, running, waiting = scheduler.decodes, scheduler.running, len(scheduler.waiting)
        at, most = 0, len(priced)
        while at < most:
            if watched:
                oldest = watched.pop(first + at - depth, None)
                if oldest is not None:
                    self.left += member.finish(oldest)
            # up to an end of requests, or to what the end of a step in flight may change
            taken = min(decodes.next_end - decodes.tick + 1, most - at, 1 if watched else most)
            scheduler.grow_on(taken, rows.used)
            rows.add(taken, decodes.count, len(running), waiting)
            at += taken
            self._pass(taken, first + at - 1, priced[at - 1], watched)
        rows.ends_ns.extend(priced)

    def _pass(self, steps: int, last: int, end_ns: int, watched: dict[int, Batch]) -> bool:
        """Give every decode ``steps`` tokens; whether the last of these steps, number ``last``, which ends at
        ``end_ns``, ends requests. If so, it is watched from now on."""
        decodes = self._member.scheduler.decodes
        decodes.skip(steps - 1)
        ended = decodes.advance()
        if not ended:
            return False
        watched[last] = batch = Batch(last, end_ns)
        batch.end_with(ended)
        return True

    def _step_ns(self, batch: Batch) -> int:
        """Duration of a step of any kind."""
        return self._times.mixed_ns(batch.chunks, batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max)
