"""The log of steps gives back what was put in, whichever way it keeps it."""

from __future__ import annotations

from itertools import accumulate
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.results import columns
from servesim.results.columns import PACKED, Column
from servesim.results.sparse_columns import SparseColumn
from servesim.results.step_log import StepLog

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(1, 5), *[st.integers(0, 9)] * 4, *[st.sampled_from([0, 0, 3])] * 8
    ),
    max_size=12,
)


@given(ROWS)
def test_every_column_is_the_plain_list_of_its_numbers(rows: list[tuple[int, ...]]) -> None:
    log, plain, end = StepLog(), {name: list[int]() for name in StepLog.COLUMNS}, 0
    for wait, duration, decodes, running, waiting, used, *few in rows:
        start, end = end + wait, end + wait + duration
        step = log.append(start, end, decodes, running, waiting, used)
        each = (decodes, running, waiting, used)
        values = {"start_ns": start, "end_ns": end, **dict(zip(StepLog.EACH, each, strict=True))}
        for name, value in zip(StepLog.FEW, few, strict=True):
            values[name] = value
            if value:
                getattr(log, name).put(step, value)
        for name, value in values.items():
            plain[name].append(value)
    assert len(log) == len(rows)
    for name, numbers in plain.items():
        column = getattr(log, name)
        assert list(column) == numbers
        assert log.column(name).dtype == np.int64
        assert log.column(name).tolist() == numbers
        assert log.most(name) == max(numbers, default=0)
        assert [column[i] for i in range(-len(rows), len(rows))] == numbers * 2
        for cut in (slice(1, 4), slice(None, -1), slice(3, None, 2), slice(2, 99)):
            assert list(column[cut]) == numbers[cut]
        if isinstance(column, SparseColumn):
            assert column.total() == sum(numbers)
            with pytest.raises(IndexError):
                column[len(rows)]


@given(st.integers(0, 3), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_quiet_steps_are_as_if_added_one_by_one(wait: int, durations: list[int]) -> None:
    together, single = StepLog(), StepLog()
    for log in (together, single):
        log.append(0, 10, 1, 1, 0, 1)
    ends = [10 + wait + sum(durations[: i + 1]) for i in range(len(durations))]
    used = [i + 2 for i in range(len(durations))]
    together.append_quiet(10 + wait, ends, used, 3, 4, 5)
    start = 10 + wait
    for end, blocks in zip(ends, used, strict=True):
        single.append(start, end, 3, 4, 5, blocks)
        start = end
    for name in StepLog.COLUMNS:
        assert list(getattr(together, name)) == list(getattr(single, name))


def test_a_number_can_be_set_late() -> None:
    log = StepLog()
    for step in range(5):
        log.append(step, step + 1, 0, 0, 0, 0)
    for step, value in ((3, 7), (1, 5), (3, 8)):
        log.tier_bytes.put(step, value)
    assert list(log.tier_bytes) == [0, 5, 0, 8, 0]


def test_a_step_of_a_long_run_takes_11_bytes() -> None:
    log, steps = StepLog(), 40 * PACKED
    log.append_quiet(0, range(9_000_000, 9_000_000 * (steps + 1), 9_000_000), range(steps), 50, 60, 0)
    kept = [getattr(log, name) for name in ("end_ns", *StepLog.EACH)]
    latest = 24 * 2 * PACKED  # are not packed yet
    assert sum(column.num_bytes for column in kept) < 11 * steps + latest
    assert all(len(getattr(log, name)._steps) == 0 for name in ("start_ns", *StepLog.FEW))


@given(st.integers(1, 30), st.lists(st.integers(0, 2**40), min_size=1, max_size=40))
def test_packed_numbers_are_the_same(narrow: int, numbers: list[int]) -> None:
    with patch.object(columns, "PACKED", 32), patch.object(columns, "_TOGETHER", 8):
        for plain in (
            list(accumulate([number % 2**narrow for number in numbers] * 8)),
            [number % 2**narrow - 2 for number in numbers] * 8,
            list(accumulate(numbers * 8)),
            numbers * 8,
            [5] * 200,
        ):
            column, grown = Column("q", np.array(plain)), Column("q")
            for number in plain:
                grown.append(number)
            assert len(grown) - grown.packed < 64 + 8
            assert list(column) == list(grown) == plain
            assert column == grown
            assert [column[at] for at in range(-len(plain), len(plain))] == plain * 2
            assert column.most() == max(0, *plain)
            for start, stop in ((0, len(plain)), (3, 40), (31, 33), (len(plain) - 2, len(plain)), (9, 9)):
                assert column.between(start, stop).tolist() == column[start:stop] == plain[start:stop]
            for wrong in (len(plain), -len(plain) - 1):
                with pytest.raises(IndexError):
                    column[wrong]


def test_a_log_packs_its_columns_together() -> None:
    log, ends = StepLog(), range(10, 10 * (5 * PACKED + 3), 10)
    for end in ends:
        log.append(end - 10, end, end % 7, end % 11, 0, 7)
    assert all(column.packed == 4 * PACKED for column in (log.end_ns, *map(log.__getattribute__, log.EACH)))
    assert log.column("end_ns").tolist() == list(ends)
    assert log.column("start_ns", 9, 4 * PACKED).tolist() == [end - 10 for end in ends[9 : 4 * PACKED]]
    assert log.decode_tokens[-PACKED:] == [end % 7 for end in ends[-PACKED:]]
    assert log.durations().tolist() == [10] * len(ends)
    assert log.latest_ends(2) == list(ends[-2:])
    covered = [step for first, last in log.parts(3) for step in range(first, last)]
    assert covered == list(range(3, len(ends)))
