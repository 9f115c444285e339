"""What holds for every legal cluster of up to six instances and every workload: nothing is lost, it ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from servesim.engine.build import build_simulation
from servesim.engine.clock import Actor, Clock
from servesim.engine.run_checks import scene
from servesim.errors import InputError
from servesim.specs.acting import notes_of
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.options import RuntimeOptions
from tests.engine.test_properties import everything, workloads
from tests.engine.toy_world import DENSE, EXPERTS, MOE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.engine.simulation import Simulation
    from servesim.results.records import RunLog
    from servesim.specs.cluster import ClusterSpec
    from servesim.workload.request import Workload


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")):
        yield


engine_options = st.fixed_dictionaries(
    {
        "num_gpu_blocks": st.integers(25, 140),
        "block_size": st.sampled_from([4, 16]),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.sampled_from([8, 64, 500]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 9]),
        "reserve_full_isl": st.booleans(),
        "enable_prefix_caching": st.booleans(),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8"]),
        "dtype": st.sampled_from([None, "fp8"]),
    }
)


@st.composite
def units(draw: st.DrawFn, model: str, role: str | None, room: int, number: int) -> list[dict[str, Any]]:
    """One instance, or the members of a data-parallel group."""
    members = draw(st.integers(1, min(room, 3)))
    tp, pp = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    shape: dict[str, Any] = {"tp_size": tp, "pp_size": pp, "pd_type": role}
    if model == MOE:
        legal = [
            ep
            for ep in range(1, EXPERTS + 1)
            if EXPERTS % ep == 0 and (tp % ep == 0 or (ep % tp == 0 and members % (ep // tp) == 0))
        ]
        shape["ep_size"] = draw(st.sampled_from(legal))
        shape["moe_backend"] = draw(st.sampled_from(["allgather_reducescatter", "all_to_all"]))
    if members > 1 or draw(st.booleans()):
        shape["dp_group"] = f"group {number}"
    shape["async_scheduling"] = draw(st.booleans())
    shape["enable_block_copy"] = draw(st.booleans())
    return [toy_instance(model, **shape, **draw(engine_options)) for _ in range(members)]


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, Any]:
    """Up to six instances of one or two models on one or two nodes."""
    models = draw(st.sampled_from([[DENSE], [MOE], [DENSE, MOE]]))
    instances: list[dict[str, Any]] = []
    for number, model in enumerate(models):
        room = 6 - len(instances) if number == len(models) - 1 else 3
        roles: list[str | None] = draw(st.sampled_from([[None], ["prefill", "decode"]]))
        rest = draw(st.lists(st.sampled_from(roles), max_size=2))
        for turn, role in enumerate([*roles, *rest]):
            still = max(len(roles) - turn - 1, 0)
            if room - still > 0:
                unit = draw(units(model, role, room - still, len(instances)))
                instances += unit
                room -= len(unit)
    instances = draw(st.permutations(instances))
    cut = draw(st.integers(0, len(instances)))
    nodes = [part for part in (instances[:cut], instances[cut:]) if part]
    links = {
        "link_bw": draw(st.sampled_from([0.01, 1, [100, 50, 25, 10]])),
        "link_latency": draw(st.sampled_from([0, 1000, [1, 20, 300, 4000]])),
        "link_topology": draw(st.sampled_from(["ring", "switch", ["fully_connected", "ring"]])),
    }
    return toy_cluster(*nodes, **links)


options = st.builds(
    RuntimeOptions,
    request_routing_policy=st.sampled_from(["LOAD", "RR", "RAND", "PREFIX"]),
    expert_routing_policy=st.sampled_from(["BALANCED", "RR", "RAND", "ZIPF"]),
    router_refresh=st.sampled_from([0.0, 0.0, 0.0001, 0.1]),
    sticky_sessions=st.booleans(),
    prefix_storage=st.sampled_from([None, None, "CPU"]),
    max_concurrency=st.sampled_from([0, 0, 1, 3]),
    skip_prefill=st.sampled_from([False, False, False, True]),
    cudagraph=st.booleans(),
)


@st.composite
def setups(draw: st.DrawFn, storage: str | None = None) -> tuple[ClusterSpec, RuntimeOptions]:
    """A cluster and options that go with it; ``storage``: of its lower tiers, drawn unless given."""
    described, chosen = draw(clusters()), draw(options)
    if storage:
        chosen = chosen.replace(prefix_storage=storage)
    if chosen.prefix_storage:
        chosen = chosen.replace(enable_prefix_sharing=draw(st.booleans()))
        for node in described["nodes"]:
            node["cpu_mem"]["mem_size"] = draw(st.sampled_from([0.0005, 1]))
            for instance in node["instances"]:
                instance["enable_prefix_caching"] = True
                if draw(st.booleans()):  # a cache for one or two long prompts
                    instance.update(block_size=16, num_gpu_blocks=draw(st.integers(36, 60)))
    return load_cluster(described), chosen


def what_acts(cluster: ClusterSpec, workload: Workload, chosen: RuntimeOptions) -> RuntimeOptions:
    """The options without those that are refused because they cannot act here."""
    models = check_cluster(cluster)
    while True:
        resolved = [resolve(chosen, spec, models[spec.model_name]) for _, spec in cluster.instances]
        try:
            notes_of(scene(cluster, models, resolved, workload, chosen))
        except InputError as error:
            found = re.match(r"--(?:no-)?([a-z-]+).*: has no effect here", str(error))
            if found is None:
                raise
            kept = chosen.model_fields_set - {found[1].replace("-", "_")}
            chosen = RuntimeOptions(**{name: getattr(chosen, name) for name in kept})
        else:
            return chosen


def with_models(workload: Workload, cluster: ClusterSpec, asked: list[int]) -> Workload:
    """Some requests ask for a model of the cluster."""
    names = [None, *sorted({spec.model_name for _, spec in cluster.instances})]
    for request, choice in zip(workload, asked, strict=False):
        request.model = names[choice % len(names)]
    return workload


def bounded(simulation: Simulation, workload: Workload) -> RunLog:
    """Run, but not for ever: a loop that acts without anything getting done fails the test.

    A step computes a token at least, and every request can be preempted only for the sake of another that
    goes on, so a run needs far fewer actions than requests times tokens.
    """
    most = 50 * sum(r.input_tokens + r.output_tokens for r in workload) + 1000 * len(workload)
    acted = 0
    at = Clock.at

    def count(clock: Clock, ns: int, actor: Actor) -> None:
        nonlocal acted
        acted += 1
        assert acted < most, "the run does not come to an end"
        at(clock, ns, actor)

    with mock.patch.object(Clock, "at", count):
        return simulation.run()


def check_cluster_run(simulation: Simulation, log: RunLog, workload: Workload) -> None:
    """Every request ended once with all its tokens, in order; no block is held."""
    assert sorted(r.request for r in (*log.requests, *log.rejected)) == list(range(len(workload)))
    assert all(rejected.reason for rejected in log.rejected)
    recomputed = sum(
        int(instance.log.steps.column("recomputed_tokens").sum()) for instance in simulation.instances
    )
    assert recomputed == sum(record.recomputed_tokens for record in log.requests)
    tracks = log.tracks()
    for record in log.requests:
        request = workload.requests[record.request]
        first, second = (log.instances[i].spec for i in (record.instance, record.decode_instance))
        assert request.model in (None, first.model_name)
        assert first.model_name == second.model_name
        assert (first.pd_type, second.pd_type) in ((None, None), ("prefill", "decode"))
        times = [int(t) for track, a, b in record.token_steps for t in tracks[track][a : b + 1]]
        assert len(times) == request.output_tokens
        assert times == sorted(set(times))
        assert (record.first_token_ns, record.end_ns) == (times[0], times[-1])
        assert (record.handed_over_ns >= 0) == (first.pd_type == "prefill")
        assert record.handed_over_ns < record.first_token_ns
        assert record.arrival_ns <= record.queued_ns <= record.scheduled_ns < record.first_token_ns
    for instance in simulation.instances:
        for connector in instance.scheduler.connectors:
            connector.check_integrity()
        pool, scheduler, steps = instance.scheduler.kv.pool, instance.scheduler, instance.log.steps
        pool.check_integrity()
        assert pool.num_used == scheduler.held == len(scheduler.running) == len(scheduler.waiting) == 0
        assert scheduler.decodes.count == 0
        assert (steps.column("kv_blocks_used") <= pool.usable).all()
        assert (steps.column("recomputed_tokens") >= 0).all()
        assert (steps.column("running") <= instance.log.options.max_num_seqs).all()
        assert (
            steps.column("prefill_tokens") + steps.column("decode_tokens")
            <= instance.log.options.max_num_batched_tokens
        ).all()
        starts, ends = steps.column("start_ns"), steps.column("end_ns")
        assert (starts < ends).all()
        assert (np.diff(starts) >= 0).all()
        assert (np.diff(ends) >= 0).all()


LONG = 257, 500
"""Prompts of one chunk and more, which lower tiers keep."""
loads = st.one_of(workloads(longest=60), workloads(longest=60, prompts=LONG))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setups(), loads, st.lists(st.integers(0, 2), max_size=14))
def test_nothing_is_lost_and_every_run_ends_and_repeats(
    setup: tuple[ClusterSpec, RuntimeOptions], workload: Workload, asked: list[int]
) -> None:
    cluster, chosen = setup
    workload = with_models(workload, cluster, asked)
    chosen = what_acts(cluster, workload, chosen)
    simulation = build_simulation(cluster, workload, chosen)
    log = bounded(simulation, workload)
    check_cluster_run(simulation, log, workload)
    again = build_simulation(cluster, workload, chosen.replace(stepped=True)).run()
    assert everything(again) == everything(log)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setups(), loads)
def test_without_chunked_prefill_a_run_ends(
    setup: tuple[ClusterSpec, RuntimeOptions], workload: Workload
) -> None:
    """The context, which no step may be too small for, is that of the smallest budget."""
    budgets = [spec.max_num_batched_tokens or 2048 for _, spec in setup[0].instances]
    cluster, chosen = (
        setup[0],
        setup[1].replace(enable_chunked_prefill=False, max_model_len=min(budgets), vllm_version="0.28"),
    )
    thresholds = [spec.long_prefill_token_threshold or 0 for _, spec in cluster.instances]
    assume(max(thresholds, default=0) <= min(budgets))
    chosen = what_acts(cluster, workload, chosen)
    simulation = build_simulation(cluster, workload, chosen)
    check_cluster_run(simulation, bounded(simulation, workload), workload)


def test_random_clusters_recall_from_their_tiers() -> None:
    recalled = []

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(setups(storage="CPU"), workloads(longest=60, prompts=LONG))
    def sample(setup: tuple[ClusterSpec, RuntimeOptions], workload: Workload) -> None:
        simulation = build_simulation(setup[0], workload, what_acts(setup[0], workload, setup[1]))
        log = bounded(simulation, workload)
        check_cluster_run(simulation, log, workload)
        recalled.append(sum(sum(instance.steps.recalled_bytes) for instance in log.instances))

    sample()
    assert any(recalled)
