"""The blame of a request: parts that sum to its latency."""

from __future__ import annotations

from typing import Any

import pytest

import servesim
from servesim.results.blame import PARTS, blame
from tests.hand_made import MS, two_requests

CONFIGS = "configs/cluster"


def test_parts_of_two_requests_by_hand() -> None:
    result = two_requests()
    result.log.requests[1].away = [(0, 3, 42 * MS)]
    first, second = blame(result)
    # arrives at 1, first step at 2, tokens at 10, 20 (from 12 on beside the other's chunk), 32, 42
    assert {name: first[name] / MS for name in PARTS if first[name]} == {
        "queue": 1,
        "prefill": 8,
        "beside_prefill": 8,
        "decode": 24,
    }
    # arrives at 12 and runs at once, tokens at 20, 32; then preempted and computed again until 60
    assert {name: second[name] / MS for name in PARTS if second[name]} == {
        "prefill": 8,
        "decode": 12,
        "preemption": 10,
        "beside_prefill": 18,
    }


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"num_reqs": 80, "request_rate": 30.0},
    "tight": {"num_reqs": 120, "num_gpu_blocks": 2000, "request_rate": 40.0},
    "tier": {
        "dataset": "workloads/agentic_sessions.jsonl.gz",
        "num_reqs": 20,
        "prefix_storage": "CPU",
        "num_gpu_blocks": 3000,
    },
    "sides": {"cluster_config": f"{CONFIGS}/prefill_decode.json", "num_reqs": 60},
    "tier_beside": {
        "dataset": "workloads/agentic_sessions.jsonl.gz",
        "num_reqs": 20,
        "prefix_storage": "CPU",
        "num_gpu_blocks": 3000,
        "kv_load": "async",
    },
    "sides_pulled": {
        "cluster_config": f"{CONFIGS}/prefill_decode.json",
        "num_reqs": 60,
        "kv_load": "async",
    },
    "stages": {"cluster_config": f"{CONFIGS}/pipeline.json", "num_reqs": 60},
    "budget": {
        "num_reqs": 60,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 64,
        "request_rate": float("inf"),
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_parts_sum_to_the_latency(name: str) -> None:
    result = servesim.simulate(**RUNS[name])
    rows = blame(result)
    assert (sum(rows[part] for part in PARTS) == result.requests["latency"]).all()
    assert min(int(rows[part].min()) for part in PARTS) >= 0
    assert bool(rows["recall"].any()) == name.startswith("tier")
    assert bool(rows["transfer"].any()) == name.startswith("sides")
    preempted = result.requests["preemptions"] > 0
    assert bool(preempted.any()) == bool(rows["preemption"].any())
    if name == "tight":
        assert (rows["preemption"][preempted] > 0).all()
        assert not rows["preemption"][~preempted].any()
