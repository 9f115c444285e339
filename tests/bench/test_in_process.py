"""vLLM in this process. The engine here is a stand-in with the names and shapes of vLLM's own."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from servesim.__main__ import main
from servesim.bench.recording import load_recording

WORDS = [
    "bench",
    "replay",
    "--dataset",
    "w.jsonl",
    "--output",
    "rec",
    "--engine",
    "vllm",
    "--model",
    "org/tiny",
]


class StandIn:
    """An ``AsyncLLM`` that gives two tokens at first and then one at a time."""

    made: list[StandIn]

    def __init__(self, arguments: Any) -> None:
        self.arguments, self.asked, self.shut = arguments, [], False
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=2048),
            cache_config=SimpleNamespace(block_size=16, cache_dtype="auto", num_gpu_blocks=None),
            model_config=SimpleNamespace(dtype="torch.bfloat16", max_model_len=4096),
        )

    @classmethod
    def from_engine_args(cls, arguments: Any) -> StandIn:
        if arguments.values.get("max_num_seqs") == 0:
            raise ValueError("max_num_seqs must be positive")
        cls.made.append(cls(arguments))
        return cls.made[-1]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        if prompt["prompt_token_ids"] == [13]:
            raise ValueError("unlucky")
        self.asked.append((prompt, params, request_id))
        metrics = SimpleNamespace(arrival_time=time.time(), queued_ts=50.0, scheduled_ts=50.1)
        metrics.first_token_ts, metrics.last_token_ts = 50.2, 50.2 + params.max_tokens
        for tokens in ([1, 2], *([3] for _ in range(params.max_tokens - 2))):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)], metrics=metrics)

    def shutdown(self) -> None:
        self.shut = True


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn.made = []

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    class Kind(Enum):
        DELTA = 1

    module("vllm", __version__="0.24.0", SamplingParams=SimpleNamespace)
    module("vllm.engine")
    module("vllm.engine.arg_utils", AsyncEngineArgs=lambda **values: SimpleNamespace(values=values))
    module("vllm.sampling_params", RequestOutputKind=Kind)
    module("vllm.v1")
    module("vllm.v1.engine")
    module("vllm.v1.engine.async_llm", AsyncLLM=StandIn)


@pytest.fixture(autouse=True)
def _workload(root: Path) -> None:
    entries = [
        {"input_toks": 3, "output_toks": 5, "arrival_time_ns": 0, "input_tok_ids": [7, 8, 9]},
        {"input_toks": 1, "output_toks": 5, "arrival_time_ns": 0, "input_tok_ids": [13]},
    ]
    (root / "w.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.usefixtures("_vllm")
def test_the_engines_own_stamps_are_recorded() -> None:
    assert main([*WORDS, "--engine-args", '{"max_num_seqs": 64}']) == 0
    (engine,) = StandIn.made
    ((prompt, params, name),) = engine.asked
    assert (prompt, name) == ({"prompt_token_ids": [7, 8, 9]}, "bench-0")
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (5, 5, True)
    assert engine.arguments.values == {"model": "org/tiny", "disable_log_stats": False, "max_num_seqs": 64}
    assert engine.shut
    (row,) = [json.loads(line) for line in Path("rec/requests.jsonl").read_text().splitlines()]
    stamps = [row[key] for key in ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")]
    assert stamps == [50.0, 50.1, 50.2, 55.2]
    assert len(row["token_ts"]) == row["output_toks"] == 5
    failed = json.loads(Path("rec/errors.jsonl").read_text())
    assert (failed["request_id"], failed["message"]) == ("bench-1", "ValueError: unlucky")
    meta = json.loads(Path("rec/meta.json").read_text())
    assert meta["stamps"]["side"] == "engine"
    assert meta["engine_kwargs"]["max_num_batched_tokens"] == 2048
    assert (meta["engine_kwargs"]["dtype"], meta["engine_kwargs"]["kv_cache_dtype"]) == ("bfloat16", "auto")
    assert load_recording("rec").engine == "vLLM 0.24.0"


@pytest.mark.usefixtures("_vllm")
def test_an_engine_that_does_not_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--engine-args", '{"max_num_seqs": 0}']) == 2
    error = capsys.readouterr().err
    assert "vLLM 0.24.0 does not start: ValueError: max_num_seqs must be positive" in error


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_way_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(WORDS) == 2
    error = capsys.readouterr().err
    assert "--engine vllm: vLLM cannot be imported here" in error
    assert "record a running server with --url" in error
