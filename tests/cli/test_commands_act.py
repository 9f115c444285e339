"""Every flag of the commands beside ``run`` changes what they print or write, or is refused.

The options of a run have a table of their own, in ``test_options_act.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from shlex import split
from typing import TYPE_CHECKING, Any

import pytest

from servesim.__main__ import main
from servesim.specs.flags import flag_name
from servesim.specs.options import RuntimeOptions
from tests.bench.streaming_server import StreamingServer
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

LLAMA = "meta-llama/Llama-3.1-8B"
LINES = {
    "support": f"{LLAMA} --hardware H100",
    "kv": f"{LLAMA} --hardware H100",
    "compare": "--cluster-config one.json --dataset plain.jsonl --set 'two: --max-num-seqs 2' --set 'all:'",
    "bench replay": "--dataset plain.jsonl --output out/recorded --url URL",
}
"""Command -> a line that is complete."""
ACTS: dict[str, dict[str, str]] = {
    "support": {
        "--hardware": "--hardware H200",
        "--dtype": "--dtype fp8",
        "--kv-cache-dtype": "--kv-cache-dtype fp8",
        "--tp": "--tp 2",
        "--max-num-batched-tokens": "--max-num-batched-tokens 100000",
        "--max-num-seqs": "--max-num-seqs 4096",
        "--max-context": "--max-context 1000000",
        "--json": "--json",
    },
    "kv": {
        "--hardware": "--hardware H200",
        "--dtype": "--dtype fp8",
        "--tp": "--tp 2",
        "--context": "--context 50000",
        "--batch": "--batch 3",
        "--block-size": "--block-size 32",
        "--max-num-seqs": "--max-num-seqs 512",
        "--max-num-batched-tokens": "--max-num-batched-tokens 8192",
        "--npu-memory-utilization": "--npu-memory-utilization 0.5",
        "--cudagraph": "--batch 3 --no-cudagraph",
        "--json": "--json",
        "--plot": "--plot out/dial.svg",
        "--kv-cache-dtype-skip-layers": "--kv-cache-dtype-skip-layers 0",
    },
    "compare": {
        "--set": "--set 'one: --max-num-seqs 1'",
        "--json": "--json out/compared.json",
        "--csv": "--csv out/compared.csv",
        "--slo": "--slo ttft:1 tpot:1",
        "--ensemble": "--ensemble 3 --step-noise 0.1",
        "--step-noise": "--ensemble 3 --step-noise 0.2",
        "--run-noise": "--ensemble 3 --run-noise 0.2",
        "--arrival-jitter": "--ensemble 3 --arrival-jitter 5",
    },
    "bench replay": {
        "--dataset": "--dataset other.jsonl",
        "--output": "--output out/elsewhere",
        "--num-reqs": "--num-reqs 2",
        "--seed": "--seed 7",
        "--request-rate": "--request-rate 100",
        "--max-concurrency": "--max-concurrency 1",
        "--engine-args": "--engine-args '{\"block_size\":32}'",
        "--no-token-times": "--no-token-times",
        "--model": "--model another",
        "--server": "--server openai",
        "--endpoint": "--endpoint chat",
        "--prompts": "--prompts text",
        "--api-key": "--api-key sk-another",
        "--extra-body": "--extra-body '{\"top_k\":4}'",
    },
}
"""Command -> flag -> words that change what comes of the line."""
NOISY = "--ensemble 3 --step-noise 0.1"
BEFORE = {
    ("kv", "--cudagraph"): "--batch 3",  # which is padded to 4
    ("compare", "--step-noise"): NOISY,
    ("compare", "--run-noise"): NOISY,
    ("compare", "--arrival-jitter"): NOISY,
}
"""What the line has before the words, where the flag needs something beside it."""
CANNOT = {
    "support": [
        "--matrix --max-context 5",
        "--matrix --max-num-seqs 5",
        "--matrix --max-num-batched-tokens 5",
        "--matrix --dtype fp8",
        "--matrix --kv-cache-dtype fp8",
    ],
    "compare": ["--step-noise 0.1", "--run-noise 0.1", "--arrival-jitter 1"],
    "bench replay": [
        "--engine vllm --model m --url http://127.0.0.1:1",
        "--engine vllm --model m --server openai",
        "--engine vllm --model m --endpoint chat",
        "--engine vllm --model m --prompts text",
        "--engine vllm --model m --api-key k",
        "--engine vllm --model m --extra-body {}",
        "--engine vllm --model m --max-duration 1",
        "--engine vllm --model m --timeout 1",
    ],
}
"""Command -> words that are refused: their flag (the last of them) could not act."""
ELSEWHERE = {
    "support": {"--matrix"},
    "kv": {"--matrix", "--kernels", "--disable-hybrid-kv-cache-manager", "--auto-profile"},
    "compare": {"--capacity-band", "--error-band"},
    "bench replay": {"--engine", "--url", "--max-duration", "--timeout"},
}
"""Flags with tests of their own: another table, models of several KV groups, servers that hang."""


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        roomy = {key: value for key, value in toy_instance().items() if key != "num_gpu_blocks"}
        (root / "one.json").write_text(json.dumps(toy_cluster([roomy])))
        for name, count in (("plain", 6), ("other", 3)):
            entries = [
                {"input_toks": 40 + i, "output_toks": 6, "arrival_time_ns": i * 1_000_000}
                for i in range(count)
            ]
            (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
        yield


def outcome(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command printed, wrote and, of a replay, sent."""
    shutil.rmtree("out", ignore_errors=True)
    Path("out").mkdir()
    with StreamingServer(first_s=0.01, gap_s=0.001) as server:
        line = f"{LINES[command]} {words}".replace("URL", f"http://127.0.0.1:{server.port}")
        status = main([*command.split(), *split(line)])
        sent = sorted(
            (str(each.path), json.dumps(each.body, sort_keys=True), each.headers.get("authorization", ""))
            for each in server.requests
        )
        busiest = server.most_in_flight
    printed = capsys.readouterr()
    files = {}
    for path in sorted(Path("out").rglob("*")):
        if path.is_file():
            files[str(path)] = path.read_bytes() if command != "bench replay" else _columns(path)
    return {
        "status": status,
        "out": printed.out if command != "bench replay" else "",
        "files": files,
        "sent": sent,
        "busiest": busiest,
        "error": printed.err,
    }


