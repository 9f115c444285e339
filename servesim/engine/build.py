"""Turns a cluster description into instances ready to run."""

from __future__ import annotations

import logging
from array import array
from typing import TYPE_CHECKING

from servesim.cost.build import Costs
from servesim.engine.block_tables import BlockTables
from servesim.engine.clock import Clock
from servesim.engine.connector import Connector, HandOver, LowerTierConnector, LowerTiers
from servesim.engine.decode_set import DecodeSet
from servesim.engine.instance import Instance
from servesim.engine.kv_loads import KvLoads, LateFrees
from servesim.engine.limits import SchedulerLimits
from servesim.engine.pipeline import Pipeline
from servesim.engine.pricing import StepPricing
from servesim.engine.queue_policy import queue_policy
from servesim.engine.run_checks import (
    check_adapters,
    check_agreement,
    check_requested_models,
    check_speculation,
    scene,
    warnings_about,
)
from servesim.engine.scheduler import Scheduler
from servesim.engine.simulation import Simulation
from servesim.engine.speculation import Speculation, hash_lookahead, speculation_of
from servesim.engine.step_loop import LoopPlan
from servesim.engine.transfers import Routes, Transfers
from servesim.errors import BrokenRunError, RunError
from servesim.memory.group_cache import kv_cache_of
from servesim.memory.memory_map import MemoryMap
from servesim.memory.plan import group_rules
from servesim.memory.start_up import start_up
from servesim.memory.traffic import reaches_of
from servesim.results.records import InstanceLog, SpeculationLog
from servesim.results.stated_errors import (
    reach_of,
    stated_error,
    uncertainty,
)
from servesim.results.step_log import StepLog
from servesim.slotted import dataclass
from servesim.specs.acting import notes_of
from servesim.specs.block_layers import architecture_of
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.validation import UNLIMITED
from servesim.specs.vllm_versions import (
    AWAITS_BATCHES,
    COUNTS_VICTIMS,
    HOLDERS_FIRST,
    LONE_PREFILL,
    ONE_QUEUE,
    RUNNING_LORAS,
    SERVES_ON,
    SPARES_FLYING,
)
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.cost.bundle import Bundle
    from servesim.cost.offload import Offload
    from servesim.cost.step_cost import StepCost
    from servesim.engine.noise import StepNoise, StepShift
    from servesim.engine.simulation import Observer
    from servesim.memory.kv_cache import AnyKvCache
    from servesim.results.records import RunLog
    from servesim.results.stated_errors import StatedError, Uncertainty
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.options import RuntimeOptions


@dataclass(slots=True)
class Kept:
    """What one run leaves for the next, so that it need not be read or worked out again; empty at first.

    Results are the same with and without.
    """

    costs: Costs | None = None
    tables: BlockTables | None = None
    """Of the same requests; the times at which they arrive may differ."""


def run(
    cluster: ClusterSpec,
    workload: Workload,
    options: RuntimeOptions,
    observer: Observer | None = None,
    kept: Kept | None = None,
) -> RunLog:
    """Simulate ``workload`` on ``cluster``; ``kept`` is read and renewed.

    Raises:
        InputError: the cluster cannot be built as described.
        RunError: the run cannot be finished, or lost something on its way.
    """
    try:
        return build_simulation(cluster, workload, options, kept).run(observer)
    except BrokenRunError as error:
        raise BrokenRunError(f"{error}; {_how_to_report(cluster, workload, options)}") from error
    except OverflowError as error:
        raise RunError(
            "the run reaches a simulated time of 2**62 ns (146 years); some time or rate of the input is far "
            "out"
        ) from error


def _how_to_report(cluster: ClusterSpec, workload: Workload, options: RuntimeOptions) -> str:
    from servesim.engine.simulation import save_reproduction

    try:
        what = f"the input in {save_reproduction(cluster, workload, options)}"
    except OSError as error:
        what = f"cluster, workload and options (saving them failed: {error})"
    return f"this is a fault of servesim and its figures are not to be trusted, please report it with {what}"


