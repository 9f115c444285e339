"""The simulation clock: lets requests arrive and instances run, in order of time."""

from __future__ import annotations

from collections import defaultdict
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

from serving.engine.arrivals import NEVER, Arrivals
from serving.engine.block_tables import BlockTables
from serving.engine.instance import Instance
from serving.engine.router import load_policy
from serving.engine.scheduler import Scheduler, SchedulerLimits
from serving.engine.step_loop import SingleTimes, StepLoop
from serving.errors import InputError
from serving.memory.kv_cache import KvCache
from serving.results.records import InstanceLog, RejectedRequest, RunLog

if TYPE_CHECKING:
    from array import array

    from serving.specs.cluster import ClusterSpec
    from serving.specs.options import InstanceOptions, RuntimeOptions
    from serving.workload.request import Request, Workload

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
        lane_times: list[array[int]] | None = None,
    ) -> None:
        """
        Args:
            loops: step loops, whose members in order are the instances of the cluster.
            workload: what arrives.
            options: those that concern the run as a whole.
            lane_times: where pipelines note the times of their tokens; see :class:`RunLog`.
        """
        instances = [member for loop in loops for member in loop.members]
        self.instances = instances
        self.log = RunLog([instance.log for instance in instances])
        if lane_times is not None:
            self.log.lane_times = lane_times
        self._loops = loops
        self._workload = workload
        self._arrivals = Arrivals(workload, options.max_concurrency)
        self._policy = load_policy(options.request_routing_policy, options.seed)
        self._loop_of = [index for index, loop in enumerate(loops) for _ in loop.members]
        self._candidates: dict[str, list[Instance]] = defaultdict(list)
        for instance in instances:
            for model in (_ANY_MODEL, instance.log.spec.model_name):
                self._candidates[model].append(instance)
        self._agenda: list[tuple[int, int]] = []
        """(time, loop) of every loop that will act; entries whose time has changed are void."""

    def run(self, observer: Observer | None = None) -> RunLog:
        """Run to the end of the workload.

        Raises:
            RunError: requests are left that can never be scheduled.
        """
        arrivals, agenda, loops = self._arrivals, self._agenda, self._loops
        observe_ns = observer.next_ns if observer else NEVER
        now = 0
        while True:
            while agenda and loops[agenda[0][1]].next_ns != agenda[0][0]:
                heappop(agenda)
            acts_ns = agenda[0][0] if agenda else NEVER
            now = min(arrivals.next_ns, acts_ns)
            if now == NEVER:
                break
            if observer and now > observe_ns:
                observer.advance(now, self.log)
                observe_ns = observer.next_ns
            if arrivals.next_ns <= acts_ns:
                self._arrive()
            else:
                self._act(heappop(agenda)[1], observe_ns)
        self.log.end_ns = max((record.end_ns for record in self.log.requests), default=0)
        self.log.requests.sort(key=lambda record: record.request)
        self.log.rejected.sort(key=lambda rejected: rejected.request)
        if observer:
            observer.advance(self.log.end_ns, self.log)
        return self.log

    def _act(self, index: int, observe_ns: int) -> None:
        loop = self._loops[index]
        feedback = self._arrivals.feedback
        horizon = min(self._arrivals.next_ns, observe_ns + 1)
        if feedback and self._agenda:
            # another instance may end a request, and so release one, at its next step end
            horizon = min(horizon, self._agenda[0][0])
        loop.run(horizon, feedback)
        self._plan(index)
        for state in loop.finished:
            record = state.record
            record.first_token_ns = self._token_ns(*record.token_steps[0][:2])
            self.log.requests.append(record)
            if feedback:
                self._arrivals.ended(record.request, record.end_ns)
        loop.finished.clear()

    def _plan(self, index: int) -> None:
        """Put the next action of a loop on the agenda."""
        if self._loops[index].next_ns < NEVER:
            heappush(self._agenda, (self._loops[index].next_ns, index))

    def _token_ns(self, track: int, entry: int) -> int:
        lane = track - len(self.instances)
        times = self.instances[track].log.steps.end_ns if lane < 0 else self.log.lane_times[lane]
        return times[entry]

    def _arrive(self) -> None:
        arrival = self._arrivals.pop()
        if arrival is None:
            return
        now, index = arrival
        request = self._workload.requests[index]
        candidates = self._candidates[request.model or _ANY_MODEL]
        instance = candidates[0] if len(candidates) == 1 else self._policy(request, candidates)
        reason = why_impossible(request, instance)
        if reason:
            self._reject(index, instance.log.index, now, reason)
            return
        instance.submit(instance.new_state(request, now), now)
        self._plan(self._loop_of[instance.log.index])

    def _reject(self, index: int, instance: int, now: int, reason: str) -> None:
        self.log.rejected.append(RejectedRequest(index, instance, now, reason))
        for successor in self._arrivals.drop_successors(index):
            reason = f"request {index} of its session was rejected"
            self.log.rejected.append(RejectedRequest(successor, instance, now, reason))
        if self._arrivals.feedback:
            self._arrivals.ended(index, now)


