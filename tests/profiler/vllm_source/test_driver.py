"""What the vllm source asks of vLLM, and what it says where vLLM or a GPU is missing."""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from servesim.__main__ import main
from servesim.errors import NotSupportedError
from servesim.profiler.sources import check
from servesim.profiler.vllm_source.meter import engine_arguments, require_vllm, version_tuple
from tests.profiler.measure.fake_meter import job


def _installed(monkeypatch: pytest.MonkeyPatch, version: str, gpu: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    cuda = SimpleNamespace(is_available=lambda: gpu)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.13.0"))


def test_without_vllm_the_error_names_it_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["profile", "servesim/tiny-llama", "--source", "vllm", "--hardware", "X"]) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed here" in error
    assert "--source torch" in error


def test_an_old_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "0.18.2", gpu=True)
    with pytest.raises(NotSupportedError, match=r"vLLM 0\.18\.2 is installed; 0\.19 or later"):
        require_vllm()


def test_without_a_gpu_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "0.24.0", gpu=False)
    with pytest.raises(NotSupportedError, match="finds no GPU"):
        require_vllm()
    _installed(monkeypatch, "0.24.0", gpu=True)
    assert require_vllm() == "0.24.0"


def test_versions_compare_by_number() -> None:
    assert version_tuple("0.24.0rc1") == (0, 24)
    assert version_tuple("0.9.2") < version_tuple("0.19.0")


def test_the_engine_has_one_block_with_the_shapes_of_one_rank() -> None:
    arguments = engine_arguments(job(tp=(2,)), 2, "folder")
    assert arguments["tensor_parallel_size"] == 1
    assert arguments["load_format"] == "dummy"
    overrides = arguments["hf_overrides"]
    shapes = (
        overrides["num_hidden_layers"],
        overrides["num_attention_heads"],
        overrides["num_key_value_heads"],
    )
    assert shapes == (1, 4, 1)
    assert (overrides["intermediate_size"], overrides["vocab_size"]) == (352, 2048)
    assert (
        engine_arguments(job("servesim/tiny-moe"), 2, "folder")["hf_overrides"]["moe_intermediate_size"] == 96
    )


def test_formats_go_to_vllm_by_its_own_names() -> None:
    both = engine_arguments(job(dtype="fp8", kv="fp8"), 1, "folder")
    assert (both["quantization"], both["kv_cache_dtype"], both["dtype"]) == ("fp8", "fp8", "bfloat16")
    assert "quantization" not in engine_arguments(job(), 1, "folder")
    with pytest.raises(NotSupportedError, match="int8 from a checkpoint"):
        check("vllm", job(dtype="int8"))