def build_simulation(
    cluster: ClusterSpec,
    workload: Workload,
    options: RuntimeOptions,
    kept: Kept | None = None,
    noise: Callable[[int], StepNoise | StepShift] | None = None,
) -> Simulation:
    """The instances of a cluster, with their kernel times loaded and their memory planned.

    ``noise`` makes the noise on the steps of the loop whose first instance has this index.

    Raises:
        InputError: a bundle is missing or wrong, or something does not fit.
    """
    check_requested_models(cluster, workload)
    builder = Builder(cluster, workload, options, kept)
    plans = [builder.plan(group, noise) for group in builder.lockstep_groups()]
    for warning in builder.warnings:
        logging.getLogger("servesim").warning("%s", warning)
    return Simulation(
        plans,
        workload,
        options,
        clock=builder.clock,
        pipeline_tracks=builder.pipeline_tracks,
        moved=builder.transfers.moved,
        hand_over=builder.hand_over,
        notes=builder.notes,
    )


def step_pricing(cluster: ClusterSpec, options: RuntimeOptions, index: int) -> StepPricing:
    """What priced the steps of instance ``index`` if ``cluster`` ran with ``options``.

    Raises:
        InputError: the cluster cannot be built as described.
    """
    builder = Builder(cluster, Workload([]), options)
    (group,) = (group for group in builder.lockstep_groups() if index in group)
    return builder.pricing(group)


