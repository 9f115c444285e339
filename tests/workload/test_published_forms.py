"""Files in the shape in which other tools publish or write them: small ones of our own making."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.workload.columns import parse_columns
from servesim.workload.description import describe
from servesim.workload.formats import load_workload
from servesim.workload.generators import write_jsonl
from servesim.workload.texts import Estimate

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.workload.request import Workload

S = 1_000_000_000


def loaded(folder: Path, content: object, **options: Any) -> Workload:
    """A workload of a text, of a document, or of the objects of a list, one a line."""
    path = folder / "trace"
    if isinstance(content, list):
        content = "".join(json.dumps(entry) + "\n" for entry in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_workload(path, **options)


def rows(workload: Workload) -> list[tuple[int, int, int]]:
    return [(request.arrival_ns, request.input_tokens, request.output_tokens) for request in workload]


# ---------------------------------------------------------------------- traces with hashes


def test_other_names_of_mooncake_keys_are_known(tmp_path: Path) -> None:
    entries = [
        {"created_time": 5, "input_tokens": 600, "output_tokens": 7, "hash_ids": [1, 2]},
        {"timestamp": 10, "isl": 512, "osl": 3, "hash_ids": [1]},
        {"session_id": "a", "timestamp": 10, "input_length": 5, "output_length": 3},
        {"session_id": "a", "delay_ms": 20, "input_length": 9, "output_length": 3},
        {"session_id": "a", "input_length": 9, "output_length": 3},
    ]
    workload = loaded(tmp_path, entries)
    assert rows(workload)[:2] == [(0, 600, 7), (5_000_000, 512, 3)]
    assert [request.tool_ns for request in workload][3:] == [20_000_000, 0]
    assert describe(workload)["reusable_prompt_tokens"] == 496  # the last token is always computed


def test_hashes_are_not_expanded(tmp_path: Path) -> None:
    lines = [
        {"timestamp": i, "input_length": 51_200, "output_length": 9, "hash_ids": list(range(i, i + 100))}
        for i in range(500)
    ]
    tracemalloc.start()
    workload = loaded(tmp_path, lines)
    found, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found / len(workload) < 2500  # the token ids of one would be 409,600 bytes


def test_a_written_workload_keeps_its_hashes(tmp_path: Path) -> None:
    entries = [
        {"timestamp": 0, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]},
        {"session_id": "a", "timestamp": 10, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2]},
        {"session_id": "a", "delay": 10, "input_length": 1000, "output_length": 3, "hash_ids": [1, 3]},
    ]
    once = loaded(tmp_path, entries)
    write_jsonl(once, tmp_path / "w.jsonl")
    again = load_workload(tmp_path / "w.jsonl")
    assert rows(again) == rows(once)
    assert describe(again)["reusable_prompt_tokens"] == describe(once)["reusable_prompt_tokens"] == 592 + 512
    assert (tmp_path / "w.jsonl").stat().st_size < 600


AGENT = {
    "id": "conv-1",
    "models": ["m"],
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        {"t": 0.0, "type": "n", "model": "m", "in": 640, "out": 50, "hash_ids": [1, 2, 3], "api_time": 2.0},
        {
            "t": 3.0,
            "type": "subagent",
            "agent_id": "agent_001",
            "requests": [
                {"t": 3.5, "type": "s", "model": "m", "in": 200, "out": 20, "hash_ids": [9], "api_time": 1.0},
                {"t": 5.0, "type": "s", "model": "m", "in": 300, "out": 20, "hash_ids": [9, 10]},
            ],
        },
        {"t": 8.0, "type": "s", "model": "m", "in": 900, "out": 40, "hash_ids": [1, 2, 3, 4, 5]},
    ],
}


@pytest.mark.parametrize("form", ["line", "document"])
def test_a_sub_agent_is_a_session_of_its_own(tmp_path: Path, form: str) -> None:
    text = json.dumps(AGENT, indent=None if form == "line" else 1)
    found = [
        (r.session_id, r.sub_request, r.predecessor, r.arrival_ns, r.tool_ns, r.input_tokens)
        for r in loaded(tmp_path, text)
    ]
    sub = "conv-1/agent_001#1"
    assert found == [
        ("conv-1", 0, -1, 0, 0, 640),
        ("conv-1", 1, 0, 0, 6 * S, 900),  # from 2.0 s, when the answer was there, to 8.0 s
        (sub, 0, -1, round(3.5 * S), 0, 200),
        (sub, 1, 2, round(3.5 * S), round(0.5 * S), 300),
    ]


def test_hashes_of_two_conversations_are_their_own(tmp_path: Path) -> None:
    workload = loaded(tmp_path, [AGENT, AGENT | {"id": "conv-2"}])
    alone = loaded(tmp_path, [AGENT])
    shared = [describe(each, 64)["reusable_prompt_tokens"] for each in (workload, alone)]
    assert shared == [2 * 256, 256]
    everywhere = {"hash_id_scope": "global"}
    common = loaded(tmp_path, [AGENT | everywhere, AGENT | everywhere | {"id": "2"}])
    assert describe(common, 64)["reusable_prompt_tokens"] > 512
    with pytest.raises(InputError, match=r"trace:2: id: 'conv-1' was used by an earlier conversation"):
        loaded(tmp_path, [AGENT, AGENT])


# ---------------------------------------------------------------------- CSV


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpt_is_filtered_as_vllm_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = BURST + "".join(
        f"{second},{model},{tokens},{answer},0,API log\n"
        for second, model, tokens, answer in (
            (1, "ChatGPT", 10, 5),
            (2, "GPT-4", 20, 5),
            (3, "GPT-4", 30, 0),
            (4, "GPT-4", 40, 6),
        )
    )
    workload = loaded(tmp_path, text)
    assert rows(workload) == [(0, 20, 5), (2 * S, 40, 6)]
    assert workload.skipped == 2
    assert "1 requests to other models than GPT-4 are left out" in caplog.text
    assert rows(loaded(tmp_path, text, num_reqs=1)) == [(0, 20, 5)]
    columns = "input=Request tokens,output=Response tokens,arrival=Timestamp:s"
    assert len(loaded(tmp_path, text, columns=columns, lenient=True)) == 3


def test_azure_multimodal_traces_tell_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-22 00:00:00.100000,2,1800,44\n2024-10-22 00:00:01.350000,0,396,109\n"
    )
    assert rows(loaded(tmp_path, text)) == [(0, 1800, 44), (1_250_000_000, 396, 109)]
    assert "NumImages is not used" in caplog.text


def test_servegen_requests_count_seconds(tmp_path: Path) -> None:
    text = "request_id,timestamp,input_tokens,output_tokens\n0,0.5,374,44\n1,1.75,396,109\n"
    assert rows(loaded(tmp_path, text)) == [(0, 374, 44), (1_250_000_000, 396, 109)]
    entries = [
        {"request_id": 0, "timestamp": 0.5, "data": {"input_tokens": 374, "output_tokens": 44}},
        {"request_id": 1, "timestamp": 1.75, "data": {"input_tokens": 396, "output_tokens": 109}},
    ]
    assert rows(loaded(tmp_path, entries)) == [(0, 374, 44), (1_250_000_000, 396, 109)]


def test_lists_of_lengths_have_no_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n374,44,418,8.5\n396,109,505,3.6\n"
    assert rows(loaded(tmp_path, text)) == [(0, 374, 44), (0, 396, 109)]
    assert "holds no times: all requests arrive at 0 s; --request-rate" in caplog.text
    caplog.clear()
    assert loaded(tmp_path, text, request_rate=2.0).requests[1].arrival_ns > 0
    assert not caplog.text


# ---------------------------------------------------------------------- results of clients


def test_sglang_results_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = {
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": 4.0,
        "max_concurrency": None,
        "random_input_len": 1024,
        "completed": 3,
        "total_throughput": 90.0,
    }
    with pytest.raises(InputError, match="one of SGLang with --output-details"):
        loaded(tmp_path, [result])
    detailed = result | {"input_lens": [5, 6, 7], "output_lens": [1, 2, 3], "ttfts": [0.1, 0.1, 0.1]}
    assert [row[1:] for row in rows(loaded(tmp_path, [detailed]))] == [(5, 1), (6, 2), (7, 3)]
    assert "arrivals are made at its request_rate 4" in caplog.text


def aiperf(start: int, tokens: float, output: int, **changes: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "session_num": 0,
            "request_start_ns": 1_700_000_000 * S + start,
            "request_end_ns": 1_700_000_001 * S + start,
            "benchmark_phase": "profiling",
        },
        "metrics": {
            "input_sequence_length": {"value": tokens, "unit": "tokens"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
        },
        "error": None,
    } | changes


def test_aiperf_records_are_read(tmp_path: Path) -> None:
    warm = aiperf(0, 3, 3)
    warm["metadata"]["benchmark_phase"] = "warmup"
    failed = aiperf(3, 1, 1, error={"code": 500})
    cancelled = aiperf(4, 1, 1)
    cancelled["metadata"]["was_cancelled"] = True
    workload = loaded(tmp_path, [warm, aiperf(5, 550, 80), aiperf(2, 12.0, 9), failed, cancelled])
    assert rows(workload) == [(3, 550, 80), (0, 12, 9)]
    assert workload.skipped == 3
    with pytest.raises(InputError, match="holds statistics of a run, and no request; give AIPerf's"):
        loaded(tmp_path, json.dumps({"aiperf_version": "0.13", "request_throughput": {"avg": 1}}, indent=1))


@pytest.mark.parametrize("indent", [None, 2])
def test_guidellm_results_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, indent: int | None
) -> None:
    newest = {
        "prompt_tokens": 256,
        "output_tokens": 128,
        "request_start_time": 1_700_000_000.5,
        "input_metrics": {"text_tokens": 256},
    }
    older = {"prompt_tokens": 12, "output_tokens": 3, "start_time": 1_700_000_000.0}
    inner = {
        "input_metrics": {"text_tokens": 7},
        "output_metrics": {"text_tokens": 8},
        "info": {"timings": {"request_start": 1_700_000_001.0}},
    }
    document = {
        "metadata": {"version": 2},
        "benchmarks": [{"requests": {"successful": [newest, older, inner], "errored": []}}, {"requests": {}}],
    }
    assert rows(loaded(tmp_path, json.dumps(document, indent=indent))) == [
        (S // 2, 256, 128),
        (0, 12, 3),
        (S, 7, 8),
    ]
    assert "holds 2 benchmarks: the first is taken" in caplog.text
    with pytest.raises(InputError, match=r"benchmarks\[0\].requests.successful: is missing"):
        loaded(tmp_path, {"benchmarks": [{}]})


def chunk(text: str) -> dict[str, str]:
    return {"response": "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})}


def test_genai_perf_records_are_read_by_an_estimate(tmp_path: Path) -> None:
    payload = {"model": "m", "messages": [{"role": "user", "content": "who wrote it"}], "stream": True}
    request = {
        "timestamp": 1_700_000_000 * S,
        "request_inputs": {"payload": json.dumps(payload)},
        "response_timestamps": [1, 2, 3],
        "response_outputs": [chunk("a"), chunk("b"), {"response": "data: [DONE]"}],
    }
    later = request | {"timestamp": 1_700_000_002 * S}
    failed = request | {"response_outputs": []}
    document = {"service_kind": "openai", "experiments": [{"requests": [request, failed, later]}]}
    workload = loaded(tmp_path, document, estimate_tokens=4.0)
    assert rows(workload) == [(0, 3, 2), (2 * S, 3, 2)]
    assert workload.skipped == 1


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        ([chunk("a")["response"] + "\n\n" + chunk("b")["response"] + "\n\n", "data: [DONE]\n\n"], 2),
        ([chunk("a")["response"] + "\n\n", 'data: {"choices": [{"del', 'ta": {"content": "b"}}]}\n\n'], 2),
        (['data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n', chunk("a")["response"]], 7),
        (['{"choices": [{"message": {"content": "eight ch"}}]}'], 2),
        (['{"object": "error", "message": "no"}'], 0),
    ],
)
def test_genai_perf_answers_are_counted(tmp_path: Path, pieces: list[str], tokens: int) -> None:
    """perf_analyzer notes what it reads at once: several events, or a piece of one."""
    request = {
        "timestamp": 1_700_000_000 * S,
        "request_inputs": {"payload": json.dumps({"prompt": "who wrote it"})},
        "response_outputs": [{"response": piece} for piece in pieces],
    }
    document = {"experiments": [{"requests": [request, request | {"response_outputs": [chunk("a")]}]}]}
    workload = loaded(tmp_path, document, estimate_tokens=4.0)
    assert [row[2] for row in rows(workload)] == ([tokens] if tokens else []) + [1]


# ---------------------------------------------------------------------- texts


def conversation(*said: str, **keys: object) -> dict[str, object]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"conversation_id": "x", "model": "m", "conversation": turns} | keys


def test_chats_are_counted_by_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wild = conversation("who wrote it?", "x", language="English", timestamp="2023-04-09 00:00:10")
    workload = loaded(tmp_path, [conversation("12345678", "123456789"), wild], estimate_tokens=4.0)
    assert rows(workload) == [(0, 2, 3), (0, 4, 1)]
    assert "estimates, 4 characters to a token; they are often 20 % off" in caplog.text
    with pytest.raises(InputError, match="count characters with --estimate-tokens"):
        loaded(tmp_path, [wild])


def test_estimated_tokens_share_prefixes(tmp_path: Path) -> None:
    system = "You are a careful assistant. " * 40
    chats = [conversation(system + question, "yes") for question in ("One?", "Two?", "Tree")]
    workload = loaded(tmp_path, chats, estimate_tokens=4.0)
    assert describe(workload)["reusable_prompt_tokens"] == 2 * (len(system) // 4 // 16 * 16)
    ids = [Estimate(2.5)(text, prompt=True).tolist() for text in ("abcdefg", "abcdefz", "zbcdefg")]
    assert ids[0][:2] == ids[1][:2]
    assert ids[0][2] != ids[1][2]
    assert len(set(ids[0]) & set(ids[2])) == 0
    assert len(Estimate(4)("", prompt=True)) == 0


def call(**body: object) -> dict[str, object]:
    return {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"} | body}


def test_batches_of_calls_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {}}]
    calls = [
        call(messages=[{"role": "user", "content": "12345678"}], max_tokens=9),
        call(messages=[{"role": "user", "content": parts}], max_completion_tokens=8),
        call(prompt="abcdefgh", max_tokens=7),
    ]
    assert rows(loaded(tmp_path, calls, estimate_tokens=4.0)) == [(0, 2, 9), (0, 1, 8), (0, 2, 7)]
    with pytest.raises(InputError, match=r"trace:1: body.max_tokens: is missing"):
        loaded(tmp_path, [call(prompt="a")], estimate_tokens=4.0)


def test_answers_to_a_batch_count_their_tokens(tmp_path: Path) -> None:
    def answer(**usage: int) -> dict[str, object]:
        return {"custom_id": "1", "response": {"status_code": 200, "body": {"usage": usage}}, "error": None}

    failed = {"custom_id": "2", "response": None, "error": {"code": "x"}}
    entries = [answer(prompt_tokens=7, completion_tokens=9), failed, answer(input_tokens=3, output_tokens=4)]
    workload = loaded(tmp_path, entries)
    assert rows(workload) == [(0, 7, 9), (0, 3, 4)]
    assert workload.skipped == 1


def test_requests_with_a_text_have_their_times(tmp_path: Path) -> None:
    entries = [
        {"text_input": "12345678", "output_length": 3, "timestamp": 1000},
        {"messages": [{"role": "user", "content": "1234"}], "output_length": 2, "timestamp": 1500.5},
        {"prompt": "1234", "output_tokens": 1, "timestamp": 1000},
    ]
    found = rows(loaded(tmp_path, entries, estimate_tokens=4.0))
    assert found == [(0, 2, 3), (500_500_000, 1, 2), (0, 1, 1)]


# ---------------------------------------------------------------------- specs


SPEC = """\
# a load
load:
  type: constant
  interval: 5
  stages:
  - rate: 2
    duration: 3
  - rate: 10
    duration: 1
