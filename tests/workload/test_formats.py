"""Published formats are recognised by their content and mean what their publishers say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.errors import InputError
from servesim.workload.description import describe
from servesim.workload.formats import detect, load_workload
from servesim.workload.hashes import answer_ids, block_ids, prompt_ids

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.workload.request import Workload


def from_text(folder: Path, text: str, **options: int | bool | float) -> Workload:
    path = folder / "trace"
    path.write_text(text)
    return load_workload(path, **options)  # type: ignore[arg-type]


def rows(workload: Workload) -> list[tuple[int, int, int]]:
    return [(request.arrival_ns, request.input_tokens, request.output_tokens) for request in workload]


def mooncake(timestamp: object, tokens: int, hash_ids: list[int] | None, **changes: object) -> str:
    entry = {
        "timestamp": timestamp,
        "input_length": tokens,
        "output_length": 9,
        "hash_ids": hash_ids,
    } | changes
    return json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n"


def test_mooncake_times_are_milliseconds_from_the_first_request(tmp_path: Path) -> None:
    text = mooncake(3000, 600, [0, 1]) + mooncake(1000.5, 512, [0]) + mooncake(3052, 1, None)
    assert rows(from_text(tmp_path, text)) == [(1_999_500_000, 600, 9), (0, 512, 9), (2_051_500_000, 1, 9)]


def test_mooncake_prompts_share_what_their_hash_ids_share(tmp_path: Path) -> None:
    text = mooncake(0, 1500, [4, 5, 6]) + mooncake(1, 1600, [4, 5, 7, 8]) + mooncake(2, 1024, [9, 5])
    workload = from_text(tmp_path, text)
    found = block_ids(workload, 16)
    assert [len(ids) for ids in found.ids] == [64, 64, 0]  # 2 x 512 tokens in blocks of 16
    assert found.ids[0] == found.ids[1]
    assert [len(prompt_ids(request)) for request in workload] == [1500, 1600, 1024]  # type: ignore[arg-type]
    assert all(request.input_ids is None for request in workload)  # made only where they are asked for


def test_mooncake_tokens_without_a_hash_id_are_shared_by_none(tmp_path: Path) -> None:
    text = mooncake(0, 1000, [4]) + mooncake(1, 1000, [4])
    found = block_ids(from_text(tmp_path, text), 16)
    assert [len(ids) for ids in found.ids] == [32, 32]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (mooncake(-1, 5, [1]), "timestamp: -1 is not possible"),
        (mooncake("1", 5, [1]), "timestamp: '1' is not a number"),
        (mooncake(1, 0, [1]), "input_length: 0 is too small"),
        (mooncake(1, 5, [1, 2]), "hash_ids: has 2 ids for 5 tokens, 512 to an id; must have at most 1"),
        (mooncake(1, 5, [-1]), r"hash_ids\[0\]: -1 is too small"),
        (mooncake(1, 5, [2**60]), "hash_ids: 1152921504606846976 is too large"),
        (mooncake(1, 5, [1], output_length=0), "output_length: 0 is too small"),
        (mooncake(1, 5, [1], hash_id=3), "hash_id: is not a known key; did you mean hash_ids?"),
        (mooncake(1, 5, [1]).replace("[1]", "7"), "hash_ids: 7 is not a list"),
        ('{"input_length": 5', "column "),
    ],
)
def test_a_bad_mooncake_line_is_reported(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"trace:2: {expected}"):
        from_text(tmp_path, mooncake(0, 5, [1]) + line)
    assert from_text(tmp_path, mooncake(0, 5, [1]) + line, lenient=True).skipped == 1


def turn(session: object, **fields: object) -> str:
    return json.dumps({"session_id": session, "input_length": 100, "output_length": 9} | fields) + "\n"


INTERLEAVED = (
    turn("a", timestamp=100, hash_ids=[1])
    + turn("b", timestamp=600)
    + turn("a", delay=2000, input_length=700, hash_ids=[1, 2])
    + mooncake(1100, 50, None)
    + turn("b", delay=0.5)
    + turn("a", delay=10)
)


def test_turns_of_a_session_follow_its_first(tmp_path: Path) -> None:
    workload = from_text(tmp_path, INTERLEAVED)
    found = [(r.session_id, r.sub_request, r.predecessor, r.arrival_ns, r.tool_ns) for r in workload]
    assert found == [
        ("a", 0, -1, 0, 0),
        ("a", 1, 0, 0, 2_000_000_000),
        ("a", 2, 1, 0, 10_000_000),
        ("b", 0, -1, 500_000_000, 0),
        ("b", 1, 3, 500_000_000, 500_000),
        (None, 0, -1, 1_000_000_000, 0),
    ]
    assert [request.index for request in workload] == list(range(6))
    assert workload.requests[1].input_tokens == 700
    assert len(block_ids(workload, 16).ids[1]) == 100 // 16


def test_a_session_is_one_entry(tmp_path: Path) -> None:
    assert [r.session_id for r in from_text(tmp_path, INTERLEAVED, num_reqs=1)] == ["a"] * 3
    assert [r.session_id for r in from_text(tmp_path, INTERLEAVED, num_reqs=2)] == ["a"] * 3 + ["b"] * 2


def test_a_turn_needs_its_delay(tmp_path: Path) -> None:
    text = turn("a", timestamp=0) + turn("a", timestamp=5)
    with pytest.raises(InputError, match="trace:2: delay: is missing; a later turn of session 'a'"):
        from_text(tmp_path, text)


CHATS = """\
{"chat_id": 4, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40, "output_length": 30, \
"type": "text", "turn": 1, "hash_ids": [7, 8, 9]}
{"chat_id": 5, "parent_chat_id": 4, "timestamp": 2.25, "input_length": 56, "output_length": 6, \
"type": "text", "turn": 2, "hash_ids": [7, 8, 9, 10]}
"""


def test_chat_traces_count_seconds_and_16_tokens(tmp_path: Path) -> None:
    workload = from_text(tmp_path, CHATS)
    assert rows(workload) == [(0, 40, 30), (1_750_000_000, 56, 6)]
    # The third hash id covers 8 tokens of the first prompt and 8 of its answer.
    assert describe(workload)["reusable_prompt_tokens"] == 48
    answer = answer_ids(workload.requests[0])
    assert answer is not None
    assert len(set(answer.tolist())) == 8 + 1


def test_traces_of_simulators_count_seconds(tmp_path: Path) -> None:
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n1.75,396,109\n5.0,879,55\n"
    assert rows(from_text(tmp_path, text)) == [
        (0, 374, 44),
        (1_250_000_000, 396, 109),
        (4_500_000_000, 879, 55),
    ]


def test_azure_traces_have_dates(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 23:59:59.9799600,374,44\r\n"
        "2023-11-17 00:00:00.0000000,396,109\r\n"
        "2023-11-17 00:00:01,8,1\r\n"
    )
    assert rows(from_text(tmp_path, text)) == [(0, 374, 44), (20_040_000, 396, 109), (1_020_040_000, 8, 1)]


def test_azure_traces_of_2024_have_a_time_zone(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:00.017335+00:00,2399,6\n"
    )
    assert rows(from_text(tmp_path, text)) == [(0, 2162, 5), (7_405_000, 2399, 6)]


BURST_HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpt_counts_seconds(tmp_path: Path) -> None:
    text = BURST_HEADER + "5,GPT-4,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
    workload = from_text(tmp_path, text)
    assert rows(workload) == [(0, 472, 18), (40 * 10**9, 1087, 230)]
    assert {request.model for request in workload} == {None}


def test_burstgpt_columns_are_found_by_name(tmp_path: Path) -> None:
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        '1.5,"a,b",3,GPT-4,10,20,30,API log\n'
    )
    assert rows(from_text(tmp_path, text, request_rate=float("inf"))) == [(0, 10, 20)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("118,ChatGPT,14,-1,14,API log", "response tokens: -1 is too small"),
        ("118,ChatGPT,x,1,14,API log", "request tokens: 'x' is not an integer"),
        ("118,ChatGPT,14", "has 3 values; must have 6, as the header"),
        ("noon,ChatGPT,14,5,19,API log", "timestamp: 'noon' is not a time of a BurstGPT"),
        ("nan,ChatGPT,14,5,19,API log", "timestamp: 'nan' is not a time"),
        ("-1,ChatGPT,14,5,19,API log", "timestamp: '-1' is not a time"),
    ],
)
def test_a_bad_row_is_reported(tmp_path: Path, line: str, expected: str) -> None:
    text = BURST_HEADER + "5,ChatGPT,472,18,490,API log\n" + line + "\n"
    with pytest.raises(InputError, match=f"trace:3: {expected}"):
        from_text(tmp_path, text)
    assert from_text(tmp_path, text, lenient=True).skipped == 1


@pytest.mark.parametrize("when", ["yesterday", "2023-11-16 18:17:03.12x", "2023-13-16 18:17:03", ""])
def test_a_bad_date_is_reported(tmp_path: Path, when: str) -> None:
    with pytest.raises(InputError, match=r"trace:2: timestamp: '.*' is not a time of a Azure LLM trace"):
        from_text(tmp_path, f"TIMESTAMP,ContextTokens,GeneratedTokens\n{when},1,1\n")


RESULT = {
    "backend": "vllm",
    "duration": 30.5,
    "total_token_throughput": 100.0,
    "rtfx": float("nan"),
    "input_lens": [100, 200, 50],
    "output_lens": [10, 20, 5],
    "ttfts": [0.1, 0.2, 0.3],
    "start_times": [1000.25, 1000.0, 1002.0],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_benchmark_result_is_the_workload_it_was_measured_with(tmp_path: Path, indent: int | None) -> None:
    expected = [(250_000_000, 100, 10), (0, 200, 20), (2_000_000_000, 50, 5)]
    assert rows(from_text(tmp_path, json.dumps(RESULT, indent=indent))) == expected


def without_starts(**changes: object) -> str:
    return json.dumps({key: value for key, value in (RESULT | changes).items() if key != "start_times"})


def test_a_result_without_start_times_keeps_its_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = {"input_lens": [500] * 40, "output_lens": [100] * 40}
    text = without_starts(**lengths, request_rate=2.0, max_concurrency=8)
    arrivals = [arrival for arrival, _, _ in rows(from_text(tmp_path, text))]
    assert (arrivals[0], round(arrivals[-1] / 1e9, 3)) == (0, 19.5)
    assert len(set(arrivals)) == 40
    assert arrivals == sorted(arrivals)
    assert arrivals != [arrival for arrival, _, _ in rows(from_text(tmp_path, text, seed=7))]
    assert "holds no start_times: arrivals are made at its request_rate 2 and burstiness 1" in caplog.text
    assert "--max-concurrency 8" in caplog.text


def test_a_burstier_client_makes_burstier_arrivals(tmp_path: Path) -> None:
    lengths = {"input_lens": [5] * 2000, "output_lens": [1] * 2000}

    def variation(burstiness: float) -> float:
        text = without_starts(**lengths, request_rate=10.0, burstiness=burstiness)
        gaps = np.diff([request.arrival_ns for request in from_text(tmp_path, text)])
        return float(gaps.std() / gaps.mean())

    assert variation(1.0) == pytest.approx(1.0, rel=0.1)
    assert variation(0.25) == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(("rate", "told"), [("inf", False), (float("inf"), False), (None, True), (-1, True)])
def test_a_result_without_a_rate_arrives_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rate: object, told: bool
) -> None:
    text = without_starts(request_rate=rate)
    assert rows(from_text(tmp_path, text)) == [(0, 100, 10), (0, 200, 20), (0, 50, 5)]
    assert ("--request-rate gives them a rate" in caplog.text) == told


def test_a_result_without_start_times_can_be_given_a_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = without_starts(request_rate=5.0)
    arrivals = [arrival for arrival, _, _ in rows(from_text(tmp_path, text, request_rate=2.0))]
    assert arrivals[0] == 0 < arrivals[1] < arrivals[2]
    assert not caplog.text


def test_a_failed_request_of_a_benchmark_is_reported(tmp_path: Path) -> None:
    text = json.dumps(RESULT | {"output_lens": [10, 0, 5]})
    with pytest.raises(InputError, match="trace: request 2: output_lens: 0 is too small"):
        from_text(tmp_path, text)
    assert len(from_text(tmp_path, text, lenient=True)) == 2
    assert len(from_text(tmp_path, text, num_reqs=1)) == 1


@pytest.mark.parametrize("start", [-1.0, float("nan"), "x", None, 1e300])
def test_a_bad_start_time_of_a_benchmark_is_reported(tmp_path: Path, start: object) -> None:
    with pytest.raises(InputError, match="request 1: start_times: "):
        from_text(tmp_path, json.dumps(RESULT | {"start_times": [start, 1.0, 2.0]}))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b'{"input_toks": 1, "output_toks": 1, "arrival_time_ns": 0}', "JSON lines"),
        (b'{"sub_requests": []}', "JSON lines"),
        (b"{broken", "JSON lines"),
        (b"{}", "JSON lines"),
        (b"{\n", None),
        (b"PK\x03\x04", None),
        (b"load:\n", "inference-perf spec"),
        (b"a,b,c\n", "CSV"),
    ],
)
def test_the_format_is_seen_on_the_first_line(line: bytes, name: str | None) -> None:
    found = detect(line)
    assert (found and found.name) == name