class Builder:
    """Makes the step loops of one run; what instances have in common is made once."""

    def __init__(
        self,
        cluster: ClusterSpec,
        workload: Workload,
        options: RuntimeOptions,
        kept: Kept | None = None,
        *,
        tables: BlockTables | None = None,
        new_steps: Callable[[], StepLog] = StepLog,
    ) -> None:
        """
        Args:
            cluster: what runs.
            workload: what arrives, for what it says of the options.
            options: of the run.
            kept: what an earlier run left; see :class:`Kept`.
            tables: those of the workload by default.
            new_steps: makes the step log of an instance.
        """
        self._new_steps = new_steps
        self._placed = cluster.instances
        self._models = check_cluster(cluster)
        self._resolved = [resolve(options, spec, self._models[spec.model_name]) for _, spec in self._placed]
        check_adapters(cluster, workload, self._resolved)
        self.notes = [
            *cluster.notes,
            *notes_of(scene(cluster, self._models, self._resolved, workload, options)),
        ]
        """What was asked for and does not act."""
        self._memories = MemoryMap(cluster, self._models, self._resolved, options.prefix_storage)
        self._started = [
            start_up(
                index, spec, self._models[spec.model_name], self._resolved[index], options, self._memories
            )
            for index, (_, spec) in enumerate(self._placed)
        ]
        kept = kept or Kept()
        self._costs = kept.costs = Costs(cluster, kept.costs)
        speculative = next((one.speculative for one in self._resolved if one.speculative), None)
        ahead = hash_lookahead(speculative, options.vllm_version)
        self._tables = kept.tables = tables or BlockTables(workload, kept.tables, ahead)
        self._options = options
        self._tiers = LowerTiers(cluster, options, self._memories)
        self.clock = Clock()
        self.transfers = Transfers(self.clock)
        self.hand_over: HandOver | None = None
        if any(spec.pd_type for _, spec in self._placed):
            self.hand_over = HandOver(self.transfers, self._models, Routes(self._costs.topology))
        self.pipeline_tracks: list[array[int]] = []
        """Token times of the pipelines; see :class:`servesim.results.records.RunLog`."""
        self.warnings: dict[str, None] = {}
        """What the user should know, each once, in order."""

    def lockstep_groups(self) -> list[list[int]]:
        """Indices of the instances that go in lock-step.

        Those are the members of a data-parallel group with expert layers, which exchange tokens in every
        step. Without expert layers nothing ties them together, and vLLM (0.24) lets them run on their own.
        """
        groups: dict[str | int, list[int]] = {}
        for index, (_, spec) in enumerate(self._placed):
            tied = spec.dp_group is not None and self._models[spec.model_name].is_moe
            groups.setdefault(f"group {spec.dp_group}" if tied else index, []).append(index)
        return list(groups.values())

    def plan(self, group: list[int], noise: Callable[[int], StepNoise | StepShift] | None = None) -> LoopPlan:
        """The loop that runs the instances of ``group``; ``noise`` as in :func:`build_simulation`."""
        pricing = self.pricing(group)
        members = [self._instance(index, pricing) for index in group]
        first = members[0].log
        stages = first.spec.pp_size
        return LoopPlan(
            members,
            pricing.cost,
            depth=stages + first.options.async_scheduling,
            stages=stages,
            jump=not self._options.stepped,
            noise=noise(first.index) if noise else None,
        )

    def pricing(self, group: list[int]) -> StepPricing:
        """What prices the steps of the instances of ``group``.

        Raises:
            InputError: a bundle is missing or wrong, or the instances cannot go in lock-step.
        """
        for index in group:
            spec, options = self._placed[index][1], self._started[index].options
            model = self._models[spec.model_name]
            bundle = self._costs.bundle(spec, model, options)
            self.warnings.update(dict.fromkeys(warnings_about(bundle, model, options)))
        check_agreement(self._placed, group, {index: self._started[index].options for index in group})
        return StepPricing(self._cost(group), len(group))

    def _cost(self, group: list[int]) -> StepCost:
        placed = [self._placed[index] for index in group]
        spec, model = placed[0][1], self._models[placed[0][1].model_name]
        routing = None
        if spec.ep_size > 1:
            from servesim.engine.experts import expert_routing

            policy = self._options.expert_routing_policy
            routing = expert_routing(policy, model, spec.ep_size, self._options.seed)
        options = [self._started[index].options for index in group]
        return self._costs.of(placed, model, options, routing, [self._offload(index) for index in group])

    def _offload(self, index: int) -> Offload | None:
        """What an instance keeps elsewhere or lets memory compute, None if nothing."""
        resident = self._memories.resident(index)
        if resident is None:
            return None
        from servesim.cost.offload import Offload

        spec = self._placed[index][1]
        model = self._models[spec.model_name]
        return Offload.of(
            resident,
            self._memories.ports(index),
            self._memories.channels(index) if resident.pim else 0,
            spec,
            model,
            self._started[index].options,
            architecture_of(model),
        )

    def _instance(self, index: int, pricing: StepPricing) -> Instance:
        node, spec = self._placed[index]
        model = self._models[spec.model_name]
        started = self._started[index]
        options, capacity = started.options, started.capacity
        bundle = self._costs.bundle(spec, model, options)
        doubt, error = self._doubts(index, bundle)
        tier = self._tiers.tier(index, node, spec, model, options)
        log = InstanceLog(
            index,
            node,
            spec,
            options,
            capacity,
            bundle.describe(),
            self._costs.host(spec, model, options),
            self._new_steps(),
            front_end_us=self._costs.front_end_us(spec, model, options),
            uncertainty=doubt,
            tier=tier.memory if tier else None,
            stated_error=error,
            reach=reach_of(bundle.meta, _measured(bundle, spec.tp_size, options)),
            pricing=pricing,
            notes=started.notes,
            kv_reads=array("q") if self._memories.resident(index) else None,
            window_reads={reach: array("q") for reach in sorted(set(reaches_of(model).values()))}
            if self._memories.resident(index)
            else {},
            speculation=SpeculationLog() if options.speculative else None,
        )
        if options.speculative:
            check_speculation(options.speculative, model, capacity)
        # the hand-over is asked first: KV that has been sent here need not be read from a lower tier
        connectors: list[Connector] = [self.hand_over] if self.hand_over and spec.pd_type else []
        if tier:
            asynchronous = options.kv_load == "async"
            connectors.append(
                LowerTierConnector(tier.view, tier.route, self.transfers, asynchronous=asynchronous)
            )
        pipeline = None
        if spec.pp_size > 1:
            pipeline = Pipeline(
                track_maker(capacity.block_size, self.pipeline_tracks, len(self._placed), self._new_steps),
                spec.pp_size if options.async_scheduling else 0,
                awaits_chunks=AWAITS_BATCHES.holds(options.vllm_version),
            )
        kv = kv_cache_of(
            capacity.plan.groups if capacity.plan else (),
            capacity.num_blocks,
            capacity.block_size,
            options.enable_prefix_caching,
            group_rules(options),
        )
        loads, late_frees = loads_of(options, kv, spec, lower_tier=tier is not None)
        scheduler = Scheduler(
            limits_of(options, self._options.skip_prefill, capacity.num_blocks),
            kv,
            policy=queue_policy(options.scheduling_policy),
            connectors=connectors,
            pipeline=pipeline,
            speculation=self._speculation(options, log),
            loads=loads,
            late_frees=late_frees,
            list_requests=spec.pd_type == "prefill",
            list_lengths=options.enable_attn_offloading,
        )
        return Instance(log, scheduler, self._tables)

    def _doubts(self, index: int, bundle: Bundle) -> tuple[Uncertainty, StatedError]:
        """How far the kernel times of an instance may be off."""
        spec, options = self._placed[index][1], self._started[index].options
        doubt = uncertainty(
            bundle.meta,
            spec.hardware,
            calibrated=self._costs.is_calibrated(spec),
            version=options.vllm_version if options.plan_as_vllm else None,
        )
        error = stated_error(bundle.meta, spec.hardware, options.kv_dtype)
        if options.decode_context_parallel_size == 1:
            return doubt, error
        return doubt.sharing_context(), error.sharing_context()

    def _speculation(self, options: InstanceOptions, log: InstanceLog) -> Speculation | None:
        """What the scheduler of an instance goes by while it speculates, None if it does not."""
        spec, seed = options.speculative, self._options.seed
        if spec is None:
            return None
        return speculation_of(spec, options, options.vllm_version, seed, log.speculation)


