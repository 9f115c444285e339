"""Reading streamed answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.bench.token_stream import EventLines, RequestFailedError, TokenStream, error_text


@given(st.lists(st.integers(0, 10**6), max_size=8), st.lists(st.integers(1, 30), min_size=1), st.booleans())
def test_events_survive_any_way_of_cutting_the_stream(
    numbers: list[int], cuts: list[int], crlf: bool
) -> None:
    end = b"\r\n\r\n" if crlf else b"\n\n"
    stream = b": comment\n" + b"".join(b"data: %d" % number + end for number in numbers)
    lines, payloads, place = EventLines(), [], 0
    for turn in range(len(stream)):
        step = cuts[turn % len(cuts)]
        payloads += lines.feed(stream[place : place + step])
        place += step
    assert [int(payload) for payload in payloads] == numbers


def event(**values: object) -> bytes:
    return json.dumps(values).encode()


def test_counted_chunks_may_have_no_text_or_several_tokens() -> None:
    stream = TokenStream(counted=True, most_tokens=9)
    stream.take(event(choices=[{"text": ""}], usage={"prompt_tokens": 7, "completion_tokens": 1}), 1.0)
    stream.take(event(choices=[{"text": "abc"}], usage={"prompt_tokens": 7, "completion_tokens": 3}), 2.0)
    assert not stream.finished
    stream.take(event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3}), 3.0)
    stream.take(b"[DONE]", 3.0)
    assert (stream.token_s, stream.output_tokens, stream.prompt_tokens) == ([1.0, 2.0, 2.0], 3, 7)
    assert stream.finished


def test_without_counts_every_chunk_with_text_is_a_token() -> None:
    stream = TokenStream(counted=False, most_tokens=9)
    stream.take(event(choices=[{"delta": {"role": "assistant", "content": ""}}], usage=None), 1.0)
    stream.take(event(choices=[{"delta": {"reasoning_content": "hm"}}]), 2.0)
    stream.take(event(choices=[{"delta": {"content": "yes"}, "finish_reason": "stop"}]), 3.0)
    assert (stream.token_s, stream.output_tokens, stream.finished) == ([2.0, 3.0], 2, True)


def test_an_error_within_the_stream_is_an_error() -> None:
    stream = TokenStream(counted=True, most_tokens=9)
    with pytest.raises(RequestFailedError, match="out of memory") as caught:
        stream.take(event(error={"message": "out of\n memory", "code": 500}), 1.0)
    assert caught.value.status == 500
    with pytest.raises(RequestFailedError, match="no JSON object: 'oops'"):
        stream.take(b"oops", 1.0)


HOSTILE = {
    "counts": (event(choices=[{"text": "x"}], usage={"completion_tokens": 10}), "more than 9 tokens"),
    "a count in the millions": (event(usage={"completion_tokens": 10**9}), "more than 9 tokens"),
    "a count beyond all": (event(usage={"completion_tokens": 10**30}), "are no number of tokens"),
    "a negative count": (event(usage={"completion_tokens": -1}), "completion_tokens that are no number"),
    "a count in words": (event(usage={"prompt_tokens": "7"}), "prompt_tokens that are no number"),
    "usage in a list": (event(usage=[1]), "a usage that is no object"),
    "choices in words": (event(choices="x"), "choices that are no list of objects"),
    "a choice in words": (event(choices=["x"]), "choices that are no list of objects"),
    "delta in words": (event(choices=[{"delta": "x"}]), "a delta that is no object"),
}


@pytest.mark.parametrize(("payload", "told"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_event_fails_its_request(payload: bytes, told: str) -> None:
    with pytest.raises(RequestFailedError, match=told):
        TokenStream(counted=False, most_tokens=9).take(payload, 1.0)


def test_a_token_too_many_fails_its_request() -> None:
    stream = TokenStream(counted=False, most_tokens=9)
    for _ in range(10):
        stream.take(event(choices=[{"text": "x"}]), 1.0)
    with pytest.raises(RequestFailedError, match="more than 9 tokens"):
        stream.take(event(choices=[{"text": "x"}]), 1.0)


def test_a_line_without_an_end_fails_its_request() -> None:
    lines = EventLines()
    for _ in range(4):
        lines.feed(b"x" * (1 << 20))
    with pytest.raises(RequestFailedError, match=r"a line of more than 4,194,304 bytes"):
        lines.feed(b"x")


def test_the_message_of_an_error_is_found_in_every_form() -> None:
    assert error_text({"error": {"message": "a"}}) == "a"
    assert error_text({"object": "error", "message": "b"}) == "b"
    assert error_text({"detail": "c"}) == "c"
    assert error_text({"error": {"code": 3}}) == '{"code":3}'
    assert len(error_text("x" * 9999)) == 500
