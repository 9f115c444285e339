from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.cost.batch_shape import Shape
from servesim.cost.build import build_stage_cost
from servesim.cost.stage_cost import StageCost
from servesim.cost.terms import Role
from servesim.specs.hardware import EngineSpec
from tests.cost.bundles import (
    BINS,
    Rows,
    Toy,
    cluster_links,
    instance_options,
    slow_chunk_growth,
    slow_lookup,
    tokens_ns,
    toy_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.cost.attention_lookup import AttentionTensor

PLAIN = EngineSpec(cudagraph=False)
FITTED = EngineSpec(cudagraph=False, skew_in_mixed_steps=True)
ALPHAS = [
    (0, "n<=2", "sr<=50%", "kvB<=100", "kp=0", 0.5),
    (0, "n<=2", "sr<=50%", "kvB>100", "kp=0", -0.3),
    (0, "n<=8", "sr<=50%", "kvB<=100", "kp=0", 0.1),
    (0, "n<=8", "sr<=50%", "kvB>100", "kp=0", 0.2),
    (0, "n<=8", "sr>50%", "kvB>100", "kp=0", 1.7),
    (16, "n<=8", "sr<=50%", "kvB>100", "kp=0", 0.4),
    (64, "n<=8", "sr<=50%", "kvB>100", "kp>0", 0.6),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, root = Path.cwd(), tmp_path_factory.mktemp("toy")
    os.chdir(root)
    yield root
    os.chdir(before)


def test_a_decode_step_worked_out_by_hand(root: Path) -> None:
    timer = Toy().timer(root)
    # n = 4, all of 64 tokens. Two blocks: 3 layers of 10 + 3 at 4 tokens, attention 5 + 4 + 4·64/64 = 13.
    # Once: embedding 2 + 3, norm 1, lm_head at 4 sequences 50 + 3.
    us = 2 * (3 * 13 + 13) + 5 + 1 + 53
    assert timer.decode_ns(4, 4 * 64, 64, 64) == us * 1000


def test_a_prefill_step_worked_out_by_hand(root: Path) -> None:
    timer = Toy().timer(root)
    # 64 tokens on 32 of history: layers 18 + 55; attention 8 + 16 + 32; embedding 65, norm 1, lm_head 50.
    assert timer.mixed_ns([(64, 32)], 0, 0, 0, 0) == (2 * (3 * 73 + 56) + 65 + 1 + 50) * 1000


def test_every_chunk_adds_what_it_alone_would_add(root: Path) -> None:
    timer = Toy().timer(root, engine=PLAIN)
    # 4 decodes of 16 tokens beside 16@0 (the base itself) and 64@32; 84 tokens, 6 sequences.
    base = 8 + 4 + 4 * 16 / 32 + 16 / 4
    second = 8 + 4 + 4 * 16 / 32 + 64 / 4 + 32
    us = 2 * (3 * 93 + base + (second - base)) + 85 + 1 + 55
    assert timer.mixed_ns([(16, 0), (64, 32)], 4, 64, 16, 16) == us * 1000


def test_without_decodes_chunks_share_nothing(root: Path) -> None:
    timer = Toy().timer(root, engine=PLAIN)
    us = 2 * (3 * 41 + (8 + 4) + (8 + 4)) + 33 + 1 + 51
    assert timer.mixed_ns([(16, 0), (16, 0)], 0, 0, 0, 0) == us * 1000


def test_chunks_may_be_looked_up_as_their_sum(root: Path) -> None:
    timer = Toy().timer(root, engine=EngineSpec(cudagraph=False, chunked_attention=False))
    us = 2 * (3 * 73 + (8 + 64 / 4 + 32)) + 65 + 1 + 51
    assert timer.mixed_ns([(48, 0), (16, 32)], 0, 0, 0, 0) == us * 1000


def test_a_mixed_step_without_chunks_is_a_decode_step(root: Path) -> None:
    timer = Toy(skew=ALPHAS).timer(root)
    assert timer.mixed_ns([], 4, 300, 20, 150) == timer.decode_ns(4, 300, 20, 150)


def test_cuda_graphs_pad_dense_layers_but_not_sequences(root: Path) -> None:
    padded, plain = Toy().timer(root, engine=EngineSpec()), Toy().timer(root, engine=PLAIN)
    # 5 tokens run as 8: six layer calls and the embedding cost 3 µs more.
    assert padded.decode_ns(5, 80, 16, 16) - plain.decode_ns(5, 80, 16, 16) == 7 * 3 * 1000


def test_matrix_products_compute_whole_tiles(root: Path) -> None:
    toy = Toy(products=("qkv_proj", "o_proj"))
    timer, smooth = toy.timer(root, engine=PLAIN), Toy().timer(root, engine=PLAIN)
    # 33 tokens take 48 rows in the two products of each block, a µs a row; up to 16 they are as measured.
    assert tokens_ns(timer, 33) - tokens_ns(smooth, 33) == pytest.approx(2 * 2 * 15 * 1000)
    assert [tokens_ns(timer, n) - tokens_ns(smooth, n) for n in (1, 7, 16, 32, 48)] == [0] * 5
    (product,) = [cost for cost in timer.explain(Shape([(33, 0)])) if cost.layer == "qkv_proj"]
    assert product.origin == "interpolated between 9 and 100 tokens in tp1/dense.csv, tiles of 16 rows"


def test_host_overhead_depends_on_whether_the_step_prefills(root: Path) -> None:
    engine = EngineSpec(cudagraph=False, prefill_step_overhead_us=6000, decode_step_overhead_us=200)
    slow, plain = Toy().timer(root, engine=engine), Toy().timer(root, engine=PLAIN)
    assert slow.decode_ns(4, 64, 16, 16) - plain.decode_ns(4, 64, 16, 16) == 200_000
    assert slow.mixed_ns([(16, 0)], 4, 64, 16, 16) - plain.mixed_ns([(16, 0)], 4, 64, 16, 16) == 6_000_000


def test_unequal_lengths_cost_a_share_of_the_longest(root: Path) -> None:
    timer = Toy(skew=ALPHAS).timer(root)
    equal = timer.decode_ns(4, 256, 64, 64)
    # n = 4, mean 64 of 32..128 (rate 1/3), greatest over 100: α 0.2; A rises by one µs a token at n = 4 / 64.
    assert timer.decode_ns(4, 256, 32, 128) - equal == 2 * 0.2 * 4 * (128 - 64) / 64 * 1000


def test_without_a_fit_unequal_lengths_cost_nothing(root: Path) -> None:
    timer = Toy().timer(root)
    assert timer.decode_ns(4, 256, 10, 200) == timer.decode_ns(4, 256, 64, 64)


def test_one_decode_has_no_lengths_to_differ(root: Path) -> None:
    assert Toy(skew=ALPHAS).timer(root).decode_ns(1, 77, 77, 77) == Toy().timer(root).decode_ns(1, 77, 77, 77)


def test_the_skew_fit_in_mixed_steps_can_be_switched_on(root: Path) -> None:
    off = EngineSpec(cudagraph=False, tail_in_mixed_steps=False)
    with_skew, without = (Toy(skew=ALPHAS).timer(root, engine=engine) for engine in (FITTED, off))
    step = ([(16, 0)], 4, 4 * 136, 16, 256)
    # α 0.4 of the rise from 136 to 256 tokens: 4 · 120 / 32 µs, in two blocks.
    assert with_skew.mixed_ns(*step) - without.mixed_ns(*step) == 2 * 0.4 * 15 * 1000
    assert without.mixed_ns(*step) == Toy().timer(root, engine=off).mixed_ns(*step)


def test_a_mixed_step_waits_half_for_its_longest_decode(root: Path) -> None:
    plain = EngineSpec(cudagraph=False, tail_in_mixed_steps=False)
    without, with_tail = (Toy(skew=ALPHAS).timer(root, engine=engine) for engine in (plain, PLAIN))
    # A single decode of 256 tokens takes (256 - 136) / 32 µs longer than one of 136; two blocks.
    step = ([(16, 0)], 4, 4 * 136, 16, 256)
    assert with_tail.mixed_ns(*step) - without.mixed_ns(*step) == 0.5 * 120 / 32 * 2 * 1000
    # Steps of decodes alone, of one decode and of equal ones know no tail.
    assert with_tail.decode_ns(4, 4 * 136, 16, 256) == without.decode_ns(4, 4 * 136, 16, 256)
    for equal in (([(16, 0)], 4, 4 * 136, 136, 136), ([(16, 0)], 1, 136, 136, 136)):
        assert with_tail.mixed_ns(*equal) == without.mixed_ns(*equal)
    assert sum(cost.total_us for cost in with_tail.explain(Shape(*step))) * 1000 == with_tail.mixed_ns(*step)
    assert "attention: longest decode" in [cost.layer for cost in with_tail.explain(Shape(*step))]


def test_the_skew_fit_wins_over_the_tail(root: Path) -> None:
    alone = EngineSpec(cudagraph=False, skew_in_mixed_steps=True, tail_in_mixed_steps=False)
    step = ([(16, 0)], 4, 4 * 136, 16, 256)
    expected = Toy(skew=ALPHAS).timer(root, engine=alone).mixed_ns(*step)
    assert Toy(skew=ALPHAS).timer(root, engine=FITTED).mixed_ns(*step) == expected


def test_the_tail_never_exceeds_decodes_that_are_all_the_longest(root: Path) -> None:
    toy = Toy()
    toy.attention[16, 4, 0, 256] = toy.attention[16, 4, 0, 16]
    timer = toy.timer(root, engine=PLAIN)
    assert timer.mixed_ns([(16, 0)], 4, 4 * 136, 16, 256) == timer.mixed_ns([(16, 0)], 4, 4 * 136, 136, 136)


def test_a_wild_fit_is_no_faster_than_the_shortest_decode(root: Path) -> None:
    wild = [(chunk, "n<=8", "sr<=50%", "kvB>100", "kp=0", -735.0) for chunk in (0, 16)]
    timer = Toy(skew=wild).timer(root, engine=FITTED)
    assert timer.decode_ns(4, 256, 48, 128) == timer.decode_ns(4, 192, 48, 48)
    assert timer.decode_run_ns(4, 256, 48, 128, 2)[1] == timer.decode_ns(4, 196, 49, 49)
    assert timer.mixed_ns([(16, 0)], 4, 256, 48, 128) == timer.mixed_ns([(16, 0)], 4, 192, 48, 48)


def test_longer_decodes_that_measure_faster_share_nothing(root: Path) -> None:
    toy = Toy(skew=ALPHAS)
    toy.attention[0, 4, 0, 256] = toy.attention[0, 4, 0, 64] - 1
    timer = toy.timer(root)
    assert timer.decode_ns(4, 256, 0, 200) == timer.decode_ns(4, 256, 64, 64)
    assert timer.decode_run_ns(4, 256, 0, 200, 3)[0] == timer.decode_ns(4, 256, 64, 64)


def test_noise_in_the_last_points_never_turns_into_negative_time(root: Path) -> None:
    toy = Toy()
    for key in [k for k in toy.attention if k[3] == 256]:
        toy.attention[key] = toy.attention[(*key[:3], 64 if key[0] == 0 else 16)] - 2
    timer = toy.timer(root)
    assert timer.decode_ns(4, 4 * 131072, 131072, 131072) == timer.decode_ns(4, 4 * 256, 256, 256)
    step = [(64, 32)]
    assert timer.mixed_ns(step, 4, 4 * 131072, 131072, 131072) == timer.mixed_ns(step, 4, 4 * 256, 256, 256)


def test_a_longer_history_never_makes_attention_faster(root: Path) -> None:
    toy = Toy()
    longest = 128
    for key in [key for key in toy.attention if key[2] == (longest if key[1] == 0 else 32)]:
        toy.attention[key] = toy.attention[(*key[:2], 0, key[3])] - 0.5
    timer = toy.timer(root)
    for decodes in ((0, 0, 0, 0), (4, 256, 64, 64)):
        assert timer.mixed_ns([(64, 100 * longest)], *decodes) == timer.mixed_ns([(64, longest)], *decodes)


def test_times_go_on_along_the_last_two_points(root: Path) -> None:
    timer = Toy().timer(root)
    step = timer.decode_ns(4, 4 * 131073, 131073, 131073) - timer.decode_ns(4, 4 * 131072, 131072, 131072)
    assert step == 2 * 4 / 64 * 1000


def test_any_number_of_tokens_and_sequences_can_be_asked(root: Path) -> None:
    timer = Toy().timer(root)
    small = tokens_ns(timer, 100)
    assert tokens_ns(timer, 100_000) == pytest.approx((6 * 100_009 + 100_001 + 1) * 1000)
    assert timer.role_ns(Role.HEAD, Shape((), 5_000), 0) == pytest.approx(5_049_000)
    assert tokens_ns(timer, 100) == small


def test_tensor_parallelism_pays_two_all_reduces_a_block(root: Path) -> None:
    ring, single = Toy(tp=2).timer(root), Toy().timer(root)
    # 10 tokens · 8 · 2 bytes = 160 over 1 GB/s: 2 · (1000 + 80) ns, four times.
    assert tokens_ns(ring, 10) - tokens_ns(single, 10) == pytest.approx(4 * 2 * 1080)


def test_measured_collectives_win_over_the_formula(root: Path) -> None:
    comm = [
        ("all_reduce", 2, 0, 7.0),
        ("all_reduce", 2, 320, 9.0),
        ("all_reduce", 4, 0, 99.0),
        ("send", 2, 0, 1.0),
    ]
    timer = Toy(tp=2, comm=comm).timer(root)
    term = timer.layers.blocks[-1]
    assert term.us(np.array([10, 40])).tolist() == [8.0, 11.0]
    assert term.origin(10) == "interpolated between 0 and 320 bytes in tp2/comm.csv"
    (root / "profiler/perf/Toy/org/toy/bf16/tp2/comm.csv").unlink()


# Properties: against a slow twin, and runs against single steps.


def slow_step_us(
    toy: Toy, engine: EngineSpec, chunks: list[tuple[int, int]], n: int, lengths: tuple[int, int, int]
) -> float:
    """The module's docstring, with the ragged lookup and no tables compiled; µs."""
    mean, least, greatest = lengths
    tokens, sequences = n + sum(c for c, _ in chunks), n + len(chunks)
    together = (sum(c for c, _ in chunks), sum(h for _, h in chunks))

    def a(chunk: int, history: int, kv: int) -> float:
        further = slow_chunk_growth(toy.attention, chunk, history) if chunk > 64 else 0.0
        return slow_lookup(toy.attention, (min(chunk, 64), n, history, kv)) + further

    if len(chunks) > 1 and engine.chunked_attention:
        base = a(16, 0, mean) if n else 0.0
        attention = base + sum(a(c, h, mean) - base for c, h in chunks)
    else:
        attention = a(*together, mean)
    if toy.skew and n > 1 and greatest != mean and (not chunks or engine.skew_in_mixed_steps):
        gap = max(a(*together, greatest) - a(*together, mean), 0.0)
        extra = slow_alpha(toy, together, n, (mean - least) / (greatest - least), greatest) * gap
        attention += max(extra, min(a(*together, least) - a(*together, mean), 0.0))
    elif (
        chunks
        and n > 1
        and greatest != mean
        and engine.tail_in_mixed_steps
        and not engine.skew_in_mixed_steps
    ):
        one = [slow_lookup(toy.attention, (16, 1, 0, kv)) for kv in (greatest, mean)]
        if one[0] > one[1]:
            attention += min(0.5 * (one[0] - one[1]), max(a(16, 0, greatest) - a(16, 0, mean), 0.0))
    total = 2 * attention + sum(slow_lookup(rows, (sequences,)) for rows in toy.per_sequence.values())
    for layer, rows in toy.dense.items():
        total += slow_lookup(rows, (tokens,)) * (1 if layer in ("embedding", "final_layernorm") else 2)
    overhead = engine.prefill_step_overhead_us if chunks else engine.decode_step_overhead_us
    return total + overhead


def slow_alpha(toy: Toy, together: tuple[int, int], n: int, rate: float, greatest: int) -> float:
    """α by walking through the buckets from below."""

    def label(axis: str, x: float) -> str:
        for name, bound in zip(BINS[f"{axis}_labels"], BINS[f"{axis}_bins"][1:], strict=True):
            if x <= bound:
                return str(name)
        return str(BINS[f"{axis}_labels"][-1])

    assert toy.skew
    chunk = next((c for c in sorted({row[0] for row in toy.skew}) if together[0] <= c), 64)
    bucket = (
        chunk,
        label("n", n),
        label("skew_rate", rate),
        label("kv_big", greatest),
        label("kp", together[1]),
    )
    return next((row[5] for row in toy.skew if row[:5] == bucket), 0.25)


@st.composite
def decodes(draw: st.DrawFn, least_n: int = 1) -> tuple[int, int, int, int]:
    """(n, sum, least, greatest) of possible decodes, around the grid's bounds and the buckets' edges."""
    n = draw(st.integers(least_n, 20))
    if n == 0:
        return 0, 0, 0, 0
    low = draw(st.one_of(st.integers(0, 320), st.integers(0, 140_000)))
    high = low + draw(st.one_of(st.just(0), st.integers(0, 300))) if n > 1 else low
    inner = draw(st.lists(st.integers(low, high), min_size=max(n - 2, 0), max_size=max(n - 2, 0)))
    lengths = [low, high, *inner][: max(n, 1)]
    return n, sum(lengths), min(lengths), max(lengths)


CHUNKS = st.lists(
    st.tuples(st.integers(2, 90), st.sampled_from([0, 0, 16, 32, 100, 500])), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(decodes(0), CHUNKS | st.just([]), st.booleans(), st.booleans())
def test_a_step_equals_its_slow_twin(
    root: Path, step: tuple[int, int, int, int], chunks: list[tuple[int, int]], together: bool, skewed: bool
) -> None:
    n, kv_sum, least, greatest = step
    if not n and not chunks:
        return
    engine = EngineSpec(
        cudagraph=False, chunked_attention=together, prefill_step_overhead_us=3, skew_in_mixed_steps=skewed
    )
    toy, timer = _cached(root, engine)
    twin = slow_step_us(toy, engine, chunks, n, (kv_sum // n if n else 0, least, greatest))
    assert timer.mixed_ns(chunks, *step) == pytest.approx(twin * 1000, rel=1e-9, abs=1)


_TIMERS: dict[str, tuple[Toy, StageCost]] = {}


def _cached(root: Path, engine: EngineSpec) -> tuple[Toy, StageCost]:
    key = repr(engine)
    if key not in _TIMERS:
        toy = Toy(skew=ALPHAS)
        _TIMERS[key] = (toy, toy.timer(root, engine=engine))
    return _TIMERS[key]


@st.composite
def bundles(draw: st.DrawFn) -> Toy:
    """Bundles of random, even absurd, numbers: times that fall with length, α of any sign."""
    us = st.floats(0.001, 1000, allow_nan=False).map(lambda x: round(x, 5))
    attention: Rows = {(16, 0, 0, 0): 1.0}
    for n in draw(st.lists(st.integers(1, 20), min_size=1, max_size=3, unique=True)):
        for kv in draw(st.lists(st.integers(0, 400), min_size=1, max_size=5, unique=True)):
            attention[0, n, 0, kv] = draw(us)
    alphas = [(*row[:5], draw(st.floats(-2, 2).map(lambda x: round(x, 4)))) for row in ALPHAS]
    return Toy(attention=attention, skew=draw(st.sampled_from([alphas, None])))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_run_of_decodes_is_its_single_steps(root: Path, data: st.DataObject) -> None:
    timer = data.draw(bundles()).timer(root, engine=EngineSpec(decode_step_overhead_us=0.123))
    for n, kv_sum, least, greatest in data.draw(st.lists(decodes(), min_size=1, max_size=5)):
        steps = data.draw(st.integers(1, 400))
        run = timer.decode_run_ns(n, kv_sum, least, greatest, steps)
        single = [timer.decode_ns(n, kv_sum + i * n, least + i, greatest + i) for i in range(steps)]
        assert run.dtype == np.int64
        assert run.tolist() == single
        assert min(single) >= 1
        every = list(accumulate(single, initial=77))
        ends = [77]
        timer.decode_ends(ends, n, kv_sum, least, greatest, steps)
        assert ends == every
        depth, until = data.draw(st.integers(1, 2)), data.draw(st.integers(0, every[-1]))
        ends = [77]
        timer.decode_ends(ends, n, kv_sum, least, greatest, steps, depth, until)
        # the first, and each whose turn comes before that time: when the step `depth` before it has ended
        assert ends == [77, every[1]] + [
            end for at, end in enumerate(every) if at > 1 and every[at - depth] < until
        ]


def slow_tail_us(tensor: AttentionTensor, n: int, mean: int, kv_max: int) -> float:
    """The tail of the longest decode from six whole look-ups."""

    def us(decodes: int, kv: int) -> float:
        return tensor.us(tensor.smallest_chunk, 0, tensor.corners(decodes, kv))

    if us(1, kv_max) <= us(1, mean):
        return 0.0
    return min(0.5 * (us(1, kv_max) - us(1, mean)), max(us(n, kv_max) - us(n, mean), 0.0))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_tail_equals_its_slow_twin(root: Path, data: st.DataObject) -> None:
    tensor = data.draw(bundles()).timer(root).attention.tensor
    for n, kv_sum, _, greatest in data.draw(st.lists(decodes(2), min_size=1, max_size=20)):
        assert tensor.tail_us(n, kv_sum // n, greatest) == slow_tail_us(tensor, n, kv_sum // n, greatest)


@settings(max_examples=100, deadline=None)
@given(decodes(0), CHUNKS | st.just([]), st.booleans())
def test_a_step_is_the_sum_of_its_terms(
    root: Path, step: tuple[int, int, int, int], chunks: list[tuple[int, int]], padded: bool
) -> None:
    if not step[0] and not chunks:
        return
    _, timer = _cached(root, EngineSpec(cudagraph=padded, prefill_step_overhead_us=3, host_step_us=40))
    batch = Shape(chunks, *step)
    tokens = timer.padding.of(step[0] + sum(count for count, _ in chunks))
    ns = 0.0
    for term in timer.terms:
        ns += term.ns(batch, tokens)
    floor = timer.host.floor_ns(batch) + timer.host.ns(batch, tokens)
    off = 0 if chunks else 1  # decodes alone are a line, to be rounded elsewhere
    assert abs(timer.mixed_ns(chunks, *step) - round(max(ns, floor))) <= off


@settings(max_examples=60, deadline=None)
@given(decodes(0), CHUNKS | st.just([]), st.booleans())
def test_the_breakdown_adds_up_to_the_step(
    root: Path, step: tuple[int, int, int, int], chunks: list[tuple[int, int]], together: bool
) -> None:
    if not step[0] and not chunks:
        return
    engine = EngineSpec(chunked_attention=together, decode_step_overhead_us=7, prefill_step_overhead_us=9)
    _, timer = _cached(root, engine)
    costs = timer.explain(Shape(chunks, *step))
    assert abs(sum(c.total_us for c in costs) * 1000 - timer.mixed_ns(chunks, *step)) <= 0.5 + 1e-3
    assert all(c.origin for c in costs)


def test_the_breakdown_names_its_sources(root: Path) -> None:
    timer = Toy(skew=ALPHAS, tp=2).timer(root, engine=EngineSpec(cudagraph=False, decode_step_overhead_us=4))
    costs = {c.layer: c for c in timer.explain(Shape([], 4, 800, 100, 400))}
    assert costs["qkv_proj"].origin == "interpolated between 1 and 9 tokens in tp2/dense.csv"
    assert costs["attention"].origin == "decodes 4, KV length 200 (between 64 and 256) in tp2/attention.csv"
    assert costs["attention: unequal lengths"].origin.startswith("α 0.2000 of the way from mean (200)")
    assert costs["all_reduce"].origin.startswith("formula: ring all-reduce of 64 bytes over 2 ranks")
    assert costs["host overhead"].total_us == 4
    mixed = {c.layer: c for c in timer.explain(Shape([(20, 0), (100, 64)], 4, 800, 200, 200))}
    assert mixed["attention: 100@64"].origin == (
        "chunk 100 (extrapolated, measured up to 64), history 64 (between 32 and 128), decodes 4, "
        "KV length 200 (between 64 and 256) in tp2/attention.csv, less the decodes"
    )


def test_the_timer_of_an_instance_finds_its_parts(root: Path) -> None:
    from types import SimpleNamespace

    expected = Toy(tp=2).timer(root, engine=EngineSpec(decode_step_overhead_us=5))
    instance = SimpleNamespace(
        hardware="Toy",
        npu_mem=SimpleNamespace(mem_bw=None),
        tp_size=2,
        ep_size=1,
        engine=EngineSpec(decode_step_overhead_us=5),
    )
    options = instance_options(
        max_num_seqs=256,
    )
    timer = build_stage_cost(instance, toy_model(), options, cluster_links(bw=1.0, latency=1000.0))  # type: ignore[arg-type]
    assert timer.mixed_ns([(20, 0)], 4, 800, 100, 400) == expected.mixed_ns([(20, 0)], 4, 800, 100, 400)
    assert timer.bundle.variant == "bf16"
