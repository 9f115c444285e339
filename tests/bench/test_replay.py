"""Recording a live server, here one of our own that emits tokens on a known schedule."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from servesim.__main__ import main
from servesim.bench.recording import load_recording
from servesim.cli import bench_replay
from tests.bench.streaming_server import KEY, Served, StreamingServer

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"first_s": 0.002, "gap_s": 0.001}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_workload(*entries: dict[str, Any]) -> None:
    Path("w.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def even_requests(count: int, output: int = 10, every_ms: float = 0) -> None:
    """Requests of 100, 101, … prompt tokens, so that the server's log shows which is which."""
    write_workload(
        *(
            {"input_toks": 100 + i, "output_toks": output, "arrival_time_ns": round(i * every_ms * 1e6)}
            for i in range(count)
        )
    )


def command(server: StreamingServer | str, *flags: str) -> list[str]:
    url = server if isinstance(server, str) else server.url
    return ["bench", "replay", "--dataset", "w.jsonl", "--output", "rec", "--url", url, *flags]


def rows(name: str = "requests.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("rec") / name).read_text().splitlines()]


def meta() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("rec/meta.json").read_text())
    return found


def by_prompt(server: StreamingServer) -> dict[int, Served]:
    return {len(served.body["prompt"]): served for served in server.requests}


def test_the_servers_schedule_is_recovered() -> None:
    """Client and server share one clock: no stamp is before its cause, however busy this machine is.

    That a stamp is taken as soon as its bytes are there is shown with a clock of its own in test_http_stream.
    """
    even_requests(10, output=30, every_ms=40)
    with StreamingServer(first_s=0.03, gap_s=0.02) as server:
        assert main(command(server)) == 0
    found = rows()
    assert [row["request_id"] for row in found] == [f"bench-{i}" for i in range(10)]
    served = by_prompt(server)
    for row in found:
        theirs = served[row["input_toks"]].sent_s
        assert len(row["token_ts"]) == len(theirs) == 30
        assert all(ours >= sent - 1e-6 for ours, sent in zip(row["token_ts"], theirs, strict=True))
        assert row["token_ts"] == sorted(row["token_ts"])
        # An arrival is never early, and its request was there before anything of it came back.
        assert row["arrival_time"] - meta_start() >= int(row["request_id"][6:]) * 0.04 - 1e-3
        assert row["queued_ts"] <= served[row["input_toks"]].received_s
        assert (row["first_token_ts"], row["last_token_ts"]) == (row["token_ts"][0], row["token_ts"][-1])


def meta_start() -> float:
    started: float = meta()["segments"][0]["started_s"]
    return started


def test_validate_can_read_what_was_recorded() -> None:
    even_requests(6, output=12, every_ms=5)
    with StreamingServer(**QUICK) as server:
        assert main(command(server, "--engine-args", '{"max_num_seqs": 64}')) == 0
    recording = load_recording("rec")
    assert len(recording) == 6
    assert recording.model == "org/tiny"
    assert recording.engine.startswith("vLLM 0.24.0")
    assert recording.queued_ns is None, "a client cannot see the queue"
    assert recording.arguments["max_num_seqs"] == 64
    assert (recording.arguments["num_gpu_blocks"], recording.arguments["kv_cache_dtype"]) == (2048, "fp8")
    assert recording.ticks is not None
    assert recording.ticks.gen_throughput.sum() * 1.0 == pytest.approx(72)
    assert recording.ticks.prompt_throughput.sum() * 1.0 == pytest.approx(sum(range(100, 106)))
    assert meta()["stamps"]["side"] == "client"


