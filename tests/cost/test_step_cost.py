from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.cost.build import Costs
from servesim.cost.expert_stage import ExpertLoads, ExpertStage
from servesim.cost.terms import pipeline_stages
from servesim.engine.batch import Batch
from servesim.engine.experts import expert_routing
from servesim.errors import MissingFileError
from servesim.specs.hardware import EngineSpec
from servesim.specs.model import ModelSpec, model_from_config
from tests.cost.bundles import (
    MODEL,
    Rows,
    Toy,
    attention_rows,
    instance_options,
    slow_chunk_growth,
    toy_architecture,
    toy_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servesim.cost.step_cost import StepCost

PLAIN = EngineSpec(cudagraph=False)
MOE: Rows = {(1, 1): 10.0, (1, 8): 80.0, (101, 1): 110.0, (101, 8): 180.0}
"""Tokens + 9, and 10 more for each expert beyond the first."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Toy bundles of one, two and four ranks. Their layers at p tokens take p + 9, attention see bundles.py;
    embedding p + 1, norm 1, lm_head at s sequences s + 49."""
    before, root = Path.cwd(), tmp_path_factory.mktemp("toy")
    toy_architecture(root)
    for tp in (1, 2, 4):
        Toy(moe=MOE, tp=tp).write(root)
    os.chdir(root)
    yield root
    os.chdir(before)


@dataclass
class Group:
    """What a wave timer is built from; links of 1 GB/s and 1000 ns."""

    members: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    experts: int = 0
    nodes: Sequence[int] = ()
    engine: EngineSpec = PLAIN
    policy: str = "BALANCED"
    backend: str = "allgather_reducescatter"
    block_copy: bool = True
    max_num_seqs: int = 256
    wirings: tuple[str, ...] = ("ring",)
    routing: Any = None
    model: ModelSpec = field(default_factory=toy_model)

    def timers(self) -> Costs:
        cluster: Any = SimpleNamespace(
            link_bandwidths_gbs=(1.0, 1.0, 1.0, 0.5),
            link_latencies_ns=(1000.0,),
            link_wirings=self.wirings,
            collectives="auto",
        )
        return Costs(cluster)

    def spec(self) -> Any:
        return SimpleNamespace(
            hardware="Toy",
            npu_mem=SimpleNamespace(mem_bw=None),
            tp_size=self.tp,
            pp_size=self.pp,
            ep_size=self.ep,
            engine=self.engine,
            moe_backend=self.backend,
        )

    def options(self) -> Any:
        return instance_options(
            enable_block_copy=self.block_copy,
            max_num_seqs=self.max_num_seqs,
        )

    def timer(self) -> StepCost:
        model = toy_model(self.experts) if self.experts else self.model
        routing = self.routing
        if self.ep > 1 and routing is None:
            routing = expert_routing(self.policy, model, self.ep, seed=42)
        nodes = self.nodes or [0] * self.members
        members = [(node, self.spec()) for node in nodes]
        return self.timers().of(members, model, [self.options()] * len(nodes), routing)


def batch(chunks: Sequence[tuple[int, int]] = (), decodes: Sequence[int] = (), step: int = 0) -> Batch:
    """Chunks (tokens, history) and decodes by KV length."""
    made = Batch(step)
    for tokens, history in [*chunks, *((1, length) for length in decodes)]:
        made.add_request(tokens, history)
    return made


FOUR = batch(decodes=[64] * 4)  # attention 5 + 4 + 4 · 64 / 64 = 13
EIGHT = batch(decodes=[64] * 8)  # attention 5 + 8 + 8 = 21
PROMPT = batch(chunks=[(64, 32)])  # attention 8 + 16 + 32 = 56


def us(timer: StepCost, *batches: Batch | None) -> list[tuple[float, float]]:
    return [(compute / 1000, hand_over / 1000) for compute, hand_over in timer.stages_ns(batches)]


# Pipelines.


def test_the_last_stage_has_no_more_blocks_than_others() -> None:
    model = model_from_config(
        {**toy_model().model_dump(exclude_none=True), "num_hidden_layers": 8}, MODEL, "toy.json"
    )
    stages = pipeline_stages(model, 3)
    assert [(stage.first_block, stage.num_blocks) for stage in stages] == [(0, 3), (3, 3), (6, 2)]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [
        (True, False),
        (False, False),
        (False, True),
    ]


@pytest.mark.usefixtures("root")
def test_stages_of_a_pipeline_worked_out_by_hand() -> None:
    # A block at 4 tokens: 3 layers of 13 and attention 13. Embedding 5 in front, norm 1 and lm_head 53 at
    # the end. In between 4 tokens · 8 · 2 bytes at 1 GB/s and 1000 ns of latency.
    assert us(Group(pp=2).timer(), FOUR) == [(5 + 52, 1.064), (52 + 1 + 53, 0)]
    assert us(Group(pp=2).timer(), PROMPT) == [(65 + 3 * 73 + 56, 2.024), (3 * 73 + 56 + 1 + 50, 0)]


@pytest.mark.usefixtures("root")
def test_host_overhead_is_paid_once_by_the_first_stage() -> None:
    engine = EngineSpec(cudagraph=False, prefill_step_overhead_us=6000, decode_step_overhead_us=200)
    slow, plain = Group(pp=2, engine=engine).timer(), Group(pp=2).timer()
    for step, overhead in ((FOUR, 200), (PROMPT, 6000)):
        (first, _), (last, _) = us(slow, step)
        (plain_first, _), (plain_last, _) = us(plain, step)
        assert first - plain_first == pytest.approx(overhead)
        assert last == plain_last


@pytest.mark.usefixtures("root")
def test_all_reduces_go_with_the_blocks() -> None:
    one, two = us(Group(pp=2).timer(), FOUR), us(Group(pp=2, tp=2).timer(), FOUR)
    # 64 bytes over two ranks at 1 GB/s: twice 1032 ns, after attention and after the MLP.
    assert [b[0] - a[0] for a, b in zip(one, two, strict=True)] == pytest.approx([4.128, 4.128])


@pytest.mark.usefixtures("root")
def test_a_measured_send_wins_over_the_link(root: Path) -> None:
    path = root / "profiler/perf/Toy/org/toy/bf16/tp1/comm.csv"
    path.write_text("collective,ranks,bytes,time_us\nsend,2,0,7.0\nsend,2,128,9.0\n")
    assert us(Group(pp=2).timer(), FOUR)[0][1] == 8.0
    path.unlink()


# Groups in lock-step.


@pytest.mark.usefixtures("root")
def test_a_wave_ends_with_its_slowest_member() -> None:
    (alone,) = us(Group().timer(), PROMPT)
    assert us(Group(members=3).timer(), FOUR, PROMPT, EIGHT) == [alone]


@pytest.mark.usefixtures("root")
def test_members_are_padded_to_the_largest_as_far_as_graphs_reach() -> None:
    group = Group(members=2, engine=EngineSpec(), max_num_seqs=32)  # graphs up to 64 tokens
    few, many = batch(decodes=[256] * 8), batch(chunks=[(40, 0)])
    # The 8 decodes have the longer attention, 5 + 8 + 32 = 45 against 18, and compute 40 tokens, too.
    assert us(group.timer(), few, many) == [(2 * (3 * 49 + 45) + 41 + 1 + 57, 0)]
    # With 64 + 1 tokens nobody runs graphs: 8 tokens stay 8, and 65 are not made 72.
    attention = 8 + 64 / 4 + slow_chunk_growth(attention_rows(), 65, 0)
    expected = 2 * (3 * 74 + attention) + 66 + 1 + 50
    assert us(group.timer(), few, batch(chunks=[(65, 0)])) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_without_graphs_nobody_is_padded() -> None:
    few, many = batch(decodes=[256] * 8), batch(chunks=[(10, 0)])
    # 8 decodes at 8 tokens: layers 17, attention 45; the chunk: layers 19, attention 12.
    assert us(Group(members=2).timer(), few, many) == [(2 * (3 * 17 + 45) + 9 + 1 + 57, 0)]


@pytest.mark.usefixtures("root")
def test_an_idle_member_changes_nothing_for_a_dense_model() -> None:
    for step in (FOUR, PROMPT):
        assert us(Group(members=3).timer(), None, step, None) == us(Group().timer(), step)


# Experts on several ranks. Two of eight experts a token; a rank of two holds four.


PIECE_US = 0.128 / 1.75
"""8 rows of 8 features in 16 bit over a link of 1 GB/s, at the speed of an exchange."""


def balanced_us(tokens: int, ranks: int = 2) -> float:
    """One expert layer of N tokens over ``ranks`` ranks, from MOE's closed form, held at its first rows."""
    activated = 8 / ranks * (1 - 0.75**tokens)
    return max(tokens / ranks, 1) + 9 + 10 * (max(activated, 1) - 1)


@pytest.mark.usefixtures("root")
def test_members_meet_in_every_expert_layer() -> None:
    timer = Group(members=2, ep=2, experts=8).timer()
    # Blocks without experts: 2 layers; the 8 decodes' block takes 2 · 17 + 21, the 4 decodes' 2 · 13 + 13.
    # Exchange of 8 rows a member at 1.75 GB/s and 1000 ns: one all-gather of 8 · 8 · 2 bytes of hidden states
    # and as many of logits, and a reduce-scatter of hidden states.
    exchange = (1 + 2 * PIECE_US) + (1 + PIECE_US)
    expected = 2 * (2 * 17 + 21 + balanced_us(12) + exchange) + 9 + 1 + 57
    assert us(timer, FOUR, EIGHT) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_the_slowest_in_blocks_need_not_be_the_slowest_outside() -> None:
    timer = Group(members=2, ep=2, experts=8).timer()
    long, many = batch(decodes=[256] * 4), batch(chunks=[(10, 0)])  # attention 25 and 12
    blocks = max(2 * 13 + 25, 2 * 19 + 12)
    exchange = 2 + 10 * 3 * PIECE_US / 8
    expected = 2 * (blocks + balanced_us(14) + exchange) + 11 + 1 + 53
    assert us(timer, long, many) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_an_idle_member_runs_one_token_through_its_experts() -> None:
    timer = Group(members=2, ep=2, experts=8).timer()
    exchange = 2 + 4 * 3 * PIECE_US / 8
    expected = 2 * (2 * 13 + 13 + balanced_us(5) + exchange) + 5 + 1 + 53
    assert us(timer, None, FOUR) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_padding_goes_through_the_experts_too() -> None:
    timer = Group(members=2, ep=2, experts=8, engine=EngineSpec()).timer()
    exchange = 2 + 8 * 3 * PIECE_US / 8
    five = 5 + 5 + 5 * 16 / 64  # attention of 5 decodes of 16 tokens, between 4 and 8
    expected = 2 * (2 * 17 + max(13, five) + balanced_us(16) + exchange) + 9 + 1 + 54
    assert us(timer, batch(decodes=[16] * 5), FOUR) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_within_an_instance_nothing_is_dispatched() -> None:
    timer = Group(tp=2, ep=2, experts=8).timer()
    all_reduces = 2 * 2 * (1 + 0.032)
    expected = 2 * (2 * 13 + 13 + balanced_us(4) + all_reduces) + 5 + 1 + 53
    assert us(timer, FOUR) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_ranks_that_hold_the_same_experts_share_the_tokens() -> None:
    timer = Group(tp=4, ep=2, experts=8).timer()
    all_reduces = 2 * 2 * 3 * (1 + 0.016)
    expected = 2 * (2 * 13 + 13 + balanced_us(2) + all_reduces) + 5 + 1 + 53
    assert us(timer, FOUR) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_ranks_of_several_members_share_all_experts() -> None:
    timer = Group(members=2, tp=2, ep=4, experts=8).timer()
    exchange = 2 + 8 * 3 * PIECE_US / 8  # each rank with its counterpart on the other member
    all_reduces = 2 * 2 * (1 + 0.064)
    expected = 2 * (2 * 17 + 21 + balanced_us(12, 4) + exchange + all_reduces) + 9 + 1 + 57
    assert us(timer, FOUR, EIGHT) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_a_group_may_hold_all_experts_several_times() -> None:
    pairs = Group(members=4, ep=2, experts=8).timer()
    pair = Group(members=2, ep=2, experts=8).timer()
    assert us(pairs, FOUR, EIGHT, FOUR, FOUR) == us(pair, FOUR, EIGHT)
    assert us(pairs, FOUR, FOUR, PROMPT, EIGHT) == us(pair, PROMPT, EIGHT)


@pytest.mark.usefixtures("root")
def test_an_all_to_all_moves_each_token_to_the_ranks_it_chose() -> None:
    timer = Group(members=2, ep=2, experts=8, backend="all_to_all").timer()
    # Both of a token's experts are elsewhere with 4/8 · 3/7: 11/14 of 8 rows a member, there and back.
    exchange = 2 * (1 + 11 / 14 * PIECE_US)
    expected = 2 * (2 * 17 + 21 + balanced_us(12) + exchange) + 9 + 1 + 57
    assert us(timer, FOUR, EIGHT) == [(pytest.approx(expected, abs=1e-3), 0)]


@pytest.mark.usefixtures("root")
def test_members_on_two_nodes_use_the_links_between_them() -> None:
    same = us(Group(nodes=[0, 0], ep=2, experts=8).timer(), FOUR, EIGHT)[0][0]
    apart = us(Group(nodes=[0, 3], ep=2, experts=8).timer(), FOUR, EIGHT)[0][0]
    assert apart - same == pytest.approx(2 * 3 * PIECE_US, abs=2e-3)  # half the bandwidth


@pytest.mark.usefixtures("root")
def test_four_members_exchange_over_the_wiring_of_their_dimension() -> None:
    def exchange_us(wiring: str) -> float:
        wave = [EIGHT] * 4
        timer = Group(members=4, ep=4, experts=8, wirings=("ring", "ring", wiring)).timer()
        return us(timer, *wave)[0][0] / 2

    ring, full, switch = (exchange_us(wiring) for wiring in ("ring", "fully_connected", "switch"))
    assert ring - switch == pytest.approx(2 * 2, abs=1e-3)  # two more latencies in each of two
    assert switch - full == pytest.approx(3 * 2 * PIECE_US, abs=1e-3)  # two more pieces of each of three


@pytest.mark.usefixtures("root")
def test_measured_exchanges_win_on_one_node(root: Path) -> None:
    path = root / "profiler/perf/Toy/org/toy/bf16/tp1/comm.csv"
    without = us(Group(nodes=[0, 1], ep=2, experts=8).timer(), FOUR, EIGHT)[0][0]
    path.write_text("collective,ranks,bytes,time_us\nall_gather,2,0,7.0\nall_gather,2,1024,9.0\n")
    timer = Group(members=2, ep=2, experts=8).timer()
    # 2 · 8 · (8 + 8) · 2 = 512 bytes: 8 µs, once; the reduce-scatter was not measured.
    expected = 2 * (2 * 17 + 21 + balanced_us(12) + 8 + 1 + PIECE_US) + 9 + 1 + 57
    assert us(timer, FOUR, EIGHT) == [(pytest.approx(expected, abs=1e-3), 0)]
    assert us(Group(nodes=[0, 1], ep=2, experts=8).timer(), FOUR, EIGHT)[0][0] == without
    path.unlink()


class Uneven:
    """Layer l sends everything to rank l; notes what it was asked."""

    varies = True

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int], int]] = []

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        self.asked.append((tokens, list(layers), wave))
        loads = np.zeros((len(layers), 2))
        loads[np.arange(len(layers)), layers] = tokens
        return ExpertLoads(loads, (loads > 0) * 2.0)


