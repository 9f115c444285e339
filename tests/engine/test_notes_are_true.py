"""What is noted as without effect has none, on random clusters and workloads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from servesim.api import simulate
from servesim.engine.build import build_simulation
from servesim.errors import InputError
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.test_properties import everything, workloads
from tests.engine.test_random_clusters import setups, what_acts
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.cluster import ClusterSpec


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")):
        yield


OWN = "enable_prefix_caching", "long_prefill_token_threshold", "reserve_full_isl", "max_num_seqs"
"""Options that the random clusters set for every instance; here they come as flags."""
flags = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 9),
        "enable_prefix_caching": st.just(False),
        "long_prefill_token_threshold": st.sampled_from([9, 64, 2000]),
        "reserve_full_isl": st.just(False),
        "max_num_seqs": st.integers(1, 8),
        "max_num_active_seqs": st.integers(1, 8),
        "max_num_scheduled_tokens": st.sampled_from([8, 64, 500]),
        "scheduling_policy": st.just("priority"),
        "long_prefill_token_threshold_adaptive": st.just(True),
        "prefill_schedule_interval": st.sampled_from([1, 3]),
        "watermark": st.sampled_from([0.0, 0.1]),
        "enable_lora": st.just(True),
        "max_loras": st.integers(1, 3),
        "enable_block_copy": st.just(False),
        "max_concurrency": st.sampled_from([1, 3, 30]),
        "max_num_queued_reqs": st.sampled_from([1, 100]),
        "enable_chunked_prefill": st.just(True),
        "async_scheduling": st.booleans(),
        "router_refresh": st.sampled_from([0.0001, 0.1]),
        "sticky_sessions": st.just(True),
        "cudagraph": st.booleans(),
        "npu_memory_utilization": st.sampled_from([0.5, 0.9]),
    },
)


@settings(
    max_examples=80,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(setups(), workloads(longest=60), flags)
def test_what_has_no_effect_changes_nothing(
    setup: tuple[ClusterSpec, RuntimeOptions], workload: Workload, more: dict[str, Any]
) -> None:
    cluster = setup[0].model_copy(
        update={
            "nodes": tuple(
                node.model_copy(
                    update={
                        "instances": tuple(
                            instance.model_copy(update=dict.fromkeys(set(OWN) & set(more)))
                            for instance in node.instances
                        )
                    }
                )
                for node in setup[0].nodes
            )
        }
    )
    try:
        chosen = what_acts(cluster, workload, setup[1].replace(**more))
        log = build_simulation(cluster, workload, chosen).run()
    except InputError:  # not simulated together
        return
    idle = {
        found[1].replace("-", "_")
        for note in log.notes
        if (found := re.match(r"--(?:no-)?([a-z-]+).* has no effect here: ", note))
    }
    beside = {"enable_prefix_sharing"} if "prefix_storage" in idle else set()
    kept = chosen.model_fields_set - idle - beside
    if len(kept) == len(chosen.model_fields_set):
        return
    plain = RuntimeOptions(**{name: getattr(chosen, name) for name in kept})
    assert everything(build_simulation(cluster, workload, plain).run()) == everything(log), idle


def test_a_preempted_request_finds_its_blocks_again() -> None:
    """So the prefix cache acts where no prompt has token ids, and no note may say that it does not."""
    made = [Request(index, 60, 40, 0) for index in range(4)]
    cluster = toy_cluster([toy_instance(num_gpu_blocks=17)])
    on, off = (
        simulate(cluster, Workload(made, "plain"), enable_prefix_caching=wanted) for wanted in (True, False)
    )
    assert on.summary["recomputed_tokens"] < off.summary["recomputed_tokens"]
    (note,) = off.summary["notes"]
    assert note.startswith("--no-enable-prefix-caching: no request has token ids")


def test_a_preempted_request_is_read_from_below() -> None:
    made = [Request(index, 600, 200, 0) for index in range(4)]
    cluster = toy_cluster([toy_instance(num_gpu_blocks=130)])
    tier = simulate(cluster, Workload(made, "plain"), prefix_storage="CPU")
    assert tier.summary["prefix_cache"]["storage_read_bytes"] > 0
    (note,) = tier.summary["notes"]
    assert note.startswith("--prefix-storage CPU: no request has token ids")