def test_vllm_is_asked_for_exact_lengths() -> None:
    ids = list(range(500, 520))
    write_workload(
        {"input_toks": 20, "output_toks": 7, "arrival_time_ns": 0, "input_tok_ids": ids},
        {"input_toks": 30, "output_toks": 5, "arrival_time_ns": 0},
        {"input_toks": 31, "output_toks": 5, "arrival_time_ns": 0},
    )
    with StreamingServer(**QUICK) as server:
        assert main(command(server)) == 0
    bodies = {length: served.body for length, served in by_prompt(server).items()}
    assert bodies[20]["prompt"] == ids
    assert (bodies[20]["max_tokens"], bodies[20]["min_tokens"], bodies[20]["ignore_eos"]) == (7, 7, True)
    assert bodies[20]["model"] == "org/tiny"
    assert bodies[30]["prompt"][:10] != bodies[31]["prompt"][:10], "made-up prompts share no prefix"
    assert [row["output_toks"] for row in rows()] == [7, 5, 5]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_any_openai_server_gets_text_and_no_additions(endpoint: str) -> None:
    even_requests(3, output=6)
    with StreamingServer(**QUICK, counts=False) as server:
        assert main(command(server, "--server", "openai", "--endpoint", endpoint, "--prompts", "text")) == 0
    for served in server.requests:
        body = served.body
        prompt = body["prompt"] if endpoint == "completions" else body["messages"][0]["content"]
        assert len(prompt.split()) in {100, 101, 102}
        assert not {"min_tokens", "ignore_eos"} & set(body)
        assert body["stream_options"] == {"include_usage": True}
        assert served.path == ("/v1/completions" if endpoint == "completions" else "/v1/chat/completions")
    assert [len(row["token_ts"]) for row in rows()] == [6, 6, 6]
    assert meta()["vllm_version"] is None


def test_the_first_chat_chunk_is_no_token() -> None:
    even_requests(1, output=4)
    with StreamingServer(first_s=0.05, gap_s=0.02) as server:
        assert main(command(server, "--endpoint", "chat")) == 0
    (row,) = rows()
    assert len(row["token_ts"]) == 4
    assert row["first_token_ts"] - row["queued_ts"] > 0.04


def test_tokens_that_come_together_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    even_requests(2, output=9)
    with StreamingServer(**QUICK, tokens_per_chunk=4) as server:
        assert main(command(server)) == 0
        for row in rows():
            stamps = row["token_ts"]
            assert len(stamps) == 9
            # Chunks of 4, 4 and 1; a busy machine may read two at once, but never a part of one.
            assert {stamps.index(stamp) for stamp in stamps} <= {0, 4, 8}
        assert "chunks" not in capsys.readouterr().out
        assert main([*command(server, "--server", "openai"), "--output", "other"]) == 0
    assert "2 answers came in chunks of several tokens" in capsys.readouterr().out
    uncounted = [json.loads(line) for line in Path("other/requests.jsonl").read_text().splitlines()]
    assert [(row["output_toks"], len(row["chunk_ts"])) for row in uncounted] == [(9, 3), (9, 3)]


def test_outputs_of_another_length_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(2, output=6)
    with StreamingServer(**QUICK, stop_early=2) as server:
        assert main(command(server, "--no-token-times")) == 0
    assert "2 outputs are not as long as the workload says" in capsys.readouterr().out
    assert [(row["output_toks"], row["asked_output_toks"]) for row in rows()] == [(4, 6), (4, 6)]
    assert not any("token_ts" in row for row in rows())


