"""Inter-token latencies from step ends."""

from __future__ import annotations

import ast
from itertools import accumulate
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from servesim.results import columns, stats
from servesim.results.columns import Column
from servesim.results.records import RequestRecord
from servesim.results.request_log import RequestLog
from servesim.results.stats import GapText, TokenGaps
from tests.hand_made import MS, two_requests


def test_gaps_are_differences_of_step_ends() -> None:
    gaps = two_requests().token_gaps
    assert gaps.of(gaps.records[0]).tolist() == [10 * MS, 12 * MS, 10 * MS]


def test_the_gap_across_a_preemption_spans_the_steps_between() -> None:
    gaps = two_requests().token_gaps
    assert gaps.of(gaps.records[1]).tolist() == [12 * MS, 28 * MS]
    assert gaps.tokens().tolist() == [4, 3]


def test_the_histogram_counts_a_shared_step_once_per_request() -> None:
    values, counts = two_requests().token_gaps.histogram()
    assert np.repeat(values, counts).tolist() == [10 * MS, 12 * MS, 12 * MS, 10 * MS, 28 * MS]


def test_a_request_without_tokens_has_no_gaps() -> None:
    record = RequestRecord(0, 0, 0, 0, 0, 0, 0)
    gaps = TokenGaps([Column("q", [5])], RequestLog([record]))
    assert (len(gaps.of(record)), gaps.tokens().tolist(), GapText(gaps).of(record)) == (0, [0], "[]")


@st.composite
def token_gaps(draw: st.DrawFn) -> TokenGaps:
    """Step ends of one to three instances, and requests with runs of steps in ascending time."""
    ends = []
    for _ in range(draw(st.integers(1, 3))):
        durations = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=30))
        ends.append(Column("q", accumulate(durations)))
    records = []
    for index in range(draw(st.integers(0, 8))):
        instance = draw(st.integers(0, len(ends) - 1))
        bounds = sorted(draw(st.sets(st.integers(0, len(ends[instance]) - 1), max_size=6)))
        runs = [(instance, low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=False)]
        records.append(RequestRecord(index, instance, 0, 0, 0, 0, 0, token_steps=runs))
    return TokenGaps(ends, RequestLog(records))


@given(token_gaps())
def test_the_histogram_is_that_of_all_gaps_written_out(gaps: TokenGaps) -> None:
    values, counts = gaps.histogram()
    written_out = [gap for record in gaps.records for gap in gaps.of(record).tolist()]
    assert sorted(np.repeat(values, counts).tolist()) == sorted(written_out)


@given(token_gaps())
def test_the_text_of_a_request_lists_its_gaps(gaps: TokenGaps) -> None:
    for at_once in (columns.PACKED, 4):
        with patch.object(stats, "PACKED", at_once):
            text = GapText(gaps)
            for record in gaps.records:
                assert ast.literal_eval(text.of(record)) == gaps.of(record).tolist()
                assert text.of(record) == str(gaps.of(record).tolist())