data:
  type: %s
"""


def test_a_spec_sends_its_stages(tmp_path: Path) -> None:
    """inference-perf's constant load has drawn gaps that add up to the duration of the stage."""
    spec = SPEC % "random" + "  input_distribution: {min: 10, max: 100, mean: 50, std_dev: 0}\n"
    spec += "  output_distribution: {min: 5, max: 20, mean: 12, std_dev: 100}\n"
    workload = loaded(tmp_path, spec)
    times = [request.arrival_ns / S for request in workload]
    assert times == sorted(times)
    assert len(times) == 16
    assert times[15] - times[5] == pytest.approx(5 + 1)  # the pause, and the second stage to its end
    assert len({round(late - early, 6) for early, late in pairwise(times)}) == 15
    assert {request.input_tokens for request in workload} == {50}
    assert {request.output_tokens for request in workload} <= set(range(5, 21))
    assert rows(loaded(tmp_path, spec)) == rows(workload)
    assert rows(loaded(tmp_path, spec, seed=7)) != rows(workload)
    drawn = loaded(tmp_path, spec.replace("constant", "poisson"), num_reqs=9)
    assert len(drawn) == 9


@pytest.mark.parametrize(
    ("given", "mean", "low", "high"),
    [
        ("{}", 512, 10, 1024),  # its defaults: a deviation of 200
        ("{type: fixed, mean: 700.9}", 700, 700, 700),
        ("{type: uniform, min: 100, max: 300}", 200, 100, 300),
        ("{type: lognormal, min: 100, max: 100000, mean: 400, std_dev: 150}", 400, 100, 100000),
        ("{mean: 300, std_dev: 0, variance: 900, min: 1}", 300, 1, 1024),
    ],
)
def test_a_spec_draws_lengths(tmp_path: Path, given: str, mean: float, low: int, high: int) -> None:
    spec = (SPEC % "synthetic").replace("rate: 10", "rate: 4000")
    spec += f"  input_distribution: {given}\n  output_distribution: {{type: fixed, mean: 3}}\n"
    lengths = [request.input_tokens for request in loaded(tmp_path, spec)]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.02)
    assert low <= min(lengths) <= max(lengths) <= high


