"""Run a golden's workload through the simulator's engine and write the same log that vLLM's scheduler left.

The engine runs with the golden's settings and its step formula in the place of a measured step timer.
:class:`Notes` keep what the engine itself does not: which request got how many tokens, and who was preempted
in a schedule that came out empty.
"""

from __future__ import annotations

from dataclasses import asdict
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from servesim.bench.kv_loads import Elsewhere
from servesim.bench.record_scheduler import PRIVATE_TOKEN
from servesim.bench.scheduler_log import LoggedRequest, LoggedStep, SchedulerLog
from servesim.bench.step_formula import StepFormula
from servesim.bench.vllm_scheduler import SchedulerSettings
from servesim.engine.block_tables import BlockTables
from servesim.engine.build import track_maker
from servesim.engine.clock import Clock, Order
from servesim.engine.connector import Connector, Found
from servesim.engine.instance import Instance
from servesim.engine.kv_loads import KvLoads, LateFrees
from servesim.engine.limits import SchedulerLimits
from servesim.engine.pipeline import Pipeline
from servesim.engine.queue_policy import queue_policy
from servesim.engine.scheduler import Scheduler
from servesim.engine.simulation import Simulation
from servesim.engine.speculation import hash_lookahead, speculation_of
from servesim.engine.step_loop import LoopPlan
from servesim.memory.group_cache import kv_cache_of
from servesim.memory.group_tables import GroupRules
from servesim.results.records import InstanceLog, RequestRecord, RunLog
from servesim.specs.options import RuntimeOptions
from servesim.specs.vllm_versions import (
    AWAITS_BATCHES,
    COUNTS_VICTIMS,
    HOLDERS_FIRST,
    LOCAL_CADENCE,
    LONE_PREFILL,
    NEWEST,
    ONE_QUEUE,
    RUNNING_LORAS,
    SERVES_ON,
    SPARES_FLYING,
)
from servesim.workload.hashes import prompt_ids
from tests.golden.golden_file import drains, is_drained, version_of
from tests.hand_made import OneInstance

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.instance import StepHook
    from servesim.engine.request_state import RequestState
    from servesim.engine.speculation import Speculation
    from servesim.memory.kv_cache import AnyKvCache
    from servesim.specs.vllm_versions import VllmVersion
    from servesim.workload.request import Request, Workload
    from tests.golden.golden_file import Golden


class Notes:
    """A note of every step that a scheduler makes; follows its instance."""

    def __init__(self, scheduler: Scheduler, drained: bool) -> None:
        self.steps: dict[int, LoggedStep] = {}
        self._scheduler = scheduler
        self._drained = drained
        """Whether nothing is scheduled behind the steps that :func:`drains` names."""
        self._held: set[RequestState] = set()
        """Those that ran when the last batch was scheduled."""
        self._pending: list[int] = []
        """Preempted by schedules that came out empty; they count with the next step."""

    def holds_back(self, steps: int) -> bool:
        return self._drained and drains(steps - 1)

    def scheduled(self, batch: Batch) -> None:
        running, held = self._scheduler.running, self._held
        self._held = set(running)
        self._pending += [state.request.index for state in batch.preempted]
        if batch.is_empty:
            return
        entries = batch.entries
        assert entries is not None
        sched = dict(entries)
        assert len(sched) == len(entries), "a request was scheduled twice in one step"
        admitted = [state for state in running if state not in held]
        self.steps[batch.step] = LoggedStep(
            start=-1,
            end=-1,
            sched=sched,
            preempted=self._pending,
            free=self._scheduler.kv.pool.num_free,
            hits={s.request.index: s.computed - sched[s.request.index] for s in admitted},
        )
        self._pending = []

    def ended(self, batch: Batch, start_ns: int, free_blocks: int) -> None:
        note = self.steps[batch.step]
        note.start, note.end, note.free_after = start_ns, batch.end_ns, free_blocks
        note.finished = [state.request.index for state in batch.finishing]


