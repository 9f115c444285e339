"""Runs steps: schedules batches, puts them on the NPUs, commits them when they end.

A loop drives one instance, or several that go in lock-step (a data-parallel group). What it puts on the NPUs
at once is a *wave*: one batch of every member that has work. A wave passes the pipeline stages one after the
other; a stage takes it up when the stage before has handed it over and the wave before has left.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from enum import IntEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol

from servesim.engine.batch import Batch
from servesim.engine.clock import NEVER, Order
from servesim.engine.glide import Glider
from servesim.engine.outlook import LONG, Outlook
from servesim.errors import RunError
from servesim.results.records import StageLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.engine.clock import Clock
    from servesim.engine.decode_set import DecodeSet
    from servesim.engine.glide import StepTimes
    from servesim.engine.instance import Instance
    from servesim.engine.noise import StepNoise, StepShift
    from servesim.engine.request_state import RequestState

_MIN_JUMP: Final = 2  # steps; below this, there is nothing to gain
_MIN_VECTOR: Final = 16  # steps; below this, their durations are computed faster one by one
_MAX_JUMP: Final = 8192
_LEAST_REACH: Final = 12  # steps of an outlook; fewer cost more visits than they save


class WaveTimes(Protocol):
    """Durations of the waves of a loop; see :class:`servesim.cost.step_cost.StepCost`."""

    @property
    def alone(self) -> StepTimes | None:
        """The steps of a single instance of one stage whose quiet stretches can be jumped over."""

    def stages_ns(self, batches: Sequence[Batch | None]) -> Sequence[tuple[int, int]]:
        """(compute, hand-over to the next stage) of every pipeline stage, for one batch or None per
        member."""


class Wave:
    """One batch (or None) of every member, on its way through the stages; in a pipeline perhaps of none."""

    __slots__ = ("batches", "end_ns")

    def __init__(self, batches: list[Batch | None], end_ns: int) -> None:
        self.batches = batches
        self.end_ns = end_ns

    @property
    def empty(self) -> bool:
        """Whether nothing could be scheduled for any member."""
        return not any(self.batches)


class Coupling(IntEnum):
    """What of a step loop can concern others, and so how far it may run ahead."""

    NONE = 0
    """Nothing: only arrivals interrupt it."""
    ENDS = 1
    """The end of a request, which may let another arrive, here or elsewhere."""
    STEPS = 2
    """Every step, since it may move KV over links that others use."""


class Foresight(IntEnum):
    """How far a step loop looks past arrivals that may be for others, see :class:`Outlook`."""

    NONE = 0
    """Not at all: there is no other, or whoever shares requests out looks at more than how many there are."""
    TO_AN_END = 1
    """Until a request leaves: others act by it at that very time."""
    THROUGH_ENDS = 2
    """On and on: it is enough that the count of running requests is right."""


class LoopPlan:
    """What a step loop runs, and how."""

    __slots__ = ("depth", "jump", "members", "noise", "stages", "times")

    def __init__(
        self,
        members: Sequence[Instance],
        times: WaveTimes,
        depth: int = 2,
        stages: int = 1,
        jump: bool = True,
        noise: StepNoise | StepShift | None = None,
    ) -> None:
        self.members = members
        """One, or those of a group that goes in lock-step."""
        self.times = times
        self.depth = depth
        """Waves in flight at most."""
        self.stages = stages
        """Pipeline stages."""
        self.jump = jump
        """Whether quiet stretches are jumped over."""
        self.noise = noise
        """Makes every step a little faster or slower."""


class StepLoop:
    """Keeps up to ``depth`` waves in flight on ``stages`` pipeline stages.

    With synchronous scheduling (``depth`` 1) a wave is scheduled when the one before has ended. With
    asynchronous scheduling (``depth`` 2), vLLM's default, it is scheduled while the one before still runs,
    before its tokens are known. A pipeline holds as many waves as it has stages, and one more with
    asynchronous scheduling; a wave in which nothing could be scheduled takes a place there too, until those
    before it have ended. Requests that arrive during a step are seen at the next step boundary.
    """

    def __init__(
        self,
        plan: LoopPlan,
        clock: Clock,
        leave: Callable[[RequestState], None],
        coupling: Coupling = Coupling.NONE,
        foresight: Foresight = Foresight.NONE,
        acted: set[int] | None = None,
        unseen_until_ns: int = 0,
    ) -> None:
        """
        Args:
            plan: what to run.
            clock: says when to act.
            leave: called with every request that leaves the system.
            coupling: what of this loop concerns others.
            foresight: how far it looks past arrivals.
            acted: takes the index of every member when its counts may change.
            unseen_until_ns: before this time nobody asks how far it is. It does nothing until something comes
                for it, and then what was to be done by that time.
        """
        self.members = list(plan.members)
        self.times = plan.times
        self.index = plan.members[0].log.index
        self._clock = clock
        self.actor = clock.actor(Order.STEP, self.act)
        """Of two step loops that are due at the same time, the one with the smaller number acts first."""
        self._leave = leave
        self._coupling = coupling
        self._connected = any(member.scheduler.connectors for member in plan.members)
        for member in plan.members:
            if member.scheduler.loads:
                member.scheduler.loads.call(self.wake)
        self._depth = plan.depth
        self._quiet: StepTimes | None = plan.times.alone if plan.jump else None
        self._foresight = foresight if self._quiet else Foresight.NONE
        self._glider = self._glider_of(plan)
        self._min_jump = LONG if self._glider else _MIN_JUMP
        self._outlook = self._outlook_of(plan)
        self._indices = [member.log.index for member in plan.members]
        self._acted = set() if acted is None else acted
        self._unseen_until_ns = unseen_until_ns if plan.jump else 0
        self._woken_ns = 0
        """When it was to act last with nothing in flight."""
        self._noise = plan.noise
        self._leaving: list[RequestState] = []
        """Requests that left in the present action."""
        self._gated: Wave | None = None
        """The wave that waits for KV from elsewhere; nothing is scheduled behind it meanwhile."""
        self._gate_ns = 0
        """When the gated wave would have started."""
        self._reads_left = 0
        self._launched = 0
        """Waves so far; of a single instance as many as its log has steps."""
        self._reach = _LEAST_REACH
        """Steps that an outlook is for: about those from one request that comes to the next."""
        self._cut_at = 0
        """Steps before the last request came."""
        self._in_flight: deque[Wave] = deque()
        self._stage_free_ns = [0] * plan.stages
        self._piped = plan.stages > 1
        if self._piped:
            for member in plan.members:
                member.log.stages.extend(StageLog() for _ in range(plan.stages))

    def _glider_of(self, plan: LoopPlan) -> Glider | None:
        """What takes steps in a tight loop; None: they are launched, or jumped over."""
        member = plan.members[0]
        coupled = self._coupling is Coupling.STEPS or self._connected
        if self._quiet is None or coupled or plan.noise or not member.plain:
            return None
        return Glider(member, self._quiet, plan.depth)

    def _outlook_of(self, plan: LoopPlan) -> Outlook | None:
        """What lays out steps past arrivals."""
        if self._quiet is None or not self._foresight:
            return None
        through_ends = self._foresight is Foresight.THROUGH_ENDS
        return Outlook(plan.members[0].scheduler, self._quiet, plan.depth, through_ends=through_ends)

    def submit(self, member: Instance, state: RequestState, now_ns: int, released_by: int = -1) -> None:
        """Hand a request to a member; it is taken in at the next step boundary, at once if nothing runs.

        ``released_by``: the actor of the step loop in which a request ended at this very time and so let this
        one come; -1: none did.
        """
        self._acted.update(self._indices)
        if self._unseen_until_ns:
            self._catch_up(now_ns)
        member.put_in(state)
        outlook = self._outlook
        if outlook is not None and outlook.is_open:
            # if its turn at this time is over, a step was scheduled at this time, too
            outlook.cut(now_ns, after=self.actor < released_by)
            self._clock.at(outlook.next_ns(), self.actor)
        else:
            self.wake(now_ns)

    def wake(self, now_ns: int) -> None:
        """Act at ``now_ns`` unless something is in flight, whose end will be soon enough."""
        if not self._in_flight:
            self._woken_ns = now_ns
            self._clock.at(max(now_ns, self._unseen_until_ns), self.actor)

    def _catch_up(self, now_ns: int) -> None:
        """Do what was to be done before ``now_ns``."""
        due_ns = self._due_ns
        if due_ns < now_ns:
            self._go_on(self.run(due_ns, now_ns, False, due_ns))
            self._let_leave()

    @property
    def _due_ns(self) -> int:
        """When it is to act next; it may have let that time go by."""
        return self._in_flight[0].end_ns if self._in_flight else self._woken_ns

    def act(self, now_ns: int) -> None:
        """Run until something else may concern this loop, or what it has done may concern others."""
        self._acted.update(self._indices)
        outlook, begin_ns = self._outlook, now_ns
        if outlook is not None and outlook.is_open:
            member = self.members[0]
            # an outlook grows to twice its length at most, since somebody may come soon
            if now_ns < outlook.until_ns or (
                not member.has_mail and outlook.extend(min(max(outlook.steps, self._reach), _MAX_JUMP))
            ):
                outlook.pass_to(now_ns)
                member.note_left(outlook.left)
                self._clock.at(outlook.next_ns(), self.actor)
                return
            begin_ns, steps = self._in_flight[0].end_ns, self._launched
            if member.has_mail:
                self._reach, self._cut_at = max(steps - self._cut_at, _LEAST_REACH), steps
            else:
                self._reach = min(2 * self._reach, _MAX_JUMP)
        mail_ns = now_ns
        if self._unseen_until_ns:
            begin_ns = mail_ns = self._due_ns
        coupling = self._coupling
        horizon_ns = self._clock.horizon_ns(alone=coupling is Coupling.NONE)
        if coupling is Coupling.STEPS or (self._foresight and horizon_ns < NEVER):
            # Its transfers must be on the clock before it goes on; or an outlook shows what comes. What is
            # scheduled at this very time is, even if others are still to act at it.
            horizon_ns = now_ns + 1
        next_ns = self.run(begin_ns, horizon_ns, coupling is not Coupling.NONE, mail_ns)
        self._let_leave()
        if not (self._foresight and self._look_ahead()):
            self._go_on(next_ns)

    def _go_on(self, next_ns: int) -> None:
        """Act at ``next_ns``; :data:`NEVER`: something else sees to that."""
        if next_ns != NEVER:  # a time past it is refused there
            self._clock.at(max(next_ns, self._unseen_until_ns), self.actor)

    def _let_leave(self) -> None:
        """The present action is over: the requests that left in it leave the system."""
        if self._leaving:
            for state in self._leaving:
                self._leave(state)
            self._leaving.clear()

    def run(self, now_ns: int, horizon_ns: int, one_finish: bool, mail_ns: int) -> int:
        """Run from ``now_ns`` until the next action would be at ``horizon_ns`` or later.

        ``one_finish``: also return as soon as a request has left, so that what it releases can be placed in
        time. ``mail_ns``: no request is taken in before.

        Returns:
            when that action would be; :data:`NEVER` if none is in sight.

        Raises:
            RunError: requests wait that can never be scheduled.
        """
        in_flight, members = self._in_flight, self.members
        while True:
            if in_flight and in_flight[0].end_ns <= now_ns:
                self._complete(in_flight.popleft())
            if now_ns >= mail_ns:
                for member in members:
                    member.take_in(now_ns)
            starved = False
            if self._quiet and not self._gated and len(in_flight) == self._depth - 1:
                released = one_finish and bool(self._leaving)  # what that releases may come at this very time
                if self._glider is not None:
                    until_ns = now_ns + 1 if released else horizon_ns
                    now_ns = self._glide(self._glider, now_ns, until_ns, one_finish, mail_ns)
                    starved = self._glider.starved
                if not released and (self._glider is None or self._glider.quiet):
                    waits = members[0].has_mail and mail_ns < horizon_ns
                    self._jump_ahead(now_ns, mail_ns if waits else horizon_ns)
            if self._piped:
                self._fill(now_ns)
            elif not starved:
                while not self._gated and len(in_flight) < self._depth and self._launch(now_ns):
                    pass
            if not in_flight:
                for member in members:
                    if member.scheduler.waiting and not member.scheduler.awaits_others:
                        raise RunError(member.stuck_message())
                return NEVER
            if in_flight[0] is self._gated:
                return NEVER  # the last read lets it go on
            now_ns = in_flight[0].end_ns
            if now_ns >= horizon_ns or (one_finish and self._leaving):
                return now_ns

    def _fill(self, now_ns: int) -> None:
        """Schedule waves of a pipeline until as many as may be are in flight and the oldest is not empty.

        Empty ones pass at once; they are what vLLM's ``step_with_batch_queue`` puts into its queue.
        """
        in_flight, idle = self._in_flight, 0
        while not self._gated and idle <= 2 * self._depth:
            before = [member.preempted for member in self.members]
            if not any(member.scheduler.has_work for member in self.members):
                break
            if self._launch(now_ns):
                idle = 0
            else:
                in_flight.append(Wave([None] * len(self.members), 0))
                moved = before != [member.preempted for member in self.members]
                idle = 0 if moved else idle + 1
            while len(in_flight) >= self._depth and in_flight[0].empty:
                in_flight.popleft()
            if len(in_flight) >= self._depth:
                return
        while in_flight and in_flight[0].empty:
            in_flight.popleft()

    def _launch(self, now_ns: int) -> bool:
        """Schedule a wave and put it behind those in flight; False if no member has work."""
        in_flight = self._in_flight
        batches: list[Batch | None]
        if len(self.members) == 1:
            flying = bool(in_flight) and not (self._piped and all(wave.empty for wave in in_flight))
            member = self.members[0]
            batch = member.schedule(len(member.log.steps), now_ns, flying)
            if batch is None:
                return False
            batches = [batch]
        else:
            batches = [
                member.schedule(len(member.log.steps), now_ns, any(wave.batches[at] for wave in in_flight))
                for at, member in enumerate(self.members)
            ]
            if not any(batches):
                return False
        wave = Wave(batches, NEVER)
        in_flight.append(wave)
        start = max(self._stage_free_ns[0], now_ns)
        if self._piped:
            for batch in batches:
                if batch is not None and batch.after is not None:
                    start = max(start, batch.after.end_ns)
        if not self._connected or not self._read(wave, start):
            self._start(wave, start, start)
        return True

    def _read(self, wave: Wave, start_ns: int) -> bool:
        """Let a wave wait for KV from elsewhere; False if it needs none. Reads begin when it would start."""
        reads = 0
        for member, batch in zip(self.members, wave.batches, strict=True):
            if batch is not None:
                for connector in member.scheduler.connectors:
                    reads += connector.step_scheduled(batch, start_ns, self._there)
        if reads:
            self._gated, self._gate_ns, self._reads_left = wave, start_ns, reads
        return reads > 0

    def _there(self, now_ns: int) -> None:
        """One read has ended; after the last one the wave starts."""
        self._reads_left -= 1
        if self._reads_left == 0:
            assert self._gated is not None
            wave, self._gated = self._gated, None
            for member, batch in zip(self.members, wave.batches, strict=True):
                if batch is not None:
                    member.log.gates.step.append(batch.step)
                    member.log.gates.ns.append(now_ns - self._gate_ns)
            self._start(wave, self._gate_ns, now_ns)
            self._clock.at(self._in_flight[0].end_ns, self.actor)

    def _start(self, wave: Wave, since_ns: int, compute_ns: int) -> None:
        """Put a wave on the NPUs: it has been theirs since ``since_ns`` and computes from ``compute_ns``
        on."""
        free, time = self._stage_free_ns, compute_ns
        for stage, (compute, hand_over) in enumerate(self.times.stages_ns(wave.batches)):
            if self._noise:
                mixed = any(batch is not None and batch.chunks for batch in wave.batches)
                compute = self._noise.step_ns(self._launched, compute, mixed)
            time = max(time, free[stage]) + compute
            free[stage] = time
            if self._piped:
                for member, batch in zip(self.members, wave.batches, strict=True):
                    if batch is not None:
                        member.log.stages[stage].start_ns.append(time - compute)
                        member.log.stages[stage].end_ns.append(time)
            time += hand_over
        for member, batch in zip(self.members, wave.batches, strict=True):
            if batch is not None:
                batch.end_ns = time
                member.note_step(batch, since_ns)
            else:
                member.log.dummies.start_ns.append(since_ns)
                member.log.dummies.end_ns.append(time)
        wave.end_ns = time
        self._launched += 1

    def _complete(self, wave: Wave) -> None:
        for at, batch in enumerate(wave.batches):
            if batch is not None:
                self._leaving += self.members[at].finish(batch)

    # ------------------------------------------------------------------ quiet stretches of a single instance

    def _jump_ahead(self, now_ns: int, horizon_ns: int) -> None:
        """Do many steps at once while nothing but decoding goes on, with the same outcome as one by one."""
        member, in_flight = self.members[0], self._in_flight
        scheduler, steps = member.scheduler, member.log.steps
        most = _MAX_JUMP
        if horizon_ns < NEVER and len(steps) > 1:
            last_ns = steps.end_ns[-1] - steps.end_ns[-2]
            most = min(most, (horizon_ns - now_ns) // max(last_ns, 1) + 2)
        if most < self._min_jump:
            return
        for wave in in_flight:
            batch = wave.batches[0]
            if batch is None or batch.finishing:
                return
        count = scheduler.quiet_ticks(most, bool(in_flight))
        if count < self._min_jump:
            return
        start = max(self._stage_free_ns[0], now_ns)
        ends = self._priced(horizon_ns)[:count] or self._quiet_ends(start, count)
        # A step is scheduled when the step `depth` before it has ended; that must be before the horizon.
        known = [now_ns, *(wave.end_ns for wave in in_flight), *ends]
        near = bisect_left(known, horizon_ns, 0, len(ends))
        if near >= self._depth:
            self._commit(start, ends[:near])

    def _priced(self, horizon_ns: int) -> list[int]:
        """When the steps end that are laid out and scheduled before the horizon."""
        outlook = self._outlook
        if outlook is None or not outlook.is_open:
            return []
        return outlook.ends_before(self._launched, min(outlook.until_ns, horizon_ns))

    def _glide(self, glider: Glider, now_ns: int, horizon_ns: int, one_finish: bool, mail_ns: int) -> int:
        """Take steps up to the horizon; returns when it stopped."""
        in_flight, free_ns = self._in_flight, self._stage_free_ns[0]
        flying = [wave.batches[0] for wave in in_flight]
        priced = self._priced(horizon_ns)
        taken = glider.run(flying, free_ns, now_ns, horizon_ns, one_finish, priced, mail_ns)
        if not taken:
            return now_ns
        self._launched += taken
        self._leaving += glider.left
        in_flight.clear()
        for batch in glider.in_flight:
            in_flight.append(Wave([batch], batch.end_ns))
        self._stage_free_ns[0] = glider.free_ns
        return glider.now_ns

    def _look_ahead(self) -> bool:
        """Lay out what comes if no request does, and act no earlier than that matters to others; False if
        that cannot be told."""
        in_flight, outlook = self._in_flight, self._outlook
        self._close_outlook()
        if outlook is None or self._gated or len(in_flight) < self._depth:
            return False
        flying = [batch for wave in in_flight if (batch := wave.batches[0]) is not None]
        if self._glider is not None:
            outlook.open(self._launched, flying, self._reach)
        else:
            self._open_quiet(outlook, flying)
        if outlook.is_open:
            self._clock.at(outlook.next_ns(), self.actor)
        return outlook.is_open

    def _open_quiet(self, outlook: Outlook, flying: Sequence[Batch]) -> None:
        """Lay out the steps up to the next end of a request, where a step is more than its decodes'
        lengths."""
        if any(state.stops for batch in flying for state in batch.finishing):
            return
        most = next((place for place, batch in enumerate(flying) if batch.finishing), self._reach)
        count = self.members[0].scheduler.quiet_ticks(most, self._depth > 1)
        if count >= _MIN_JUMP:
            known = [batch.end_ns for batch in flying]
            outlook.open_with(self._launched, known + self._quiet_ends(known[-1], count))

    def _close_outlook(self) -> None:
        if self._outlook is not None and self._outlook.is_open:
            self._outlook.close()
            self.members[0].note_left(0)

    def settle(self, now_ns: int) -> None:
        """Take the steps that are scheduled before ``now_ns`` and were put off."""
        if self._unseen_until_ns:
            self._catch_up(now_ns)
        outlook = self._outlook
        if outlook is None or not outlook.is_open:
            return
        next_ns = self._in_flight[0].end_ns
        stays = self._glider is not None and outlook.covers(now_ns)
        if next_ns < now_ns:
            next_ns = self.run(next_ns, now_ns, False, outlook.until_ns)
        if stays:
            outlook.steps_taken(len(self._leaving))
            self.members[0].note_left(outlook.left)
        else:
            self._close_outlook()
            self._go_on(next_ns)
        self._let_leave()

    def _commit(self, start_ns: int, ends: list[int]) -> None:
        """Do quiet steps that follow each other from ``start_ns`` on; those of them that have not ended are
        in flight then."""
        member, in_flight, depth = self.members[0], self._in_flight, self._depth
        count, first = len(ends), len(member.log.steps)
        log_quiet_steps(member, start_ns, ends, member.scheduler.run_quietly(count))
        self._stage_free_ns[0] = ends[-1]
        self._launched += count
        for _ in range(min(count - 1, len(in_flight))):
            in_flight.popleft()
        for step in range(max(count - depth, 0), count):
            in_flight.append(Wave([Batch(first + step, ends[step])], ends[step]))

    def _quiet_ends(self, start_ns: int, count: int) -> list[int]:
        """Ends of the next ``count`` steps from ``start_ns`` on, which nothing but the present decodes takes
        part in."""
        assert self._quiet is not None
        durations = self._quiet_ns(self._quiet, self.members[0].scheduler.decodes, count)
        return list(accumulate(durations, initial=start_ns))[1:]

    def _quiet_ns(self, times: StepTimes, decodes: DecodeSet, count: int) -> Sequence[int]:
        """Durations of the next ``count`` steps, which nothing but the present decodes takes part in."""
        n, (kv_sum, kv_min, kv_max) = decodes.count, decodes.lengths()
        if count < _MIN_VECTOR and not self._noise:
            step_ns = times.decode_ns
            return [step_ns(n, kv_sum + i * n, kv_min + i, kv_max + i) for i in range(count)]
        durations = times.decode_run_ns(n, kv_sum, kv_min, kv_max, count)
        if self._noise:
            durations = self._noise.run_ns(self._launched, durations)
        counted: list[int] = durations.tolist()
        return counted


def log_quiet_steps(member: Instance, start_ns: int, ends: list[int], used: list[int]) -> None:
    """Write down steps of the present decodes that followed each other from ``start_ns`` on, ending at
    ``ends`` with ``used`` blocks held."""
    scheduler = member.scheduler
    member.log.steps.append_quiet(
        start_ns, ends, used, scheduler.decodes.count, len(scheduler.running), len(scheduler.waiting)
    )
