"""Blocks on SMs: small launches worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.profiler.silicon.list_schedule import repeated_makespan_us, shared_stream_us


def test_each_block_goes_to_the_first_free_sm() -> None:
    # SM A: 5, then nothing; SM B: 1, 2, 3
    assert repeated_makespan_us([5.0, 1.0, 2.0, 3.0], 1, 2) == 6.0


def test_repeats_queue_behind_each_other() -> None:
    assert repeated_makespan_us([4.0], 3, 2) == 8.0


def test_blocks_share_the_memory_until_one_is_left_alone() -> None:
    # 10 bytes/us for all, 6 for one: 3 blocks of 10 run at 10/3 until 3 us; the fourth starts then, alone.
    assert shared_stream_us([10.0, 10.0, 10.0, 12.0], 3, 6.0, 10.0) == pytest.approx(3.0 + 2.0)


def test_a_last_long_block_reads_no_faster_than_one_can() -> None:
    # two blocks of 1 at rate 1 each (1 us), the long one goes on alone at 1 although the memory gives 100
    assert shared_stream_us([1.0, 1.0, 50.0], 3, 1.0, 100.0) == pytest.approx(50.0)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_no_launch_beats_its_work_nor_its_longest_block(work: list[float], sms: int) -> None:
    for time in (
        repeated_makespan_us(work, 1, sms),
        shared_stream_us(work, sms, block_rate=1.0, total_rate=float(sms)),
    ):
        assert time >= max(work) - 1e-6
        assert time >= sum(work) / sms - 1e-6
        assert time <= sum(work) + 1e-6
