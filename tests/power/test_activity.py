"""Active, standby and idle time out of spans of activity."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from servesim.power.activity import Spans, States, moved_within, states


def spans(*pairs: tuple[int, int]) -> Spans:
    starts, ends = zip(*pairs, strict=True) if pairs else ((), ())
    return Spans(np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64))


def in_order(pairs: list[tuple[int, int]]) -> Spans:
    """Spans of random (start, length), with starts and ends sorted as those of steps are."""
    starts = sorted(start for start, _ in pairs)
    lengths = [length for _, length in pairs]
    ends = np.maximum.accumulate([start + length for start, length in zip(starts, lengths, strict=True)])
    return spans(*zip(starts, ends.tolist(), strict=True)) if pairs else spans()


SPANS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=8).map(in_order)
TIMES = st.integers(0, 300)


def second_by_second(activity: Spans, begin: int, end: int, standby: int) -> States:
    """The slow, obvious way: every unit of time on its own."""
    active = calm = 0
    for time in range(begin, end):
        if any(s <= time < e for s, e in zip(activity.start_ns, activity.end_ns, strict=True)):
            active += 1
        elif any(e <= time < e + standby for e in activity.end_ns):
            calm += 1
    return States(active, calm, end - begin - active - calm)


def test_standby_follows_activity_and_gives_way_to_idle() -> None:
    assert states(spans((10, 20), (50, 60)), 0, 100, 15) == States(20, 30, 50)


def test_a_short_gap_is_standby_from_end_to_end() -> None:
    assert states(spans((0, 20), (25, 60)), 0, 60, 15) == States(55, 5, 0)


def test_steps_that_overlap_count_once() -> None:
    assert states(spans((0, 20), (10, 30)), 0, 40) == States(30, 0, 10)


def test_a_device_that_never_works_is_idle() -> None:
    assert states(spans(), 5, 40, 100) == States(0, 0, 35)


def test_late_times_do_not_overflow() -> None:
    month = 30 * 86400 * 10**9
    many = spans(*((month + step, month + step + 1) for step in range(10_000)))
    assert states(many, 0, 2 * month, 10) == States(10_000, 10, 2 * month - 10_010)


def test_activity_past_the_end_of_the_window_is_left_to_the_next() -> None:
    assert states(spans((10, 30)), 0, 20, 5) == States(10, 0, 10)
    assert states(spans((10, 30)), 20, 40, 5) == States(10, 5, 5)


@given(SPANS, TIMES, TIMES, st.integers(0, 80))
def test_states_are_those_of_every_unit_of_time(activity: Spans, a: int, b: int, standby: int) -> None:
    begin, end = sorted((a, b))
    if not len(activity.start_ns) or (activity.end_ns > activity.start_ns).all():
        assert states(activity, begin, end, standby) == second_by_second(activity, begin, end, standby)


@given(st.lists(SPANS, max_size=3), TIMES, TIMES)
def test_a_union_is_active_whenever_one_of_them_is(several: list[Spans], a: int, b: int) -> None:
    begin, end = sorted((a, b))
    together = in_order([])
    for each in several:
        together = Spans(
            np.concatenate((together.start_ns, each.start_ns)), np.concatenate((together.end_ns, each.end_ns))
        )
    expected = second_by_second(together, begin, end, 0).active_ns
    assert states(Spans.union(several), begin, end).active_ns == expected


def test_pipeline_stages_take_their_turns() -> None:
    step = spans((0, 10), (3, 14))
    first, second, third = (step.part(stage, 3) for stage in range(3))
    assert [first.end_ns.tolist(), second.start_ns.tolist()] == [[3, 6], [3, 6]]
    assert [second.end_ns.tolist(), third.start_ns.tolist()] == [[6, 10], [6, 10]]
    assert third.end_ns.tolist() == [10, 14]


def test_amounts_move_evenly_over_their_span() -> None:
    step, amounts = spans((10, 20), (20, 40)), np.array([100, 7])
    assert moved_within(step, amounts, 0, 15) == 50
    assert moved_within(step, amounts, 15, 30) == 50 + 3
    assert moved_within(step, amounts, 30, 50) == 4
    assert moved_within(step, amounts, 0, 50) == 107
    assert moved_within(step, np.array([2**62, 2**62 + 1]), 0, 50) == 2**63 + 1


@given(SPANS, st.lists(TIMES, min_size=2, max_size=6).map(sorted), st.data())
def test_pieces_of_a_window_add_up_to_it(activity: Spans, cuts: list[int], data: st.DataObject) -> None:
    count = len(activity.start_ns)
    amounts = np.array(
        data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count)), dtype=np.int64
    )
    pieces = list(pairwise(cuts))
    whole = states(activity, cuts[0], cuts[-1], 20)
    parts = [states(activity, *piece, 20) for piece in pieces]
    assert whole.active_ns == sum(part.active_ns for part in parts)
    assert whole.standby_ns == sum(part.standby_ns for part in parts)
    moved = [moved_within(activity, amounts, *piece) for piece in pieces]
    assert moved_within(activity, amounts, cuts[0], cuts[-1]) == sum(moved)
