"""The simulation clock: lets requests arrive, instances run and KV travel, in order of time."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

from servesim.engine.arrivals import NEVER, Arrivals
from servesim.engine.hand_over import HandOver, Journey
from servesim.engine.router import Router
from servesim.errors import BrokenRunError
from servesim.results.records import RejectedRequest, RunLog

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState
    from servesim.engine.step_loop import StepLoop
    from servesim.engine.transfers import Route, Transfers
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Request, Workload

_ANY_MODEL = ""


class Observer(Protocol):
    """Somebody who wants to see the run while it goes on, such as the heartbeat."""

    next_ns: int
    """Simulated time from which on the next call is wanted."""

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Called when the clock has passed ``next_ns``, and with the final time at the end."""


class Simulation:
    """One run of a workload on a set of instances."""

    def __init__(
        self,
        loops: list[StepLoop],
        workload: Workload,
        options: RuntimeOptions,
        *,
        lane_times: list[array[int]] | None = None,
        transfers: Transfers | None = None,
        hand_over: HandOver | None = None,
        route: Callable[[Instance, Instance], Route] | None = None,
    ) -> None:
        """
        Args:
            loops: step loops, whose members are the instances of the cluster.
            workload: what arrives.
            options: those that concern the run as a whole.
            lane_times: where pipelines note the times of their tokens; see :class:`RunLog`.
            transfers: bytes on the move, where KV travels between instances or from lower tiers.
            hand_over: moves KV from prefill to decode instances, where there are any.
            route: the way from one instance to another; goes with ``hand_over``.
        """
        self.loops = loops
        self.instances = sorted(
            (member for loop in loops for member in loop.members), key=lambda member: member.log.index
        )
        self.log = RunLog([instance.log for instance in self.instances])
        if lane_times is not None:
            self.log.lane_times = lane_times
        self._workload = workload
        self._arrivals = Arrivals(workload, options.max_concurrency)
        self._router = Router(
            self.instances,
            options.request_routing_policy,
            options.seed,
            round(options.router_refresh * 1e9),
        )
        self._sticky = options.sticky_sessions
        self._taken_by: dict[int, int] = {}
        """Request → index of the instance that took it in, where sessions stay."""
        self._transfers = transfers
        self._feedback = self._arrivals.feedback or transfers is not None
        """Whether what one instance does can concern another, or the arrivals, at once."""
        self._hand_over = hand_over
        self._route = route
        for instance in self.instances:
            if hand_over and instance.log.spec.pd_type == "prefill":
                instance.scheduled = hand_over.step_scheduled
        self._fronts: dict[str, list[int]] = defaultdict(list)
        """Model → instances that take new requests; the decode sides are in ``_backs``."""
        self._backs: dict[str, list[int]] = defaultdict(list)
        for instance in self.instances:
            side = self._backs if instance.log.spec.pd_type == "decode" else self._fronts
            for model in (_ANY_MODEL, instance.log.spec.model_name):
                side[model].append(instance.log.index)
        for index, loop in enumerate(loops):
            loop.transfers = transfers
            loop.woken = partial(self._plan, index)
        self._agenda: list[tuple[int, int]] = []
        """(time, loop) of every loop that will act; entries whose time has changed are void."""

    # ------------------------------------------------------------------ the clock

    def run(self, observer: Observer | None = None) -> RunLog:
        """Run to the end of the workload.

        At equal times KV arrives first, then requests, and loops act last.

        Raises:
            RunError: requests are left that can never be served.
            BrokenRunError: requests or KV blocks got lost.
            OverflowError: the clock passes :data:`NEVER`.
        """
        arrivals, agenda, loops, router = self._arrivals, self._agenda, self.loops, self._router
        transfers = self._transfers
        observe_ns = observer.next_ns if observer else NEVER
        while True:
            while agenda and loops[agenda[0][1]].next_ns != agenda[0][0]:
                heappop(agenda)
            acts_ns = agenda[0][0] if agenda else NEVER
            moves_ns = transfers.next_ns if transfers else NEVER
            arrives_ns = arrivals.next_ns
            now = min(arrives_ns, acts_ns, moves_ns)
            if now == NEVER:
                if max(arrives_ns, *(loop.next_ns for loop in loops)) > NEVER:
                    raise OverflowError("simulated time")
                break
            if now >= router.next_ns:
                router.refresh(now)
            if observer and now > observe_ns:
                observer.advance(now, self.log)
                observe_ns = observer.next_ns
            if moves_ns <= now:
                self._move(now)
            elif arrives_ns <= now:
                self._arrive()
            else:
                self._act(heappop(agenda)[1], min(arrives_ns, observe_ns + 1, router.next_ns, moves_ns))
        self._check_all_ended()
        self._check_pools()
        self.log.end_ns = max((record.end_ns for record in self.log.requests), default=0)
        self.log.requests.sort(key=lambda record: record.request)
        self.log.rejected.sort(key=lambda rejected: rejected.request)
        if observer:
            observer.advance(self.log.end_ns, self.log)
        return self.log

    def _act(self, index: int, horizon: int) -> None:
        """Run a loop until ``horizon`` or as long as nothing that others do can concern it."""
        loop = self.loops[index]
        feedback = self._feedback
        if feedback and self._agenda:
            # another instance may end a request, and so release one, at its next step end
            horizon = min(horizon, self._agenda[0][0])
        if self._transfers:
            horizon = min(horizon, loop.next_ns + 1)  # one action at a time: its transfers must be placed
        loop.run(horizon, feedback)
        self._plan(index)
        if loop.finished:
            for state in loop.finished:
                if not (self._hand_over and self._hand_over.computed(state)):
                    self._end(state)
            loop.finished.clear()

    def _plan(self, index: int) -> None:
        """Put the next action of a loop on the agenda."""
        if self.loops[index].next_ns < NEVER:
            heappush(self._agenda, (self.loops[index].next_ns, index))

    # ------------------------------------------------------------------ requests

    def _arrive(self) -> None:
        arrival = self._arrivals.pop()
        if arrival is None:
            return
        now, index = arrival
        request = self._workload.requests[index]
        model = request.model or _ANY_MODEL
        fronts, backs = self._fronts[model], self._backs[model]
        if self._sticky:
            fronts = self._last_of_session(request, fronts) or fronts
        front = self._router.choose(request, fronts)
        instance = self.instances[front.index]
        if self._sticky:
            self._taken_by[index] = instance.log.index
        if instance.log.spec.pd_type == "prefill":
            if self._send_through(request, instance, backs, now):
                front.expect_one()
            return
        reason = why_impossible(request, instance)
        if reason:
            self._reject(index, instance.log.index, now, reason)
            return
        front.expect_one()
        instance.submit(instance.new_state(request, now), now)

    def _last_of_session(self, request: Request, fronts: list[int]) -> list[int]:
        """The one of ``fronts`` that took the latest request of the same session; empty if none did.

        A session may ask for several models, and not every instance serves the one asked for now.
        """
        before = request.predecessor
        while before >= 0:
            if self._taken_by[before] in fronts:
                return [self._taken_by[before]]
            before = self._workload.requests[before].predecessor
        return []

    def _send_through(self, request: Request, prefill: Instance, backs: list[int], now: int) -> bool:
        """Hand a request to a prefill instance, with the decode instance it will go on to; False if it is
        rejected."""
        assert self._hand_over is not None
        assert self._route is not None
        model = prefill.log.spec.model_name
        backs = [index for index in backs if self.instances[index].log.spec.model_name == model]
        decode = self._router.choose(request, backs, "decode")
        target = self.instances[decode.index]
        reason = why_impossible(request, prefill, 1) or why_impossible(request, target)
        if reason:
            self._reject(request.index, prefill.log.index, now, reason)
            return False
        state = prefill.new_state(request, now)
        state.total_tokens = request.input_tokens + 1
        self._hand_over.send(Journey(state, prefill, decode, target, self._route(prefill, target)))
        prefill.submit(state, now)
        return True

    def _move(self, now: int) -> None:
        """Let transfers start and end; KV that has arrived brings its request along."""
        assert self._transfers is not None
        self._transfers.advance(now)
        if self._hand_over:
            for journey in self._hand_over.arrived:
                self._arrive_at_decode(journey, now)
            self._hand_over.arrived.clear()

    def _arrive_at_decode(self, journey: Journey, now: int) -> None:
        target, record = journey.target, journey.state.record
        record.token_steps.clear()  # the user gets the first token from the decode instance
        record.decode_instance, record.handed_over_ns = target.log.index, now
        state = target.new_state(journey.state.request, now)
        state.record = record
        state.kv_arrived = True
        journey.decode.expect_one()
        target.submit(state, now)

    def _end(self, state: RequestState) -> None:
        record = state.record
        track, entry, _ = record.token_steps[0]
        lane = track - len(self.instances)
        times = self.instances[track].log.steps.end_ns if lane < 0 else self.log.lane_times[lane]
        record.first_token_ns = times[entry]
        self.log.requests.append(record)
        if self._arrivals.feedback:
            self._arrivals.ended(record.request, record.end_ns)

    def _reject(self, index: int, instance: int, now: int, reason: str) -> None:
        self.log.rejected.append(RejectedRequest(index, instance, now, reason))
        for successor in self._arrivals.drop_successors(index):
            reason = f"request {index} of its session was rejected"
            self.log.rejected.append(RejectedRequest(successor, instance, now, reason))
        if self._arrivals.feedback:
            self._arrivals.ended(index, now)

    def _check_all_ended(self) -> None:
        ended = {record.request for record in self.log.requests}
        ended.update(rejected.request for rejected in self.log.rejected)
        left = [request.index for request in self._workload if request.index not in ended]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise BrokenRunError(
                "the run cannot go on: nothing is left to do, but requests "
                f"{', '.join(map(str, left[:5]))}{more} have not ended"
            )

    def _check_pools(self) -> None:
        for instance in self.instances:
            pool = instance.scheduler.kv.pool
            if not pool.is_whole:
                raise BrokenRunError(
                    f"the KV blocks of instance {instance.log.index} do not add up: every request has ended, "
                    f"and {pool.num_free} of {pool.usable} blocks count as free, or some are free twice"
                )


def why_impossible(request: Request, instance: Instance, output_tokens: int | None = None) -> str:
    """Why ``request`` could never run to its end on ``instance``; empty if it can.

    ``output_tokens``: those to be generated there, all of them by default.
    """
    options, capacity = instance.log.options, instance.log.capacity
    output = request.output_tokens if output_tokens is None else output_tokens
    prompt, total = request.input_tokens, request.input_tokens + output
    if total > options.max_model_len:
        return (
            f"{prompt} prompt + {output} output tokens exceed the longest context of {options.max_model_len} "
            "(max_model_len)"
        )
    if not options.enable_chunked_prefill and prompt > options.max_num_batched_tokens:
        return (
            f"the prompt of {prompt} tokens exceeds max_num_batched_tokens {options.max_num_batched_tokens}, "
            "and chunked prefill is off"
        )
    needed = -(-(total - 1) // capacity.block_size)
    if needed > capacity.usable_blocks:
        return f"its KV cache takes {needed} blocks, and there are {capacity.usable_blocks}"
    return ""