@pytest.mark.usefixtures("root")
def test_a_layer_takes_as_long_as_its_slowest_rank() -> None:
    even = us(Group(members=2, ep=2, experts=8).timer(), FOUR, EIGHT)[0][0]
    routing = Uneven()
    uneven = us(Group(members=2, ep=2, experts=8, routing=routing).timer(), FOUR, EIGHT)[0][0]
    assert uneven - even == pytest.approx(2 * (12 + 9 + 10 - balanced_us(12)), abs=1e-3)
    assert [call[:2] for call in routing.asked] == [(12, [0])]


def test_a_rank_that_nobody_chose_takes_no_time() -> None:
    """The second rank's table says 1000 us however little it is asked; the first layer leaves it alone."""
    quick, slow = (
        SimpleNamespace(surface=SimpleNamespace(at=lambda tokens, _, us=us: np.full(len(tokens), us)))
        for us in (7.0, 1000.0)
    )
    stage = ExpertStage(
        cast("Any", Uneven()), [0, 1], cast("Any", [quick, slow]), 1, None, "all_to_all", block_copy=False
    )
    assert stage.ns(12, 12, 0) == (7 + 1000) * 1000


@pytest.mark.usefixtures("root")
def test_without_block_copy_every_layer_is_routed_on_its_own() -> None:
    routing = Uneven()
    every = Group(members=2, ep=2, experts=8, routing=routing, block_copy=False)
    one = Group(members=2, ep=2, experts=8, routing=Uneven())
    assert us(every.timer(), FOUR, EIGHT) == us(one.timer(), FOUR, EIGHT)  # each has one rank that does all
    assert [call[:2] for call in routing.asked] == [(12, [0, 1])]
    us(Group(members=2, pp=2, ep=2, experts=8, routing=routing, block_copy=False).timer(), FOUR, EIGHT)
    assert [call[:2] for call in routing.asked[1:]] == [(12, [0]), (12, [1])]


