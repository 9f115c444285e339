"""One run of a workload: lets requests arrive, hands them to instances, and takes them out when they end."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from servesim.compiled import mypyc_attr
from servesim.engine.arrivals import Arrivals, FrontEnds, QueueLimits
from servesim.engine.clock import Clock, Order
from servesim.engine.router import Router
from servesim.engine.step_loop import Coupling, Foresight, LoopPlan, StepLoop
from servesim.errors import BrokenRunError
from servesim.results.records import RejectedRequest, RunLog
from servesim.specs.options import output_fields
from servesim.specs.vllm_versions import CUTS_ANSWERS
from servesim.workload.generators import write_jsonl

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence

    from servesim.engine.connector import HandOver, Journey
    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState
    from servesim.results.records import MovedBytes
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Request, Workload

_ANY_MODEL = ""


class Observer(Protocol):
    """Somebody who wants to see the run while it goes on, such as the heartbeat."""

    next_ns: int
    """Simulated time from which on the next call is wanted."""

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Called when the clock has passed ``next_ns``, and with the final time at the end."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Simulation:
    """One run of a workload on a set of instances."""

    def __init__(
        self,
        plans: Sequence[LoopPlan],
        workload: Workload,
        options: RuntimeOptions,
        *,
        clock: Clock | None = None,
        pipeline_tracks: list[array[int]] | None = None,
        moved: list[MovedBytes] | None = None,
        hand_over: HandOver | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """
        Args:
            plans: what the step loops run; their members are the instances of the cluster.
            workload: what arrives.
            options: those that concern the run as a whole.
            clock: the one that the transfers of the instances' connectors use.
            pipeline_tracks: where pipelines note the times of their tokens; see :class:`RunLog`.
            moved: where transfers are noted; see :class:`RunLog`.
            hand_over: moves KV from prefill to decode instances, where there are any.
            notes: what was asked for and does not act.
        """
        members = [member for plan in plans for member in plan.members]
        self.instances = sorted(members, key=lambda member: member.log.index)
        logs = [instance.log for instance in self.instances]
        # not a copy of the tracks: pipelines add theirs while they run
        tracks = pipeline_tracks if pipeline_tracks is not None else []
        moved = [] if moved is None else moved
        self.log = RunLog(logs, pipeline_tracks=tracks, notes=list(notes), moved=moved)
        limits = options.max_num_queued_reqs, options.max_num_queued_tokens
        self._limits = QueueLimits(*limits, self.log) if limits != (None, None) else None
        self._clock = clock or Clock()
        self._workload = workload
        self._request = workload.lookup
        self._arrivals = Arrivals(workload, options.max_concurrency)
        self._arrival = self._clock.actor(Order.REQUEST, self._arrive)
        times_us = [log.front_end_us for log in logs]
        self._front_ends: FrontEnds | None = None
        if any(max(pair) for pair in times_us):
            self._front_ends = FrontEnds(times_us, len(workload), options.seed)
            self._received = self._clock.actor(Order.REQUEST, self._receive)
        self._refresh_ns = round(options.router_refresh * 1e9)
        self._router = Router(self.instances, options.request_routing_policy, options.seed, self._refresh_ns)
        self._sticky = options.sticky_sessions
        self._released_by: dict[int, int] = {}
        """Time at which requests are still to arrive that an end at that very time let come → actor of the
        step loop of the last such end."""
        self._taken_by: dict[int, int] = {}
        """Request → index of the instance that took it in, where sessions stay."""
        self._hand_over = hand_over
        self._fronts: dict[str, list[int]] = defaultdict(list)
        """Model → instances that take new requests; the decode sides are in ``_backs``."""
        self._backs: dict[str, list[int]] = defaultdict(list)
        for log in logs:
            side = self._backs if log.spec.pd_type == "decode" else self._fronts
            for model in (_ANY_MODEL, log.spec.model_name):
                side[model].append(log.index)
        coupling = Coupling.ENDS if self._arrivals.feedback else Coupling.NONE
        if any(member.scheduler.connectors for member in members):
            coupling = Coupling.STEPS
        self._loops: dict[int, StepLoop] = {}
        """Index of an instance -> the loop that runs it."""
        foresight, unseen_until_ns = Foresight.NONE, 0
        if len(plans) > 1 and self._router.looks_at_counts and coupling is not Coupling.STEPS:
            if self._arrivals.feedback or self._limits:
                foresight = Foresight.TO_AN_END
            elif self._router.looks_at_nothing:
                unseen_until_ns = self._arrivals.last_planned_ns
            else:
                foresight = Foresight.THROUGH_ENDS
        for plan in plans:
            loop = StepLoop(
                plan, self._clock, self._end, coupling, foresight, self._router.acted, unseen_until_ns
            )
            self._loops.update((member.log.index, loop) for member in plan.members)

    def run(self, observer: Observer | None = None) -> RunLog:
        """Run to the end of the workload.

        Raises:
            RunError: requests are left that can never be served.
            BrokenRunError: requests or KV blocks got lost.
            OverflowError: the clock passes :data:`~servesim.engine.clock.NEVER`.
        """
        clock, log = self._clock, self.log
        if self._refresh_ns:
            clock.watch(self._router.next_ns, self._router.refresh)
        if observer:
            clock.watch(observer.next_ns + 1, partial(self._show, observer))
        clock.at(self._arrivals.next_ns, self._arrival)
        clock.run()
        self._check_all_ended()
        self._check_pools()
        log.close()
        if observer:
            observer.advance(log.end_ns, log)
        return log

    def _show(self, observer: Observer, now_ns: int) -> int:
        """Let an observer see the run; returns from when on it wants to see it again."""
        for loop in self._loops.values():
            loop.settle(now_ns)
        observer.advance(now_ns, self.log)
        return observer.next_ns + 1

    # ------------------------------------------------------------------ requests

    def _arrive(self, now: int) -> None:
        """Let the next request arrive; it may have to wait outside."""
        arrival = self._arrivals.pop()
        self._clock.at(self._arrivals.next_ns, self._arrival)
        if arrival is not None:
            self._route(self._request(arrival[1]), now)
        if self._arrivals.next_ns != now:
            self._released_by.pop(now, None)

    def _route(self, request: Request, now: int) -> None:
        """Hand a request that has arrived to the instance that the router chooses."""
        index = request.index
        model = request.model or _ANY_MODEL
        fronts, backs = self._fronts[model], self._backs[model]
        refusal = self._limits.refusal(now) if self._limits else ""
        if refusal:
            self._taken_by[index] = fronts[0]
            self._reject(index, fronts[0], now, refusal)
            return
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
        state = instance.new_state(request, now)
        if self._limits:
            self._limits.let_in(state)
        self._send_in(instance, state, now)

    def _send_in(self, instance: Instance, state: RequestState, now: int) -> None:
        """Hand a request that has arrived to its instance, by way of the front end if that takes time."""
        ends = self._front_ends
        time_ns = ends.ns(instance.log.index, state.request.index) if ends else 0
        if ends is None or not time_ns:
            self._submit(instance, state, now)
            return
        state.record.front_end_ns = time_ns
        self._router.sent(instance.log.index)
        ends.send(state, now + time_ns)
        self._clock.at(ends.next_ns, self._received)

    def _receive(self, now: int) -> None:
        """The engine gets the next request from its front end."""
        ends = self._front_ends
        assert ends is not None
        state = ends.pop()
        self._clock.at(ends.next_ns, self._received)
        self._router.received(state.record.instance)
        self._submit(self.instances[state.record.instance], state, now)

    def _submit(self, instance: Instance, state: RequestState, now: int) -> None:
        self._loops[instance.log.index].submit(instance, state, now, self._released_by.get(now, -1))

    def _last_of_session(self, request: Request, fronts: list[int]) -> list[int]:
        """The one of ``fronts`` that took the latest request of the same session; empty if none did.

        A session may ask for several models, and not every instance serves the one asked for now.
        """
        before = request.predecessor
        while before >= 0:
            if self._taken_by[before] in fronts:
                return [self._taken_by[before]]
            before = self._request(before).predecessor
        return []

    def _send_through(self, request: Request, prefill: Instance, backs: list[int], now: int) -> bool:
        """Hand a request to a prefill instance, with the decode instance it will go on to; False if it is
        rejected."""
        assert self._hand_over is not None
        model = prefill.log.spec.model_name
        backs = [index for index in backs if self.instances[index].log.spec.model_name == model]
        decode = self._router.choose(request, backs, "decode")
        target = self.instances[decode.index]
        reason = why_impossible(request, prefill, 1) or why_impossible(request, target)
        if reason:
            self._reject(request.index, prefill.log.index, now, reason)
            return False
        state = prefill.new_state(request, now, output_tokens=1)
        wake = self._loops[prefill.log.index].wake
        self._hand_over.send(state, prefill, decode, target, wake, self._arrive_at_decode)
        self._send_in(prefill, state, now)
        return True

    def _arrive_at_decode(self, journey: Journey, now: int) -> None:
        """The KV of a prompt is there: queue its request where it will be decoded."""
        target, record = journey.target, journey.state.record
        record.hand_over(target.log.index, now)
        journey.decode.expect_one()
        self._submit(target, target.new_state(journey.state.request, now, handed_over=record), now)

    def _end(self, state: RequestState) -> None:
        record = state.record
        self.log.add_ended(record)
        if self._arrivals.feedback:
            self._ended(record.request, record.end_ns, self._loops[record.instance].actor)

    def _ended(self, index: int, now: int, actor: int = -1) -> None:
        """A request has left the system, which may let another one arrive; ``actor``: of the step loop in
        which it ended."""
        if self._arrivals.ended(index, now) and actor >= 0:
            self._released_by[now] = actor
        self._clock.at(self._arrivals.next_ns, self._arrival)

    def _reject(self, index: int, instance: int, now: int, reason: str) -> None:
        self.log.rejected.append(RejectedRequest(index, instance, now, reason))
        for successor in self._arrivals.drop_successors(index):
            reason = f"request {index} of its session was rejected"
            self.log.rejected.append(RejectedRequest(successor, instance, now, reason))
        if self._arrivals.feedback:
            self._ended(index, now)

    def _check_all_ended(self) -> None:
        ended = np.zeros(len(self._workload), dtype=np.bool_)
        ended[self.log.requests.column("request")] = True
        ended[[rejected.request for rejected in self.log.rejected]] = True
        left = np.flatnonzero(~ended).tolist()
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
    prompt, longest = request.input_tokens, options.max_model_len
    asked = max(output, request.max_tokens if output_tokens is None else 0)
    if prompt + asked > longest and (
        prompt + 1 > longest or asked > longest or not CUTS_ANSWERS.holds(options.vllm_version)
    ):
        return (
            f"{prompt} prompt + {asked} output tokens exceed the longest context of {longest} (max_model_len)"
        )
    total = min(prompt + output, longest)
    if not options.enable_chunked_prefill and prompt > options.max_num_batched_tokens:
        return (
            f"the prompt of {prompt} tokens exceeds max_num_batched_tokens {options.max_num_batched_tokens}, "
            "and chunked prefill is off"
        )
    speculation = instance.scheduler.speculation
    reach = total - 1 if speculation is None else speculation.most_reach(total)
    needed = capacity.admitted_blocks(reach, options)
    if needed > capacity.usable_blocks:
        return f"its KV cache takes {needed} blocks, and there are {capacity.usable_blocks}"
    return ""


_APPLIED = ("hardware", "model", "tp", "num_reqs", "lenient", "request_rate")
"""Options that the loaded cluster and workload hold already."""


def save_reproduction(cluster: ClusterSpec, workload: Workload, options: RuntimeOptions) -> Path:
    """Write the input of a run to a new folder among the temporary files and return the folder.

    In the folder, this is the run again::

        servesim.simulate("cluster.json", "workload.jsonl.gz", **json.load(open("options.json")))

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="servesim-fault-"))
    described = cluster.model_dump(mode="json", exclude_unset=True)
    chosen = options.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"cluster_config", "dataset", "run_id", *_APPLIED, *output_fields()},
    )
    for name, content in (("cluster.json", described), ("options.json", chosen)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_jsonl(workload, folder / "workload.jsonl.gz")
    return folder