def track_maker(
    block_size: int,
    pipeline_tracks: list[array[int]],
    num_instances: int,
    new_steps: Callable[[], StepLog] = StepLog,
) -> Callable[[], DecodeSet]:
    """A function that makes decode sets, each with a new track at the end of ``pipeline_tracks``."""

    def new_decodes() -> DecodeSet:
        times = new_steps().new_track()
        pipeline_tracks.append(times)
        return DecodeSet(block_size, num_instances + len(pipeline_tracks) - 1, times)

    return new_decodes


def _measured(bundle: Bundle, tp: int, options: InstanceOptions) -> tuple[int, int] | None:
    """Tokens of the longest prompt and context that were measured; of KV that ranks share, as many times
    those of the table that their kernel is looked up in."""
    ranks = options.decode_context_parallel_size
    if ranks == 1:
        return bundle.measured_reach(tp)
    found = bundle.of_degree(tp // ranks).measured_reach(tp // ranks)
    return found and (found[0], found[1] * ranks)


def limits_of(options: InstanceOptions, skip_prefill: bool, num_blocks: int) -> SchedulerLimits:
    """The scheduler's view of the options of an instance with ``num_blocks`` KV blocks."""
    threshold = options.long_prefill_token_threshold
    return SchedulerLimits(
        max_num_seqs=options.max_num_active_seqs or options.max_num_seqs,
        max_num_batched_tokens=options.max_num_scheduled_tokens or options.max_num_batched_tokens,
        long_prefill_token_threshold=0 if threshold == UNLIMITED else threshold,
        shared_tokens=(
            options.max_num_batched_tokens if options.long_prefill_token_threshold_adaptive else 0
        ),
        watermark_blocks=int(options.watermark * num_blocks),
        prefill_interval=options.prefill_schedule_interval,
        caps_lone_prefill=not LONE_PREFILL.holds(options.vllm_version),
        chunked_prefill=options.enable_chunked_prefill,
        reserve_full_isl=options.reserve_full_isl,
        skip_prefill=skip_prefill,
        serves_on=SERVES_ON.holds(options.vllm_version),
        counts_all_victims=COUNTS_VICTIMS.holds(options.vllm_version),
        max_loras=options.max_loras if options.enable_lora else 0,
        counts_all_loras=RUNNING_LORAS.holds(options.vllm_version),
        deferred_first=not ONE_QUEUE.holds(options.vllm_version),
    )


def loads_of(
    options: InstanceOptions, kv: AnyKvCache, spec: InstanceSpec, *, lower_tier: bool
) -> tuple[KvLoads | None, LateFrees | None]:
    """What the scheduler of an instance keeps beside where requests wait for KV with blocks in hand."""
    if options.kv_load != "async" or not (lower_tier or spec.pd_type == "decode"):
        return None, None
    version = options.vllm_version
    several = spec.pp_size + options.async_scheduling > 1  # steps in flight
    return (
        KvLoads(kv, first=HOLDERS_FIRST.holds(version)),
        LateFrees(spares=SPARES_FLYING.holds(version)) if several else None,
    )
