"""The second-by-second view of a replay, worked out by hand."""

from __future__ import annotations

from typing import Any

from servesim.bench.replay_folder import Segment, tick_rows

CLOCK = 5000.0  # the monotonic clock at wall time 100


def row(sent: float, prompt: int, *tokens: float) -> dict[str, Any]:
    """A request sent ``sent`` s after the start, with tokens at those times."""
    return {
        "input_toks": prompt,
        "output_toks": len(tokens),
        "arrival_time": 100 + sent,
        "queued_ts": CLOCK + sent,
        "first_token_ts": CLOCK + tokens[0],
        "last_token_ts": CLOCK + tokens[-1],
        "token_ts": [CLOCK + token for token in tokens],
    }


def test_two_requests_second_by_second() -> None:
    found = [row(0.1, 10, 0.5, 1.5, 2.5), row(0.2, 7, 1.25, 1.75)]
    assert tick_rows(found, [Segment(100.0, 102.6)], 1.0) == [
        (1.0, 10.0, 1.0, 1, 1),
        (2.0, 7.0, 3.0, 1, 0),
        (3.0, 0.0, 1.0, 0, 0),
    ]


def test_without_single_tokens_they_are_spread_evenly() -> None:
    one = row(0.0, 5, 0.5, 1.5, 2.5)
    del one["token_ts"]
    assert [tokens for _, _, tokens, _, _ in tick_rows([one], [Segment(100.0, 103.0)], 1.0)] == [1, 1, 1]


def test_the_pause_between_two_sessions_is_left_out() -> None:
    found = [row(0.0, 5, 0.25, 0.5), row(3600.0, 5, 3600.25, 3600.5)]
    segments = [Segment(100.0, 100.6), Segment(3700.0, 3700.6)]
    ends = [end for end, *_ in tick_rows(found, segments, 1.0)]
    assert ends == [1.0, 3600.0, 3601.0]


def test_nothing_recorded_has_no_ticks() -> None:
    assert tick_rows([], [Segment(100.0, 101.0)], 1.0) == []