def replay(golden: Golden) -> SchedulerLog:
    """The engine's log of a golden's workload, every step taken one by one."""
    settings, formula = golden_settings(golden)
    tracks: list[array[int]] = []
    version = version_of(golden)
    scheduler = Scheduler(
        limits(settings, version),
        cache := kv_cache(settings, version),
        policy=queue_policy(settings.scheduling_policy),
        pipeline=pipeline_of(settings, version, tracks),
        speculation=speculation(settings, version),
        list_requests=True,
        **connected(settings, version, cache, clock := Clock(), workload := golden.workload()),
    )
    notes = Notes(scheduler, drained=is_drained(golden.name))
    tables = block_tables(golden, workload)
    loop = build_loop(scheduler, settings, formula, tables, jump=False, hook=notes)
    run = simulate(loop, workload, clock, tracks)
    scheduler.kv.pool.check_integrity()
    steps = [notes.steps[step] for step in sorted(notes.steps)]
    return SchedulerLog(golden.log.header, steps, [logged(record) for record in run.requests])


def simulate(
    loop: LoopPlan, workload: Workload, clock: Clock, tracks: list[array[int]] | None = None
) -> RunLog:
    """Run a workload on one instance by the simulation's own event loop."""
    return Simulation([loop], workload, RuntimeOptions(), clock=clock, pipeline_tracks=tracks).run()


def connected(
    settings: SchedulerSettings, version: VllmVersion, cache: AnyKvCache, clock: Clock, workload: Workload
) -> dict[str, Any]:
    """What a scheduler with a KV connector needs beside."""
    if settings.loads is None:
        return {}
    connector = FormulaConnector(Elsewhere(settings.loads, settings.block_size), clock, workload)
    late = LateFrees(spares=SPARES_FLYING.holds(version)) if settings.batches_in_flight > 1 else None
    loads = KvLoads(cache, first=HOLDERS_FIRST.holds(version)) if settings.loads.asynchronous else None
    return {"connectors": [connector], "loads": loads, "late_frees": late}


class FormulaConnector(Connector):
    """The twin of :func:`servesim.bench.kv_loads.vllm_connector`."""

    def __init__(self, elsewhere: Elsewhere, clock: Clock, workload: Workload) -> None:
        self._elsewhere = elsewhere
        self._clock = clock
        self._actor = clock.actor(Order.KV, self._advance)
        self._prompts = [self._prompt(request) for request in workload]
        self._ends: list[tuple[int, int, Callable[[int], None]]] = []

    def _prompt(self, request: Request) -> list[int]:
        ids = prompt_ids(request)
        return [PRIVATE_TOKEN + request.index] * request.input_tokens if ids is None else ids.tolist()

    def lookup(self, state: RequestState, hit_tokens: int) -> Found:
        index = state.request.index
        there = self._elsewhere.lookup(index, self._prompts[index], state.known, hit_tokens)
        if there is None:
            return Found(hit_tokens, undecided=True)
        asynchronous = self._elsewhere.formula.asynchronous and there > hit_tokens
        return Found(there, there - hit_tokens, self if asynchronous else None)

    def begin_load(
        self, state: RequestState, read_bytes: int, now_ns: int, there: Callable[[int], None]
    ) -> None:
        index = state.request.index
        self._elsewhere.begin(index, self._prompts[index])
        heappush(self._ends, (now_ns + self._elsewhere.formula.read_ns(read_bytes), index, there))
        self._clock.at(self._ends[0][0], self._actor)

    def _advance(self, now_ns: int) -> None:
        while self._ends and self._ends[0][0] <= now_ns:
            _, index, there = heappop(self._ends)
            self._elsewhere.end(index)
            there(now_ns)
        if self._ends:
            self._clock.at(self._ends[0][0], self._actor)


def pipeline_of(
    settings: SchedulerSettings, version: VllmVersion, tracks: list[array[int]]
) -> Pipeline | None:
    """What a pipeline needs beside, None with one stage."""
    stages = settings.pipeline_parallel_size
    if stages == 1:
        return None
    return Pipeline(
        track_maker(settings.scheduler_block, tracks, 1),
        stages if settings.async_scheduling else 0,
        awaits_chunks=AWAITS_BATCHES.holds(version),
    )


class FormulaStages:
    """Every stage of a pipeline takes what the formula says of the whole."""

    alone = None

    def __init__(self, formula: StepFormula, stages: int) -> None:
        self._whole, self._stages = OneInstance(formula), stages

    def stages_ns(self, batches: Sequence[Batch | None]) -> Sequence[tuple[int, int]]:
        return [*self._whole.stages_ns(batches)] * self._stages


def golden_settings(golden: Golden) -> tuple[SchedulerSettings, StepFormula]:
    """What a golden was recorded with."""
    header = golden.log.header
    return SchedulerSettings(**header["settings"]), StepFormula(**header["formula"])