def why_impossible(request: Request, instance: Instance) -> str:
    """Why ``request`` could never run to its end on ``instance``; empty if it can."""
    options, capacity = instance.log.options, instance.log.capacity
    prompt, total = request.input_tokens, request.input_tokens + request.output_tokens
    if total > options.max_model_len:
        return (
            f"{prompt} prompt + {request.output_tokens} output tokens exceed the model's context length of "
            f"{options.max_model_len}"
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


def limits_of(options: InstanceOptions, skip_prefill: bool) -> SchedulerLimits:
    """The scheduler's view of an instance's options."""
    return SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        long_prefill_token_threshold=options.long_prefill_token_threshold,
        chunked_prefill=options.enable_chunked_prefill,
        reserve_full_isl=options.reserve_full_isl,
        skip_prefill=skip_prefill,
    )


def build_loops(cluster: ClusterSpec, workload: Workload, options: RuntimeOptions) -> list[StepLoop]:
    """The instances of a cluster, with their kernel times loaded and their memory planned.

    Raises:
        InputError: a bundle is missing or wrong, or something does not fit.
    """
    from serving.latency.step_timer import build_step_timer
    from serving.memory.sizing import kv_cache_capacity
    from serving.specs.cluster_checks import check_cluster
    from serving.specs.options import resolve

    models = check_cluster(cluster)
    loops = []
    tables = BlockTables(workload)
    for index, (node, spec) in enumerate(cluster.instances):
        model = models[spec.model_name]
        resolved = resolve(options, spec, model)
        timer = build_step_timer(spec, model, resolved, cluster)
        capacity = kv_cache_capacity(model, spec, resolved, f"instance {index}")
        log = InstanceLog(index, node, spec, resolved, capacity, timer.bundle.describe())
        cache = KvCache(capacity.num_blocks, resolved.block_size, resolved.enable_prefix_caching)
        scheduler = Scheduler(limits_of(resolved, options.skip_prefill), cache)
        member = Instance(log, scheduler, tables)
        depth = 2 if resolved.async_scheduling else 1
        loops.append(StepLoop([member], SingleTimes(timer), depth=depth, jump=not options.stepped))
    return loops


def check_models(cluster: ClusterSpec, workload: Workload) -> None:
    """Raise InputError if a request asks for a model that no instance serves."""
    served = {spec.model_name for _, spec in cluster.instances}
    for request in workload:
        if request.model and request.model not in served:
            raise InputError(
                f"{workload.source}: request {request.index} asks for model {request.model}, which no "
                f"instance serves; served: {', '.join(sorted(served))}"
            )


def run(
    cluster: ClusterSpec, workload: Workload, options: RuntimeOptions, observer: Observer | None = None
) -> RunLog:
    """Simulate ``workload`` on ``cluster``.

    Raises:
        InputError: the cluster cannot be built as described.
        RunError: the run cannot be finished.
    """
    check_models(cluster, workload)
    return Simulation(build_loops(cluster, workload, options), workload, options).run(observer)