def _columns(path: Path) -> Any:
    """A recording without its times, which differ from run to run."""
    if path.name == "meta.json":
        return json.loads(path.read_text()).get("engine_kwargs")
    return [sorted(json.loads(line)) for line in path.read_text().splitlines() if line.startswith("{")]


@pytest.mark.parametrize("command", LINES)
def test_every_flag_has_an_entry(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    flags = set(re.findall(r"^  (?:-\w+(?: \S+)?, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    if command == "compare":
        flags -= {flag_name(name) for name in RuntimeOptions.model_fields}
    assert flags - {"--help", "--tensor-parallel-size"} <= set(ACTS[command]) | ELSEWHERE[command]


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, table in ACTS.items() for flag in table]
)
def test_the_flag_changes_what_comes(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, before = ACTS[command][flag], BEFORE.get((command, flag), "")
    usual, changed = outcome(command, before, capsys), outcome(command, words, capsys)
    assert usual.pop("status") == 0, usual["error"]
    assert changed.pop("status") in (0, 1), changed["error"]
    usual.pop("error"), changed.pop("error")
    assert changed != usual


@pytest.mark.parametrize(
    ("command", "words"), [(command, words) for command, lines in CANNOT.items() for words in lines]
)
def test_a_flag_that_cannot_act_is_refused(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = outcome(command, words, capsys)
    flag = [word for word in words.split() if word.startswith("--")][-1]
    assert told["status"] == 2
    assert flag in told["error"]