@pytest.mark.usefixtures("root")
def test_waves_are_told_apart_by_the_steps_of_their_members() -> None:
    routing = Uneven()
    timer = Group(members=2, ep=2, experts=8, routing=routing).timer()
    steps = [(0, 0), (0, 1), (1, 0), (1, 1), (None, 0), (0, None), (None, 1), (1, None), (0, 0)]
    for wave in steps:
        timer.stages_ns([None if step is None else batch(decodes=[9], step=step) for step in wave])
    waves = [call[2] for call in routing.asked]
    assert len(set(waves)) == len(waves) - 1
    assert waves[-1] == waves[0]
    assert all(0 <= wave < 2**64 for wave in waves)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("policy", ["RAND", "ZIPF"])
def test_a_wave_takes_the_same_whatever_was_asked_before(policy: str) -> None:
    group = Group(members=2, ep=2, experts=8, policy=policy, block_copy=False)
    waves = [[batch(decodes=[20] * n, step=n), batch(decodes=[30] * n, step=2 * n)] for n in range(1, 9)]
    timer = group.timer()
    there = [timer.stages_ns(wave) for wave in waves]
    back = [group.timer().stages_ns(wave) for wave in reversed(waves)]
    assert there == back[::-1]


@pytest.mark.usefixtures("root")
def test_shared_experts_need_a_table_of_whole_experts(root: Path) -> None:
    path = root / "profiler/perf/Toy/org/toy/bf16/tp1/moe.csv"
    text = path.read_text()
    path.unlink()
    with pytest.raises(MissingFileError, match=r"tp1/moe\.csv: no such file"):
        Group(tp=2, ep=2, experts=8).timer()
    path.write_text(text)


