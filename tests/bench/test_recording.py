from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servesim.bench.recording import load_recording
from servesim.errors import InputError, MissingFileError
from tests.bench import recordings

WALL_S, ENGINE_S = recordings.WALL_S, recordings.ENGINE_S


def row(number: int = 0, *, at: float = 1.0, late: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A request sent ``at`` seconds, queued ``late`` after, scheduled and answered 0.1 s apart."""
    return {
        "request_id": f"bench-{number}",
        "input_toks": 10,
        "output_toks": 3,
        "arrival_time": WALL_S + at,
        "queued_ts": ENGINE_S + at + late,
        "scheduled_ts": ENGINE_S + at + late + 0.1,
        "first_token_ts": ENGINE_S + at + late + 0.2,
        "last_token_ts": ENGINE_S + at + late + 0.4,
        **changes,
    }


def test_stamps_of_two_clocks_become_one(tmp_path: Path) -> None:
    folder = recordings.write(tmp_path, [row(0, at=1.0, late=0.002), row(1, at=2.0, late=0.052)])
    recording = load_recording(folder)
    # The fastest request took 2 ms to the engine, which nobody can tell from clocks that are 2 ms apart.
    np.testing.assert_allclose(recording.arrival_ns, [1e9, 2e9], atol=1000)
    np.testing.assert_allclose(recording.queued_ns, [1e9, 2.05e9], atol=1000)
    np.testing.assert_allclose(recording.last_token_ns - recording.first_token_ns, [2e8, 2e8], atol=1000)
    assert recording.engine == "vLLM 0.24.0"
    assert recording.arguments["max_num_seqs"] == 16
    assert recording.anchors == ("queued", "arrival")


def test_without_a_start_time_the_first_arrival_is_zero(tmp_path: Path) -> None:
    recording = load_recording(recordings.write(tmp_path, [row(0, at=3.0)], meta={"started_at": None}))
    assert recording.arrival_ns.tolist() == [0]


def test_request_ids_say_the_order(tmp_path: Path) -> None:
    folder = recordings.write(tmp_path, [row(1, at=2.0, input_toks=22), row(0, at=1.0, input_toks=11)])
    assert load_recording(folder).input_tokens.tolist() == [11, 22]


def test_meta_json_stands_for_its_folder(tmp_path: Path) -> None:
    folder = recordings.write(tmp_path, [row()])
    assert load_recording(folder / "meta.json").source == folder


def test_stamps_of_a_client_say_nothing_of_the_queue(tmp_path: Path) -> None:
    recording = load_recording(recordings.write(tmp_path, [row()], meta={"stamps": {"side": "client"}}))
    assert recording.anchors == ("arrival",)
    assert recording.scheduled_ns is None
    with pytest.raises(InputError, match="--anchor arrival"):
        recording.anchor_ns("queued")


def test_ticks_are_read(tmp_path: Path) -> None:
    text = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n1.0,5,3.5,2,1,0\n2.0,0,4,1,0,0\n"
    ticks = load_recording(recordings.write(tmp_path, [row()], timeseries=text)).ticks
    assert ticks is not None
    assert ticks.end_s.tolist() == [1.0, 2.0]
    assert ticks.gen_throughput.tolist() == [3.5, 4.0]
    assert ticks.waiting.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input_toks": 0}, "line 1: input_toks: 0 is not allowed; must be a whole number > 0"),
        ({"output_toks": "7"}, 'line 1: output_toks: "7" is not allowed'),
        ({"first_token_ts": None}, "line 1: first_token_ts: null is not allowed; must be seconds >= 0"),
        ({"queued_ts": -1.0}, "line 1: queued_ts: -1.0 is not allowed"),
        ({"last_token_ts": ENGINE_S}, "line 1: last_token_ts .* is before first_token_ts"),
    ],
)
def test_a_wrong_request_is_told_with_its_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_recording(recordings.write(tmp_path, [row(**changes)]))


@pytest.mark.parametrize("key", ["input_toks", "arrival_time", "scheduled_ts"])
def test_a_missing_field_is_told(tmp_path: Path, key: str) -> None:
    request = row()
    del request[key]
    with pytest.raises(InputError, match=f"line 1: {key}: is missing"):
        load_recording(recordings.write(tmp_path, [request]))


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"engine_kwargs": []}, "engine_kwargs: .* must be an object"),
        ({"engine_kwargs": None}, "engine_kwargs: is missing"),
        ({"model": 3}, "model: 3 is not allowed"),
        ({"num_requests": 2}, "has 1 requests, and num_requests of meta.json is 2"),
        ({"started_at": "yesterday"}, "started_at: .* is not a time"),
    ],
)
def test_a_wrong_meta_file_is_told(tmp_path: Path, meta: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_recording(recordings.write(tmp_path, [row()], meta=meta))


def test_a_request_that_stands_twice_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='line 2: request_id "bench-0" stands on line 1 already'):
        load_recording(recordings.write(tmp_path, [row(), row()]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("t,running\n1,2\n", "line 1: column prompt_throughput is missing"),
        ("t,prompt_throughput,gen_throughput,running,waiting\n1,2,3,x,5\n", "line 2: .* is not 5 numbers"),
        ("t,prompt_throughput,gen_throughput,running,waiting\n1,2,3\n", "line 2: .* is not 5 numbers"),
        (
            "t,prompt_throughput,gen_throughput,running,waiting\n2,0,0,0,0\n1,0,0,0,0\n",
            "line 3: t 1 is not after",
        ),
    ],
)
def test_a_wrong_time_series_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_recording(recordings.write(tmp_path, [row()], timeseries=text))


def test_stamps_of_different_clocks_are_refused(tmp_path: Path) -> None:
    folder = recordings.write(tmp_path / "a", [row(0, at=1.0), row(1, arrival_time=0)])
    with pytest.raises(InputError, match=r"a: its stamps span 1.7e\+09 s; .* the same clock"):
        load_recording(folder)
    late = {"queued_ts": 1e11, "scheduled_ts": 1e11, "first_token_ts": 1e11, "last_token_ts": 1e11}
    with pytest.raises(InputError, match="its stamps span"):
        load_recording(recordings.write(tmp_path / "b", [row(0, at=1.0), row(1, **late)]))
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bench_result(ttfts=[1e11, 0.1])))
    with pytest.raises(InputError, match=r"result\.json: its stamps span"):
        load_recording(path)
    path.write_text(json.dumps(bench_result(input_lens=[2**63, 3])))
    with pytest.raises(InputError, match=r"input_lens\[0\]"):
        load_recording(path)


def test_a_recording_that_took_no_time_is_refused(tmp_path: Path) -> None:
    now = {"scheduled_ts": ENGINE_S + 1, "first_token_ts": ENGINE_S + 1, "last_token_ts": ENGINE_S + 1}
    folder = recordings.write(tmp_path / "a", [row(0, at=1.0, queued_ts=ENGINE_S + 1, **now)])
    with pytest.raises(InputError, match="its requests take no time"):
        load_recording(folder)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bench_result(start_times=[1, 1], ttfts=[0, 0], itls=[[], []])))
    with pytest.raises(InputError, match="its requests take no time"):
        load_recording(path)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such recording"):
        load_recording(tmp_path / "nothing")
    folder = recordings.write(tmp_path / "run", [row()])
    (folder / "requests.jsonl").unlink()
    with pytest.raises(MissingFileError, match=r"requests\.jsonl"):
        load_recording(folder)


def bench_result(**changes: Any) -> dict[str, Any]:
    """Two requests of `vllm bench serve`, the second a quarter second after the first."""
    return {
        "model_id": recordings.MODEL,
        "input_lens": [100, 50],
        "output_lens": [3, 1],
        "start_times": [10.0, 10.25],
        "ttfts": [0.5, 0.125],
        "itls": [[0.25, 0.5], []],
        "errors": ["", ""],
        **changes,
    }


def test_a_bench_serve_result_is_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bench_result()))
    recording = load_recording(path)
    assert recording.model == recordings.MODEL
    assert recording.arrival_ns.tolist() == [0, 250_000_000]
    assert recording.first_token_ns.tolist() == [500_000_000, 375_000_000]
    assert recording.last_token_ns.tolist() == [1_250_000_000, 375_000_000]
    assert recording.anchors == ("arrival",)
    assert [request.arrival_ns for request in recording.workload()] == [0, 250_000_000]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"itls": None}, "itls: is missing; .* --save-detailed"),
        ({"ttfts": [0.5]}, "ttfts: has 1 values, and input_lens has 2"),
        ({"ttfts": [0.5, -1]}, r"ttfts\[1\]: -1 is not allowed"),
        ({"output_lens": [3, 0]}, r"output_lens\[1\]: 0 is not allowed"),
        ({"errors": ["", "timeout"]}, r"errors\[1\]: request 1 failed: \"timeout\""),
        ({"itls": [[0.25, "x"], []]}, r"itls\[0\]: \"x\" is not allowed"),
    ],
)
def test_a_wrong_bench_serve_result_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bench_result(**changes)))
    with pytest.raises(InputError, match=told):
        load_recording(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "7"])
def test_what_is_no_result_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"result\.json"):
        load_recording(path)
