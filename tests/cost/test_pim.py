"""Attention in memory, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.cost.memory_reads import HalfTimes, PimAttention, halves, interleaved_ns
from servesim.specs.model import load_model
from servesim.specs.pim import AttentionCost

COST = AttentionCost(slope=2.0, intercept=100.0)
TWO_CHANNELS = PimAttention(1.0, 10.0, 2)
LENGTHS = st.lists(st.integers(0, 10_000), max_size=40)


def test_the_reference_shape_takes_slope_and_intercept_as_they_are() -> None:
    llama = PimAttention.of(COST, load_model("meta-llama/Llama-3.1-8B"), "bfloat16", 4, 1)
    assert (llama.slope_ns, llama.intercept_ns, llama.channels) == (2.0, 100.0, 4)


def test_twice_the_query_heads_take_twice_the_slope() -> None:
    # Llama-3.1-70B: 64 query heads and 8 KV heads of 128
    large = PimAttention.of(COST, load_model("meta-llama/Llama-3.1-70B"), "bfloat16", 4, 1)
    assert (large.slope_ns, large.intercept_ns) == (4.0, 100.0)


def test_fp8_kv_halves_the_intercept() -> None:
    llama = PimAttention.of(COST, load_model("meta-llama/Llama-3.1-8B"), "fp8", 4, 1)
    assert (llama.slope_ns, llama.intercept_ns) == (2.0, 50.0)


def test_ranks_split_a_request_and_the_channels() -> None:
    llama = PimAttention.of(COST, load_model("meta-llama/Llama-3.1-8B"), "bfloat16", 8, 2)
    assert (llama.request_ns(100), llama.channels) == (150.0, 4)


def test_three_requests_on_two_channels() -> None:
    # 110, 90 and 60 ns: the longest alone on one channel, 90 + 60 on the other.
    assert TWO_CHANNELS.block_ns([80, 50, 100]) == 150.0
    # 110, 110, 20 and 20: one of each on both.
    assert TWO_CHANNELS.block_ns([10, 100, 10, 100]) == 130.0


def test_with_a_channel_for_each_the_longest_decides() -> None:
    assert TWO_CHANNELS.block_ns([5, 30]) == 40.0
    assert TWO_CHANNELS.block_ns([]) == 0.0


@given(LENGTHS, st.integers(1, 8))
def test_the_slowest_channel_is_within_the_bounds(lengths: list[int], channels: int) -> None:
    pim = PimAttention(1.0, 10.0, channels)
    work = [pim.request_ns(length) for length in lengths]
    least = max(max(work, default=0.0), sum(work) / channels)
    # Longest first is never worse than 4/3 of the best (Graham, 1969).
    assert least - 1e-6 <= pim.block_ns(lengths) <= sum(work) / channels + max(work, default=0.0)


def test_halves_have_equal_work() -> None:
    # 110 | 90, then 60 joins 90 and 20 joins 110.
    first, second = halves([], [50, 100, 10, 80], TWO_CHANNELS)
    assert (first.kv_lengths, second.kv_lengths) == ([100, 10], [80, 50])


def test_chunks_go_to_the_half_with_fewer_tokens() -> None:
    first, second = halves([(5, 0), (3, 7), (2, 0)], [100, 80], TWO_CHANNELS)
    assert (first.chunks, second.chunks) == ([(5, 0)], [(3, 7), (2, 0)])


@given(LENGTHS, st.lists(st.tuples(st.integers(2, 500), st.integers(0, 500)), max_size=8))
def test_halves_lose_nothing_and_differ_by_one_request_at_most(
    lengths: list[int], chunks: list[tuple[int, int]]
) -> None:
    parts = halves(chunks, lengths, TWO_CHANNELS)
    assert sorted(parts[0].kv_lengths + parts[1].kv_lengths) == sorted(lengths)
    assert sorted(parts[0].chunks + parts[1].chunks) == sorted(chunks)
    work = [sum(TWO_CHANNELS.request_ns(length) for length in part.kv_lengths) for part in parts]
    assert abs(work[0] - work[1]) <= TWO_CHANNELS.request_ns(max(lengths, default=0))


def test_one_part_alternates_between_npu_and_memory() -> None:
    assert interleaved_ns([HalfTimes(1.0, 0.0, 10.0, 2.0)], 3) == 3 * (1 + 10 + 2)


def test_two_parts_overlap() -> None:
    # One block. NPU: A before 0-2, B before 2-4. Memory: A 2-7, B 7-12. NPU: A after 7-10, B after 12-15.
    part = HalfTimes(2.0, 0.0, 5.0, 3.0)
    assert interleaved_ns([part, part], 1) == 15
    # Two: A after and before 7-12, in memory 12-17; B 12-17, in memory 17-22; A after 17-20, B after 22-25.
    assert interleaved_ns([part, part], 2) == 25


def test_a_prompt_is_attended_to_on_the_npu_while_memory_works() -> None:
    # Before 0-2; memory 2-7 beside the chunk's attention 2-10; after 10-13.
    assert interleaved_ns([HalfTimes(2.0, 8.0, 5.0, 3.0)], 1) == 13
    assert interleaved_ns([HalfTimes(2.0, 4.0, 5.0, 3.0)], 1) == 10


def test_each_half_pays_for_its_own_prompts() -> None:
    # A: before 0-2, memory 2-7, chunk 2-10; B: before 10-12, memory 12-17; A after 12-15, B after 17-20.
    chunk, none = HalfTimes(2.0, 8.0, 5.0, 3.0), HalfTimes(2.0, 0.0, 5.0, 3.0)
    assert interleaved_ns([chunk, none], 1) == 20
    # A: before 0-2, memory 2-7; B: before 2-4, memory 7-12, chunk 4-12; A after 12-15, B after 15-18.
    assert interleaved_ns([none, chunk], 1) == 18


@given(
    st.lists(
        st.tuples(*[st.floats(0, 100)] * 4).map(lambda times: HalfTimes(*times)), min_size=1, max_size=2
    ),
    st.integers(1, 6),
)
def test_overlap_is_no_faster_than_either_resource(parts: list[HalfTimes], blocks: int) -> None:
    taken = interleaved_ns(parts, blocks)
    npu = blocks * sum(part.before + part.prefill + part.after for part in parts)
    memory = blocks * sum(part.pim for part in parts)
    assert max(npu, memory) - 1e-6 <= taken <= npu + memory + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_more_channels_than_requests_change_nothing(channels: int) -> None:
    assert PimAttention(1.0, 0.0, channels).block_ns([7]) == 7