# Properties.

BATCHES = st.builds(
    batch,
    chunks=st.lists(st.tuples(st.integers(2, 300), st.integers(0, 500)), min_size=1, max_size=3),
    decodes=st.lists(st.integers(1, 400), max_size=20),
) | st.builds(batch, decodes=st.lists(st.integers(1, 400), min_size=1, max_size=20))


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.booleans(), st.sampled_from([0, 8]))
def test_a_wave_of_one_member_and_stage_is_its_step(
    root: Path, step: Batch, graphs: bool, experts: int
) -> None:
    del root
    engine = EngineSpec(cudagraph=graphs, decode_step_overhead_us=3.3, prefill_step_overhead_us=7.7)
    group = Group(tp=2, experts=experts, engine=engine)
    model = toy_model(experts)
    timer = group.timers().stage(group.spec(), model, group.options())
    ((compute, hand_over),) = group.timer().plain_ns([step])
    assert abs(compute - timer.step_ns(step)) <= 1
    assert hand_over == 0


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.sampled_from([0, 8]))
def test_the_stages_of_a_pipeline_add_up_to_the_whole_model(root: Path, step: Batch, experts: int) -> None:
    del root
    engine = EngineSpec(decode_step_overhead_us=3.3, prefill_step_overhead_us=7.7)
    (whole,) = Group(tp=2, experts=experts, engine=engine).timer().stages_ns([step])
    stages = Group(tp=2, pp=2, experts=experts, engine=engine).timer().stages_ns([step])
    assert abs(sum(compute for compute, _ in stages) - whole[0]) <= 2


