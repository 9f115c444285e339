"""Packed records come back as they were put in, in any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.results.columns import PACKED, Column
from servesim.results.request_log import RequestLog
from servesim.results.request_record import RequestRecord
from servesim.results.stats import TokenGaps

rare = st.sampled_from([0, 0, 0, 7])
runs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(40, 90)), max_size=3)


@st.composite
def records(draw: st.DrawFn) -> list[RequestRecord]:
    made = []
    for request in draw(st.lists(st.integers(0, 2**40), unique=True, max_size=8)):
        record = RequestRecord(request, *draw(st.tuples(*[st.integers(-1, 2**31 - 1)] * 6)), draw(runs))
        for name in ("extra_tokens", "npu_hit", "storage_hit", "preemptions", "recomputed_tokens"):
            setattr(record, name, draw(rare))
        record.front_end_ns, record.cut_tokens = draw(rare), draw(rare)
        if draw(st.booleans()):
            record.hand_over(1, draw(st.integers(0, 2**50)))
            record.token_steps.append((1, 2, 3))
        if draw(st.booleans()):
            record.note_lost(5)
        made.append(record)
    return made


@given(records())
def test_records_come_back_as_they_were(made: list[RequestRecord]) -> None:
    log = RequestLog(made)
    assert list(log) == made
    assert log == made
    assert log[1:] == made[1:]
    assert [log[i - len(made)] for i in range(len(made))] == made
    assert log[::2] == made[::2]
    in_order = sorted(made, key=lambda record: record.request)
    assert list(log.in_order()) == in_order
    assert log.in_order().in_order() == in_order
    for name in ("request", "instance", "end_ns", "front_end_ns", "npu_hit", "handed_over_ns"):
        assert log.column(name).tolist() == [getattr(record, name) for record in made]
    assert log.total("preemptions") == sum(record.preemptions for record in made)
    with pytest.raises(IndexError):
        log[len(made)]


@given(records())
def test_tokens_and_gaps_are_those_of_the_records(made: list[RequestRecord]) -> None:
    tracks = [Column("q", [i**2 for i in range(100)]), Column("q", range(0, 100_000, 1000))]
    gaps = TokenGaps(tracks, RequestLog(made))
    each = [
        sum(last - first + 1 for _, first, last in record.token_steps) + record.extra_tokens
        for record in made
    ]
    assert gaps.tokens().tolist() == each
    values, counts = gaps.histogram()
    expected = sorted(gap for record in made for gap in gaps.of(record).tolist())
    assert sorted(np.repeat(values, counts).tolist()) == expected


def test_a_request_of_many_takes_36_bytes() -> None:
    log, count = RequestLog(), 20 * PACKED
    for i in range(count):
        now = 10**10 + i * 10**8  # ten a second
        log.append(RequestRecord(i, 0, now, now + 1, now + 2, now + 3, now + 10**9, [(0, i, i + 9)]))
    latest = 84 * 2 * PACKED  # are not packed yet
    assert sum(column.num_bytes for column in log._each.values()) < 36 * count + latest
    assert [log[i].end_ns for i in (0, 99_999)] == [11 * 10**9, 10**10 + 99_999 * 10**8 + 10**9]
    assert not any([log._more_runs, log._rest, *log._few.values()])
