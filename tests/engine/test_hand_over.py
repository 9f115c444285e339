"""Separate prefill and decode, worked out by hand.

A step takes 1000 ns and 10 ns a token; KV is 1000 bytes a token over 4 layers; a link of 1 GB/s moves a byte
a ns.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.clock import Clock
from servesim.engine.connector import HandOver
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.engine.transfers import Routes, Transfers
from servesim.specs.model import model_from_config
from servesim.specs.options import RuntimeOptions
from tests.engine.small_engine import LinearTimes, requests, small_member
from tests.engine.test_properties import workloads
from tests.hand_made import OneInstance

if TYPE_CHECKING:
    from servesim.results.records import RunLog
    from servesim.workload.request import Workload

MODEL = model_from_config(
    {
        "model_type": "llama",
        "hidden_size": 250,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 125,
        "intermediate_size": 16,
        "vocab_size": 64,
        "max_position_embeddings": 4096,
    },
    "org/tiny",
    "tiny.json",
)
"""1,000 bytes of KV a token and layer in 32 bit, 500 in 16."""


def run_split(
    workload: Workload,
    prefill: int = 1,
    decode: int = 1,
    bandwidth: float = 1.0,
    latency: int = 0,
    depth: int = 1,
    decode_blocks: int = 1001,
    nodes: tuple[int, ...] = (),
    kv_load: str = "step",
    **limits: Any,
) -> RunLog:
    tables = BlockTables(workload)
    clock = Clock()
    link = SimpleNamespace(bandwidth_gbs=bandwidth, latency_ns=latency)
    far = SimpleNamespace(bandwidth_gbs=bandwidth / 2, latency_ns=latency * 3)
    routes = Routes(cast("Any", SimpleNamespace(dp=link, nodes=far)))
    hand_over = HandOver(Transfers(clock), {"org/tiny": MODEL}, routes)
    sides = ["prefill"] * prefill + ["decode"] * decode
    members = [
        small_member(
            workload,
            index,
            tables,
            pd_type=side,
            node=nodes[index] if nodes else 0,
            connectors=[hand_over],
            kv_load=kv_load,
            asynchronous=depth > 1,
            **(limits if side == "prefill" else {**limits, "blocks": decode_blocks}),
        )
        for index, side in enumerate(sides)
    ]
    plans = [LoopPlan([member], OneInstance(LinearTimes()), depth=depth) for member in members]
    run = Simulation(plans, workload, RuntimeOptions(), clock=clock, hand_over=hand_over)
    log = run.run()
    for member in members:
        member.scheduler.kv.pool.check_integrity()
        assert member.scheduler.kv.pool.num_used == 0
        assert member.scheduler.held == 0
    return log


def test_the_decode_side_gives_the_first_token() -> None:
    # 8 tokens = 8000 bytes = 8000 ns, more than the step (1080) and its last layer (2000) take
    record = run_split(requests((8, 3, 0))).requests[0]
    assert (record.instance, record.decode_instance) == (0, 1)
    assert record.first_token_ns == 8000 + 1010
    assert record.end_ns == 8000 + 3 * 1010
    assert record.token_steps == [(1, 0, 2)]


def test_kv_that_arrives_with_a_request_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    move, arrive = Transfers._advance, Simulation._arrive

    def noting_move(self: Transfers, now: int) -> None:
        done.append(("KV", now))
        move(self, now)

    def noting_arrive(self: Simulation, now: int) -> None:
        done.append(("request", now))
        arrive(self, now)

    monkeypatch.setattr(Transfers, "_advance", noting_move)
    monkeypatch.setattr(Simulation, "_arrive", noting_arrive)
    log = run_split(requests((8, 3, 0), (8, 1, 8000)))
    assert log.requests[0].handed_over_ns == 8000
    assert [what for what, at in done if at == 8000][:2] == ["KV", "request"]


def test_over_a_fast_link_only_the_last_layer_is_seen() -> None:
    # 100 bytes a ns: the whole takes 80 ns, its last layer 20 after the end of the step
    record = run_split(requests((8, 1, 0)), bandwidth=100.0).requests[0]
    assert record.first_token_ns == 1080 + 20 + 1010


def test_latency_is_paid_once() -> None:
    record = run_split(requests((8, 1, 0)), latency=300).requests[0]
    assert record.first_token_ns == 300 + 8000 + 1010


def test_two_prefill_instances_share_the_way_in() -> None:
    log = run_split(requests((8, 1, 0), (8, 1, 0)), prefill=2)
    assert {r.instance for r in log.requests} == {0, 1}
    assert [r.first_token_ns for r in log.requests] == [16000 + 1020] * 2


def test_two_decode_instances_do_not() -> None:
    log = run_split(requests((8, 1, 0), (8, 1, 0)), prefill=2, decode=2)
    assert {r.decode_instance for r in log.requests} == {2, 3}
    assert [r.first_token_ns for r in log.requests] == [8000 + 1010] * 2


def test_between_nodes_the_uplink_sets_the_pace() -> None:
    record = run_split(requests((8, 1, 0)), nodes=(0, 1)).requests[0]
    assert record.first_token_ns == 16000 + 1010


def test_chunks_leave_as_they_are_computed() -> None:
    # Chunks of 64 and 36 tokens: 64000 bytes from 0 on and 36000 from 1640 on share the link; all is there
    # after 100000 bytes.
    record = run_split(requests((100, 1, 0)), budget=64).requests[0]
    assert record.first_token_ns == 100_000 + 1010


def test_a_full_decode_instance_lets_requests_wait() -> None:
    # 8 usable blocks of 4; a request needs 5 for its prompt and all 8 to end
    log = run_split(requests((20, 12, 0), (20, 12, 0)), decode_blocks=9, bandwidth=1000.0)
    first, second = log.requests
    assert first.preemptions == second.preemptions == 0
    assert second.first_token_ns == first.end_ns + 1010


def test_a_prompt_preempted_on_the_decode_side_is_computed_there() -> None:
    log = run_split(requests((16, 16, 0), (16, 16, 0)), decode_blocks=11, bandwidth=1000.0)
    assert sum(r.preemptions for r in log.requests) > 0
    assert sum(log.instances[1].steps.prefill_tokens) > 0


def test_prefix_hits_of_the_prefill_side_travel_too() -> None:
    prompt = list(range(16))
    log = run_split(requests((16, 1, 0), (16, 1, 50_000), ids=[prompt, prompt]))
    assert [r.npu_hit for r in log.requests] == [0, 12]
    assert log.requests[1].first_token_ns == 50_000 + 16_000 + 1010


def test_pulled_kv_takes_blocks_before_it_is_read() -> None:
    """Two prompts of 20 tokens, 20,000 ns each on the link; the decode side has 8 blocks of 4 tokens, a
    request needs 5 for its prompt and all 8 to end."""
    shapes = (20, 12, 0), (20, 12, 0)
    sent = run_split(requests(*shapes), decode_blocks=9)
    # sent: both share the link and have arrived at 40,000; the second waits for the first one's blocks
    first, second = sent.requests
    assert first.first_token_ns == 40_000 + 1010
    assert second.first_token_ns == first.end_ns + 1010 == 40_000 + 13 * 1010
    assert max(sent.instances[1].steps.kv_blocks_used) == 8
    pulled = run_split(requests(*shapes), decode_blocks=9, kv_load="async")
    # pulled: both are queued when their step has ended (1400). Only the first one gets blocks, so its KV has
    # the link to itself; that of the second leaves when the first has ended
    first, second = pulled.requests
    assert first.handed_over_ns == second.handed_over_ns == 1400
    assert (first.load_began_ns, first.load_ended_ns) == (1400, 21_400)
    assert first.first_token_ns == 21_400 + 1010
    assert (second.load_began_ns, second.load_ended_ns) == (first.end_ns, first.end_ns + 20_000)
    assert second.first_token_ns == 21_400 + 12 * 1010 + 20_000 + 1010


def test_a_request_with_little_to_pull_overtakes() -> None:
    # both get blocks at once; 4000 of the second's bytes are there when as many of the first's are
    first, second = run_split(requests((40, 2, 0), (4, 2, 0)), kv_load="async").requests
    assert second.load_ended_ns == 1440 + 2 * 4000
    assert second.end_ns == second.load_ended_ns + 2 * 1010
    assert first.load_ended_ns == 1440 + 44_000 > second.end_ns


def test_what_the_decode_side_has_cached_is_not_pulled() -> None:
    # 3 blocks of 4 of the second prompt are there; its last 4 tokens travel
    prompt = list(range(16))
    log = run_split(requests((16, 1, 0), (16, 1, 50_000), ids=[prompt, prompt]), kv_load="async")
    first, second = log.requests
    assert first.load_ended_ns - first.load_began_ns == 16_000
    assert second.load_ended_ns - second.load_began_ns == 4000


def test_a_prompt_of_one_token_is_pulled_once() -> None:
    record = run_split(requests((1, 3, 0)), kv_load="async").requests[0]
    assert record.first_token_ns == 1010 + 1000 + 1010


def test_pulled_kv_is_kept_at_the_prefill_side_until_then() -> None:
    # the prefill side has blocks for one prompt: the second starts when the first one's KV has left
    log = run_split(requests((16, 2, 0), (16, 2, 0)), kv_load="async", blocks=6)
    first, second = log.requests
    assert second.scheduled_ns == first.load_ended_ns == 1160 + 16_000


@settings(max_examples=120, deadline=None)
@given(
    workloads(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.05, 1.0, 50.0]),
    st.integers(1, 2),
    st.integers(25, 130),
    st.integers(25, 130),
    st.sampled_from(["step", "async"]),
)
def test_nothing_is_lost_on_the_way(
    workload: Workload,
    prefill: int,
    decode: int,
    bandwidth: float,
    depth: int,
    blocks: int,
    room: int,
    kv_load: str,
) -> None:
    log = run_split(
        workload,
        prefill,
        decode,
        bandwidth,
        latency=7,
        depth=depth,
        blocks=blocks,
        decode_blocks=room,
        kv_load=kv_load,
    )
    ended = [r.request for r in log.requests] + [r.request for r in log.rejected]
    assert sorted(ended) == list(range(len(workload)))
    tracks = log.tracks()
    for record in log.requests:
        times = [int(t) for track, a, b in record.token_steps for t in tracks[track][a : b + 1]]
        assert len(times) == workload.requests[record.request].output_tokens
        assert times == sorted(set(times))
        assert record.arrival_ns <= record.queued_ns <= record.scheduled_ns < record.first_token_ns
        assert record.instance < prefill <= record.decode_instance
