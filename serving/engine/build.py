"""Turns a cluster description into instances ready to run."""

from __future__ import annotations

import logging
from array import array
from typing import TYPE_CHECKING

from serving.engine.block_tables import BlockTables
from serving.engine.decode_set import DecodeSet
from serving.engine.instance import Instance
from serving.engine.scheduler import Scheduler, SchedulerLimits
from serving.engine.simulation import Simulation
from serving.engine.step_loop import SingleTimes, StepLoop
from serving.errors import InputError
from serving.latency.bundle import range_warnings
from serving.latency.step_timer import build_step_timer
from serving.memory.kv_cache import KvCache
from serving.memory.sizing import kv_cache_capacity
from serving.results.records import InstanceLog
from serving.specs.cluster_checks import check_cluster
from serving.specs.options import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.engine.simulation import Observer
    from serving.latency.bundle import Bundle
    from serving.results.records import RunLog
    from serving.specs.cluster import ClusterSpec
    from serving.specs.model import ModelSpec
    from serving.specs.options import InstanceOptions, RuntimeOptions
    from serving.workload.request import Workload


def run(
    cluster: ClusterSpec, workload: Workload, options: RuntimeOptions, observer: Observer | None = None
) -> RunLog:
    """Simulate ``workload`` on ``cluster``.

    Raises:
        InputError: the cluster cannot be built as described.
        RunError: the run cannot be finished.
    """
    return build_simulation(cluster, workload, options).run(observer)


def build_simulation(cluster: ClusterSpec, workload: Workload, options: RuntimeOptions) -> Simulation:
    """The instances of a cluster, with their kernel times loaded and their memory planned.

    Raises:
        InputError: a bundle is missing or wrong, or something does not fit.
    """
    check_requested_models(cluster, workload)
    models = check_cluster(cluster)
    loops = []
    tables = BlockTables(workload)
    said: dict[str, None] = {}
    for index, (node, spec) in enumerate(cluster.instances):
        model = models[spec.model_name]
        resolved = resolve(options, spec, model)
        timer = build_step_timer(spec, model, resolved, cluster)
        capacity = kv_cache_capacity(model, spec, resolved, f"instance {index}")
        for warning in warnings_about(timer.bundle, model, resolved):
            said.setdefault(warning)
        log = InstanceLog(index, node, spec, resolved, capacity, timer.bundle.describe())
        cache = KvCache(capacity.num_blocks, resolved.block_size, resolved.enable_prefix_caching)
        scheduler = Scheduler(limits_of(resolved, options.skip_prefill), cache)
        member = Instance(log, scheduler, tables)
        depth = 2 if resolved.async_scheduling else 1
        loops.append(StepLoop([member], SingleTimes(timer), depth=depth, jump=not options.stepped))
    for warning in said:
        logging.getLogger("serving").warning("%s", warning)
    return Simulation(loops, workload, options)


def warnings_about(bundle: Bundle, model: ModelSpec, options: InstanceOptions) -> list[str]:
    """What a user should know before trusting a run of this instance."""
    found = range_warnings(bundle, options.max_num_batched_tokens, options.max_num_seqs)
    if model.num_sliding_layers:
        found.append(
            f"{model.name}: {model.num_sliding_layers} of {model.num_hidden_layers} layers attend to a "
            f"window of {model.sliding_window} tokens; they are simulated as if they kept and read the whole "
            "context"
        )
    return found


def lane_maker(block_size: int, lane_times: list[array[int]], num_instances: int) -> Callable[[], DecodeSet]:
    """A function that makes decode sets, each with a new track at the end of ``lane_times``."""

    def new_lane() -> DecodeSet:
        times = array("q")
        lane_times.append(times)
        return DecodeSet(block_size, num_instances + len(lane_times) - 1, times)

    return new_lane


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


def check_requested_models(cluster: ClusterSpec, workload: Workload) -> None:
    """Raise InputError if a request asks for a model that no instance serves."""
    served = {spec.model_name for _, spec in cluster.instances}
    for request in workload:
        if request.model and request.model not in served:
            raise InputError(
                f"{workload.source}: request {request.index} asks for model {request.model}, which no "
                f"instance serves; served: {', '.join(sorted(served))}"
            )
