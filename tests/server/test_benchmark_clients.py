"""GuideLLM and AIPerf, from PyPI, against the emulated server; what they write is read as a workload.

They are heavy, and each wants an environment of its own, so they are run where their programs are::

    python -m venv clients && clients/bin/pip install guidellm aiperf
    PATH=$PATH:$PWD/clients/bin python -m pytest tests/server/test_benchmark_clients.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from servesim.workload.formats import load_workload
from tests.engine.toy_world import DENSE, toy_cluster, toy_instance, toy_world
from tests.server.serving import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUESTS = 12
MINUTES = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and a few words, as a folder that ``transformers`` can load without a network."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["the time of day in the life of a child and the people of the city"] * 20, trainer
    )
    made.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))
    return folder


@pytest.fixture
def server(tmp_path: Path, tokenizer: Path) -> Iterator[Served]:
    with toy_world(tmp_path) as root:
        (root / "one.json").write_text(json.dumps(toy_cluster([toy_instance()])))
        with serving(f"--cluster-config one.json --tokenizer {tokenizer}") as served:
            yield served


def run(name: str, *words: str) -> None:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is no program of this machine; see the head of this file")
    done = subprocess.run([path, *words], capture_output=True, text=True, timeout=60 * MINUTES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_guidellm_measures_and_is_read(server: Served, tokenizer: Path, tmp_path: Path) -> None:
    result = tmp_path / "benchmarks.json"
    run(
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={server.url}"),
        *("--profile", "kind=constant,rate=5", "--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=120,output_tokens=24"),
        *("--output", f"kind=json,path={result}", "--disable-console"),
    )
    workload = load_workload(str(result))
    assert len(workload) == REQUESTS
    assert {request.output_tokens for request in workload} == {24}
    sent = json.loads(result.read_text())["benchmarks"][0]["requests"]
    assert not sent["errored"]
    prompts = sum(request.input_tokens for request in workload)
    assert prompts == server.metric("vllm:prompt_tokens_total")
    assert server.metric("vllm:generation_tokens_total") == 24 * REQUESTS


def test_aiperf_measures_and_is_read(server: Served, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "aiperf"
    run(
        "aiperf",
        *("profile", "--model-names", DENSE, "--tokenizer", str(tokenizer), "--url", server.url),
        *("--endpoint-type", "chat", "--streaming", "--request-rate", "5"),
        *("--request-count", str(REQUESTS), "--warmup-request-count", "2"),
        *("--synthetic-input-tokens-mean", "100", "--output-tokens-mean", "20"),
        *("--artifact-dir", str(folder), "--ui", "none"),
    )
    workload = load_workload(str(folder / "profile_export.jsonl"))
    assert len(workload) == REQUESTS
    assert workload.skipped == 2  # warm-up
    assert {(request.input_tokens, request.output_tokens) for request in workload} == {(100, 20)}
    assert server.metric("vllm:generation_tokens_total") == 20 * (REQUESTS + 2)