def test_a_closed_loop_keeps_to_its_cap(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(12, output=5)
    with StreamingServer(first_s=0.01, gap_s=0.002) as server:
        assert main(command(server, "--max-concurrency", "3", "--request-rate", "inf")) == 0
    assert server.most_in_flight <= 3
    assert "at most 3 at once" in capsys.readouterr().out
    assert len(server.requests) == 12


def test_a_follow_up_is_sent_a_tool_time_later() -> None:
    turns = [{"input_toks": 10 + i, "output_toks": 4, "tool_duration_ns": 30_000_000} for i in range(3)]
    write_workload(
        {"session_id": "a", "arrival_time_ns": 0, "sub_requests": turns},
        {"input_toks": 50, "output_toks": 3, "arrival_time_ns": 0},
    )
    with StreamingServer(**QUICK) as server:
        assert main(command(server)) == 0
    served = by_prompt(server)
    for before, after in pairwise((10, 11, 12)):
        assert served[after].received_s - served[before].sent_s[-1] >= 0.03


def test_a_failed_request_is_recorded_counted_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(6)
    faults: dict[int, Any] = {101: (503, "no room"), 103: "break", 104: "error"}
    with StreamingServer(
        **QUICK, misbehave=lambda served, _: faults.get(len(served.body["prompt"]))
    ) as server:
        assert main(command(server, "--api-key", KEY)) == 0
        assert "3 requests recorded, 3 failed" in capsys.readouterr().out
        assert [row["request_id"] for row in rows()] == ["bench-0", "bench-2", "bench-5"]
        failed = {row["request_id"]: row for row in rows("errors.jsonl")}
        assert failed["bench-1"]["status"] == 503
        assert failed["bench-1"]["message"] == "no room Bearer ***"
        assert "closed the connection before the answer was complete" in failed["bench-3"]["message"]
        assert failed["bench-4"]["message"] == "the engine died"
        faults.clear()
        assert main(command(server, "--api-key", KEY)) == 0
    assert "3 requests recorded, 3 recorded earlier, 0 failed" in capsys.readouterr().out
    assert [row["request_id"] for row in rows()] == [f"bench-{i}" for i in range(6)]
    assert len(meta()["segments"]) == 2
    assert {served.headers["authorization"] for served in server.requests} == {f"Bearer {KEY}"}
    for path in Path("rec").iterdir():
        assert KEY not in path.read_text()


def test_the_follow_ups_of_a_failed_request_fail_with_it() -> None:
    turns = [{"input_toks": 10 + i, "output_toks": 4} for i in range(3)]
    write_workload(
        {"session_id": "a", "arrival_time_ns": 0, "sub_requests": turns},
        {"input_toks": 50, "output_toks": 3, "arrival_time_ns": 0},
    )
    with StreamingServer(
        **QUICK, misbehave=lambda served, _: (400, "no") if len(served.body["prompt"]) == 11 else None
    ) as server:
        assert main(command(server)) == 0
    assert [row["request_id"] for row in rows()] == ["bench-0", "bench-3"]
    assert [row["request_id"] for row in rows("errors.jsonl")] == ["bench-1", "bench-2"]
    assert rows("errors.jsonl")[1]["message"] == "bench-1 of its session failed"


def test_a_replay_in_which_everything_fails_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(4)
    with StreamingServer(**QUICK, misbehave=lambda *_: (400, "bad model")) as server:
        assert main(command(server)) == 1
    assert "all 4 requests failed; the first: HTTP 400: bad model" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(2)
    with StreamingServer() as server:
        url = server.url
    assert main(command(url)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --url {url}: no server answers there (")
    assert not Path("rec/requests.jsonl").exists()


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(2)
    with StreamingServer(**QUICK) as server:
        assert main(command(server)) == 0
        assert main(command(server)) == 0
        assert "all 2 requests of w.jsonl are recorded already" in capsys.readouterr().out
        assert main(command(server, "--seed", "7")) == 2
        assert "other arguments: seed was 42 and is 7" in capsys.readouterr().err
        even_requests(3)
        assert main(command(server)) == 2
        assert "dataset_hash was" in capsys.readouterr().err
    assert len(server.requests) == 2


def test_a_recording_made_by_others_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(2)
    Path("rec").mkdir()
    Path("rec/requests.jsonl").write_text("{}\n")
    assert main(command("http://127.0.0.1:1")) == 2
    assert "no meta.json" in capsys.readouterr().err
    Path("rec/meta.json").write_text('{"model": "x"}')
    assert main(command("http://127.0.0.1:1")) == 2
    assert "a recording that bench replay did not make" in capsys.readouterr().err
    assert Path("rec/requests.jsonl").read_text() == "{}\n"


def started(server: StreamingServer, *flags: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with a few requests recorded."""
    words = [sys.executable, "-m", "servesim", *command(server, *flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    end_s = time.monotonic() + 300
    path = Path("rec/requests.jsonl")
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < end_s
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    return process


def five_now_and_others_later() -> None:
    """Five requests at once, and fifteen an hour later: a replay is certainly not done when the five are."""
    write_workload(
        *(
            {"input_toks": 100 + i, "output_toks": 5, "arrival_time_ns": 0 if i < 5 else 3600 * 10**9}
            for i in range(20)
        )
    )


def test_a_killed_replay_goes_on_where_it_stopped() -> None:
    five_now_and_others_later()
    with StreamingServer(**QUICK) as server:
        process = started(server)
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        kept = Path("rec/requests.jsonl").read_bytes()
        with Path("rec/requests.jsonl").open("ab") as handle:
            handle.write(b'{"request_id": "bench-7", "inp')
        assert {json.loads(line)["request_id"] for line in kept.splitlines()} == {
            f"bench-{i}" for i in range(5)
        }
        sent = len(server.requests)
        assert main(command(server)) == 0
    again = [f"bench-{len(served.body['prompt']) - 100}" for served in server.requests[sent:]]
    assert sorted(again) == sorted(f"bench-{i}" for i in range(5, 20))
    assert [row["request_id"] for row in rows()] == [f"bench-{i}" for i in range(20)]
    assert {json.dumps(row) for row in rows()} >= {json.dumps(json.loads(line)) for line in kept.splitlines()}


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_ended_replay_leaves_valid_files_and_goes_on(sign: signal.Signals, status: int) -> None:
    five_now_and_others_later()
    with StreamingServer(**QUICK) as server:
        process = started(server)
        process.send_signal(sign)
        _, error = process.communicate(timeout=300)
        assert process.returncode == status, error
        if sign is signal.SIGINT:
            assert error == "rec: incomplete; the same command goes on with it\ninterrupted\n"
        assert len(rows()) == 5
        assert meta()["interrupted"] is True
        assert meta()["num_requests"] == 5 == len(load_recording("rec"))
        assert not [path for path in Path("rec").iterdir() if path.name.startswith(".")]
        assert main(command(server)) == 0
    assert len(rows()) == 20
    assert meta()["interrupted"] is False


def test_a_server_that_never_ends_fails_its_requests(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(2, output=5)

    def more(served: Served, number: int) -> None:
        if number == 0:
            served.body["max_tokens"] = 10**6

    tracemalloc.start()
    with StreamingServer(first_s=0.0, gap_s=0.0, misbehave=more, tokens_per_chunk=1000) as server:
        assert main(command(server)) == 0
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert "the server sent more than 10,005 tokens" in capsys.readouterr().out
    with StreamingServer(first_s=0.0, gap_s=0.05) as server:
        even_requests(1, output=1000)
        again = [word if word != "rec" else "slow" for word in command(server, "--max-duration", "0.3")]
        assert main(again) == 1
    assert "the answer was not complete after 0.3 s" in capsys.readouterr().err


def test_a_server_that_lists_no_models_has_to_be_told_one(capsys: pytest.CaptureFixture[str]) -> None:
    even_requests(1)
    with StreamingServer(**QUICK, lists_models=False) as server:
        assert main(command(server)) == 2
        assert "lists no model at /v1/models; name one with --model" in capsys.readouterr().err
        assert main(command(server, "--model", "org/mine", "--extra-body", '{"top_k": 3}')) == 0
    assert (server.requests[0].body["model"], server.requests[0].body["top_k"]) == ("org/mine", 3)
    assert meta()["model"] == "org/mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-concurrency", "-1"], "--max-concurrency: -1 is not allowed"),
        (["--timeout", "0"], "--timeout: 0 is not allowed"),
        (["--max-duration", "nan"], "--max-duration: nan is not allowed"),
        (["--url", "127.0.0.1:8000"], "must be http:// or https:// and a host"),
        (["--url", "http://me:pw@127.0.0.1"], "must not hold a user or password"),
        (["--endpoint", "chat", "--prompts", "ids"], "takes only text"),
        (["--engine", "vllm"], "needs --model"),
        (
            ["--engine", "vllm", "--model", "m", "--endpoint", "chat"],
            "--endpoint: has no effect with --engine vllm",
        ),
        (["--extra-body", "{oops"], "--extra-body"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_flags_are_told_before_anything_is_sent(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    even_requests(1)
    assert main(command("http://127.0.0.1:1", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "pw" not in error
    assert not Path("rec").exists()


def test_the_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    plain = bench_replay._Screen.show

    def show(screen: Any, tally: Any) -> None:
        shown.append((tally.completed, tally.total))
        plain(screen, tally)

    monkeypatch.setattr(bench_replay._Screen, "show", show)
    even_requests(3)
    with StreamingServer(**QUICK) as server:
        assert main(command(server)) == 0
    assert shown[-1] == (3, 3)