def limits(settings: SchedulerSettings, version: VllmVersion) -> SchedulerLimits:
    budget = settings.max_num_batched_tokens
    return SchedulerLimits(
        max_num_seqs=settings.max_num_active_seqs or settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_scheduled_tokens or budget,
        shared_tokens=budget if settings.long_prefill_token_threshold_adaptive else 0,
        watermark_blocks=int(settings.watermark * settings.num_gpu_blocks),
        prefill_interval=settings.prefill_schedule_interval if LOCAL_CADENCE.holds(version) else 1,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        caps_lone_prefill=not LONE_PREFILL.holds(version),
        chunked_prefill=settings.enable_chunked_prefill,
        reserve_full_isl=settings.reserve_full_isl,
        serves_on=SERVES_ON.holds(version),
        counts_all_victims=COUNTS_VICTIMS.holds(version),
        max_loras=settings.max_loras,
        counts_all_loras=RUNNING_LORAS.holds(version),
        deferred_first=not ONE_QUEUE.holds(version),
    )


def speculation(settings: SchedulerSettings, version: VllmVersion) -> Speculation | None:
    """What the scheduler speculates with."""
    spec = settings.speculative
    return spec and speculation_of(spec, settings, version)


def block_tables(golden: Golden, workload: Workload) -> BlockTables:
    """The identities of the workload's blocks, as the golden's version of vLLM tells them apart."""
    spec = golden_settings(golden)[0].speculative
    return BlockTables(workload, lookahead=hash_lookahead(spec, version_of(golden)))


def kv_cache(settings: SchedulerSettings, version: VllmVersion) -> AnyKvCache:
    blocks, caching = settings.num_gpu_blocks, settings.enable_prefix_caching
    rules = GroupRules(
        version,
        settings.max_num_batched_tokens,
        2 if settings.async_scheduling else 1,
        settings.max_model_len,
    )
    return kv_cache_of(settings.groups, blocks, settings.scheduler_block, caching, rules)


def build_loop(
    scheduler: Scheduler,
    settings: SchedulerSettings,
    formula: StepFormula,
    tables: BlockTables,
    jump: bool,
    hook: StepHook | None = None,
) -> LoopPlan:
    """The loop of one instance of a model that has no properties but a name: nothing else takes part in
    scheduling."""
    capacity = SimpleNamespace(
        block_size=settings.scheduler_block,
        usable_blocks=settings.num_gpu_blocks - 1,
        admitted_blocks=lambda *_: 0,  # the recorder has refused what would not fit
    )
    log = InstanceLog(
        index=0,
        node=0,
        spec=cast("Any", SimpleNamespace(model_name="any", num_npus=1, pd_type=None)),
        options=cast("Any", SimpleNamespace(**asdict(settings), vllm_version=NEWEST)),
        capacity=cast("Any", capacity),
        bundle_source="formula",
        host="in the formula",
    )
    depth, stages = settings.batches_in_flight, settings.pipeline_parallel_size
    times = FormulaStages(formula, stages) if stages > 1 else OneInstance(formula)
    member = Instance(log, scheduler, tables, hook)
    return LoopPlan([member], times, depth=depth, stages=stages, jump=jump and stages == 1)


def logged(record: RequestRecord) -> LoggedRequest:
    """A request's record in the form of the log."""
    return LoggedRequest(
        req=record.request,
        arrival=record.arrival_ns,
        queued=record.queued_ns,
        scheduled=record.scheduled_ns,
        first=record.first_token_ns,
        end=record.end_ns,
        hit=record.npu_hit + record.storage_hit,
        preemptions=record.preemptions,
    )


def replay_in_jumps(golden: Golden) -> RunLog:
    """The engine's own records of a golden's workload, with the vectorised jumps over quiet stretches."""
    settings, formula = golden_settings(golden)
    workload = golden.workload()
    version = version_of(golden)
    scheduler = Scheduler(
        limits(settings, version),
        cache := kv_cache(settings, version),
        policy=queue_policy(settings.scheduling_policy),
        speculation=speculation(settings, version),
        **connected(settings, version, cache, clock := Clock(), workload),
    )
    tables = block_tables(golden, workload)
    return simulate(build_loop(scheduler, settings, formula, tables, jump=True), workload, clock)
