"""Recalls from a lower tier, worked out by hand.

A step takes 1000 ns and 10 ns a token. KV is one byte a token; the tier moves a byte a ns and answers after
50 ns, so that a chunk of 256 tokens takes 256 ns. The NPU holds one prompt at a time, so every prompt
overwrites the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.clock import Clock
from servesim.engine.connector import LowerTierConnector
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.engine.transfers import Route, Transfers
from servesim.memory.tier import LowerTier, TierPool
from servesim.network.links import Port
from servesim.specs.options import RuntimeOptions
from tests.engine.small_engine import LinearTimes, requests, small_member
from tests.engine.test_properties import workloads
from tests.hand_made import OneInstance

if TYPE_CHECKING:
    from servesim.results.records import RunLog
    from servesim.workload.request import Workload

A, B = list(range(600)), list(range(1000, 1600))
ROUTE = Route((Port("tier", 1.0),), 50, 1.0)


def run_tiered(
    workload: Workload,
    instances: int = 1,
    capacity: int = 1 << 30,
    depth: int = 1,
    shared: bool = True,
    **limits: Any,
) -> RunLog:
    tables = BlockTables(workload)
    how = {"block_size": 16, "blocks": 39, "budget": 1000, **limits}
    pools = [TierPool(capacity) for _ in range(1 if shared else instances)]
    clock = Clock()
    transfers = Transfers(clock)
    members = [
        small_member(
            workload,
            i,
            tables,
            connectors=[
                LowerTierConnector(
                    LowerTier(pools[i % len(pools)], 0, how["block_size"], 1), ROUTE, transfers
                )
            ],
            **how,
        )
        for i in range(instances)
    ]
    plans = [LoopPlan([member], OneInstance(LinearTimes()), depth=depth) for member in members]
    run = Simulation(plans, workload, RuntimeOptions(request_routing_policy="RR"), clock=clock)
    log = run.run()
    for member in members:
        member.scheduler.kv.pool.check_integrity()
        assert member.scheduler.kv.pool.num_used == 0
    for pool in pools:
        pool.check_integrity()
    return log


def again(gap: int = 100_000) -> Workload:
    """Prompt A, then B, which overwrites it on the NPU, then A again."""
    return requests((600, 1, 0), (600, 1, gap), (600, 1, 2 * gap), ids=[A, B, A])


def test_a_recall_delays_its_step_by_bytes_over_bandwidth() -> None:
    log = run_tiered(again())
    third = log.requests[2]
    assert (third.npu_hit, third.storage_hit) == (0, 512)
    assert third.first_token_ns - third.arrival_ns == 50 + 2 * 256 + (1000 + 10 * (600 - 512))
    steps = log.instances[0].steps
    assert steps.tier_bytes[2] == 512  # read; what it computes beyond is no full chunk
    assert [steps.end_ns[i] - steps.start_ns[i] for i in (0, 1)] == [7000, 7000]


def test_asynchronous_scheduling_pays_the_same() -> None:
    third = run_tiered(again(), depth=2).requests[2]
    assert third.first_token_ns - third.arrival_ns == 50 + 2 * 256 + 1880


def test_a_chunk_partly_on_the_npu_is_read_whole() -> None:
    # 400 tokens of A are still on the NPU: 25 blocks. The second chunk (256 to 512) is read all the same.
    workload = requests((600, 1, 0), (300, 1, 100_000), (600, 1, 200_000), ids=[A, B[:300], A])
    third = run_tiered(workload, blocks=1 + 38 + 6).requests[2]
    assert third.npu_hit > 256
    assert third.npu_hit + third.storage_hit == 512
    assert third.first_token_ns - third.arrival_ns == 50 + 256 + 1880


def test_two_instances_that_recall_at_once_share_the_bandwidth() -> None:
    # Each instance computes A, then B; then both need A again at the same time.
    workload = requests(*[(600, 1, t) for t in (0, 0, 100_000, 100_000, 200_000, 200_000)],
                        ids=[A, A, B, B, A, A])  # fmt: skip
    log = run_tiered(workload, instances=2, shared=False)
    for record in log.requests[4:]:
        assert record.storage_hit == 512
        assert record.first_token_ns - record.arrival_ns == 50 + 2 * 512 + 1880


def test_a_shared_pool_serves_what_another_instance_computed() -> None:
    workload = requests((600, 1, 0), (600, 1, 100_000), ids=[A, A])
    shared = run_tiered(workload, instances=2)
    private = run_tiered(workload, instances=2, shared=False)
    assert [r.storage_hit for r in shared.requests] == [0, 512]
    assert [r.storage_hit for r in private.requests] == [0, 0]


def test_a_tier_one_chunk_too_small_evicts_the_right_chunk() -> None:
    # A and B have two chunks each; with room for three, B's second chunk evicts A's first, and A is not
    # found.
    assert run_tiered(again(), capacity=4 * 256).requests[2].storage_hit == 512
    assert run_tiered(again(), capacity=3 * 256).requests[2].storage_hit == 0


def test_a_preempted_request_recalls_what_it_lost() -> None:
    log = run_tiered(requests((500, 60, 0), (120, 60, 0)), blocks=42)
    assert sum(r.preemptions for r in log.requests) > 0
    assert sum(log.instances[0].steps.tier_bytes) > 0


@settings(max_examples=100, deadline=None)
@given(
    workloads(),
    st.integers(1, 3),
    st.integers(0, 3000),
    st.booleans(),
    st.integers(1, 2),
    st.integers(80, 130),
)
def test_nothing_is_lost_with_a_lower_tier(
    workload: Workload, instances: int, capacity: int, shared: bool, depth: int, blocks: int
) -> None:
    for request in workload:
        request.input_tokens *= 5
        if request.input_ids is not None:
            request.input_ids = request.input_ids.repeat(5)
    log = run_tiered(workload, instances, capacity, depth, shared, blocks=blocks)
    ended = [r.request for r in log.requests] + [r.request for r in log.rejected]
    assert sorted(ended) == list(range(len(workload)))
    expected = 0
    for record in log.requests:
        request = workload.requests[record.request]
        found = record.npu_hit + record.storage_hit
        assert found < request.input_tokens
        expected += request.input_tokens - found + request.output_tokens - 1 + record.recomputed_tokens
    steps = [instance.steps for instance in log.instances]
    assert sum(sum(s.prefill_tokens) + sum(s.decode_tokens) for s in steps) == expected