@settings(max_examples=100, deadline=None)
@given(st.lists(BATCHES | st.none(), min_size=4, max_size=4).filter(any), st.sampled_from([(0, 1), (8, 2)]))
def test_a_wave_is_no_faster_than_any_of_its_members_alone(
    root: Path, wave: list[Batch | None], shape: tuple[int, int]
) -> None:
    del root
    experts, ep = shape
    group = Group(members=4, ep=ep, experts=experts)
    pair = Group(members=ep, ep=ep, experts=experts)
    timer, alone = group.timer(), pair.timer()
    ((together, _),) = timer.stages_ns(wave)
    for member in wave:
        if member is not None:
            ((single, _),) = alone.stages_ns([member] + [None] * (ep - 1))
            assert together >= single - 1


def test_identical_instances_share_one_timer_and_one_bundle(root: Path) -> None:
    del root
    group, other = Group(), Group(engine=EngineSpec(decode_step_overhead_us=1))
    timers, model = group.timers(), toy_model()
    one = timers.stage(group.spec(), model, group.options())
    assert timers.stage(group.spec(), model, group.options()) is one
    another = timers.stage(other.spec(), model, other.options())
    assert another is not one
    assert another.bundle is one.bundle
    few = timers.stage(group.spec(), model, Group(max_num_seqs=2).options())
    assert few is not one
