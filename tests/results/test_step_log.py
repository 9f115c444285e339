"""The log of steps gives back what was put in, whichever way it keeps it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.results.step_log import SparseColumn, StepLog

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


def test_a_step_of_decodes_takes_24_bytes() -> None:
    log = StepLog()
    log.append_quiet(0, range(1, 1001), range(1000), 50, 50, 0)
    columns = [getattr(log, name) for name in ("end_ns", *StepLog.EACH)]
    assert sum(column.itemsize for column in columns) == 24
    assert all(len(getattr(log, name)._steps) == 0 for name in ("start_ns", *StepLog.FEW))