def test_a_spec_shares_prefixes(tmp_path: Path) -> None:
    spec = SPEC % "shared_prefix" + (
        "  shared_prefix: {num_groups: 2, num_prompts_per_group: 8, system_prompt_len: 128, question_len: "
        "32, output_len: 9}\n"
    )
    workload = loaded(tmp_path, spec)
    assert {row[1:] for row in rows(workload)} == {(160, 9)}
    assert describe(workload)["reusable_prompt_tokens"] == 14 * 128
    newer = spec.replace("num_groups", "num_unique_system_prompts")
    newer = newer.replace("num_prompts_per_group", "num_users_per_system_prompt")
    assert rows(loaded(tmp_path, newer)) == rows(workload)
    drawn = loaded(tmp_path, spec.replace("32", "{min: 20, max: 300, mean: 200, std_dev: 90}"))
    assert len({request.input_tokens for request in drawn}) > 8
    assert all(148 <= request.input_tokens <= 428 for request in drawn)
    assert describe(drawn)["reusable_prompt_tokens"] == 14 * 128


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("type: random", "type: sharegpt"), "data.type: 'sharegpt' cannot be drawn here"),
        (("rate: 2", "rate: -2"), r"load.stages\[0\].rate: -2 is not possible"),
        (("type: constant", "type: trace_replay"), "load.type: 'trace_replay' cannot be drawn here"),
        (("data:", "date:"), "is YAML without load and data"),
        (("interval: 5", "sweep: {type: linear}"), "load.sweep: cannot be drawn here; leave it out"),
        (("data:", "data:\n  multimodal: {image: {count: 1}}"), "data.multimodal: cannot be drawn here"),
        (("data:", "data:\n  input_distribution: {type: poisson}"), "type: 'poisson' cannot be drawn here"),
        (("data:", "data:\n  input_distribution: {mean: 2000}"), "mean: 2000 is not possible"),
        (("- rate: 2", "- rate: [2"), "is no YAML file"),
    ],
)
def test_a_bad_spec_is_told(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        loaded(tmp_path, (SPEC % "random").replace(*change))


# ---------------------------------------------------------------------- columns and pipes


def test_columns_of_any_csv_can_be_named(tmp_path: Path) -> None:
    text = 'id,isl,osl,ts,blocks,who\n1,600,7,1700000000.5,"4 5",a\n2,700,8,1700000001,"[4, 6]",b\n'
    columns = "input=isl,output=osl,arrival=ts:s,hashes=blocks:512,model=who"
    workload = loaded(tmp_path, text, columns=columns)
    assert rows(workload) == [(0, 600, 7), (S // 2, 700, 8)]
    assert [request.model for request in workload] == ["a", "b"]
    assert describe(workload)["reusable_prompt_tokens"] == 512
    dates = text.replace("1700000000.5", "2024-05-10T00:00:00.5").replace("1700000001", "2024-05-10 00:00:01")
    assert rows(loaded(tmp_path, dates, columns="input=isl,output=osl,arrival=ts:date")) == rows(workload)


def test_keys_of_any_json_lines_can_be_named(tmp_path: Path) -> None:
    entries = [
        {"usage": {"in": 10, "out": 2}, "at": 50, "chat": "a"},
        {"usage": {"in": 20, "out": 3}, "at": 70, "chat": "b"},
        {"usage": {"in": 30, "out": 4}, "at": 90, "chat": "a", "think": 5},
    ]
    columns = "input=usage.in,output=usage.out,arrival=at:ms"
    assert rows(loaded(tmp_path, entries, columns=columns)) == [
        (0, 10, 2),
        (20_000_000, 20, 3),
        (40_000_000, 30, 4),
    ]
    columns += ",session=chat,delay=think:ms"
    chats = loaded(tmp_path, entries, columns=columns)
    assert [(r.session_id, r.predecessor, r.tool_ns) for r in chats] == [
        ("a", -1, 0),
        ("a", 0, 5_000_000),
        ("b", -1, 0),
    ]
    assert [r.session_id for r in loaded(tmp_path, entries, columns=columns, num_reqs=1)] == ["a", "a"]


def test_a_timed_trace_of_vllm_is_read_by_its_columns(tmp_path: Path) -> None:
    entries = [
        {"timestamp": 0.5, "input_length": 40, "output_length": 8, "hash_ids": [1, 2, 3]},
        {"timestamp": 2.25, "input_length": 48, "output_length": 6, "hash_ids": [1, 2, 4]},
    ]
    columns = "input=input_length,output=output_length,arrival=timestamp:s,hashes=hash_ids:16"
    workload = loaded(tmp_path, entries, columns=columns)
    assert rows(workload) == [(0, 40, 8), (1_750_000_000, 48, 6)]
    assert describe(workload)["reusable_prompt_tokens"] == 32


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("input=a", "output=COLUMN is missing"),
        ("input=a,output=b,when=c", "'when=c' is not possible; must be NAME=COLUMN"),
        ("input=a,input=b,output=c", "'input=b' is not possible"),
        ("input=a,output=b,arrival=c:h", "'h' is no unit of arrival"),
        ("input=a,output=b,arrival=c", "'arrival=c' does not say its unit; must be arrival=c: and one of"),
        ("input=a,output=b,delay=c", "'delay=c' does not say its unit"),
        ("input=a,output=b,hashes=c:0", "hashes=COLUMN:TOKENS"),
        ("", "is not possible"),
    ],
)
def test_bad_columns_are_told(columns: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_columns(columns)


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'c' is no column; the header has a, b"):
        loaded(tmp_path, "a,b\n1,2\n", columns="input=a,output=c")
    with pytest.raises(InputError, match=r"trace:2: b: 'x' is not an integer"):
        loaded(tmp_path, "a,b\n1,x\n", columns="input=a,output=b")
    with pytest.raises(InputError, match="has no effect beside --columns"):
        loaded(tmp_path, "a,b\n1,2\n", columns="input=a,output=b", estimate_tokens=4.0)


def test_times_of_centuries_are_no_run(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n3023-11-16 18:15:46,374,4\n2023-11-16 18:15:50,396,9\n"
    with pytest.raises(InputError, match="the times span more than"):
        loaded(tmp_path, text, request_rate=3.0)
    with pytest.raises(InputError, match="the times span more than"):
        loaded(tmp_path, [aiperf(0, 5, 5), aiperf(2**62, 5, 5)])


def test_what_is_malformed_elsewhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a,b\x801,x\n")
    with pytest.raises(InputError, match="needs a CSV header in UTF-8"):
        load_workload(tmp_path / "x", columns="input=a,output=b")
    for experiments in (1.5, {"a": 1}, [], [3]):
        with pytest.raises(InputError, match=r"experiments\[0\].requests: is missing"):
            loaded(tmp_path, {"experiments": experiments}, estimate_tokens=4.0)
    request = {"request_inputs": {"payload": "{}"}, "response_outputs": True}
    with pytest.raises(InputError, match="all 1 entries are left out"):
        loaded(tmp_path, {"experiments": [{"requests": [request]}]}, estimate_tokens=4.0)
    (request_without,) = loaded(tmp_path, 'a,b,c\n1,2,"[]"\n', columns="input=a,output=b,hashes=c")
    assert not request_without.has_ids


def test_a_workload_comes_through_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Piped:
        buffer = io.BufferedReader(io.BytesIO(b"num_prefill_tokens,num_decode_tokens\n5,6\n7,8\n"))

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Piped())
    assert main(["workload", "describe", "-", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["source"], figures["requests"]) == ("standard input", 2)


@pytest.mark.parametrize("words", [["sweep", "--grid", "--seed 1,2"], ["plan", "--slo", "tpot:60"]])
def test_a_pipe_is_read_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--dataset", "-"]) == 2
    assert "reads the workload more than once" in capsys.readouterr().err


def test_option_sets_may_read_a_file_in_two_ways(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("a,b\n50,6\n70,8\n", encoding="utf-8")
    sets = {"one": {"columns": "input=a,output=b"}, "other": {"columns": "input=b,output=a"}}
    compared = servesim.compare(workload=path, sets=sets)
    assert [result.summary["total_input_tokens"] for result in compared.results] == [120, 14]
    swept = servesim.sweep({"list": list(sets.values())}, workload=path)
    assert [row["total_input_tokens"] for row in swept.rows] == [120, 14]


def test_a_run_takes_the_flags_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(conversation("12345678" * 9, "123456789")) + "\n", encoding="utf-8")
    assert main(["run", "--dataset", str(path), "--estimate-tokens"]) == 0
    capsys.readouterr()
    path.write_text("a,b\n5,6\n", encoding="utf-8")
    assert main(["run", "--dataset", str(path), "--columns", "input=a,output=b"]) == 0
    assert main(["run", "--dataset", str(path)]) == 2
    assert "name the columns with --columns" in capsys.readouterr().err
