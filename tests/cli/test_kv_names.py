"""Formats of the KV cache that vLLM knows: run where bytes are known, refused by name where they are not."""

from __future__ import annotations

import pytest

from servesim import RuntimeOptions, simulate
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.specs.dtypes import KV_CACHE_NAMED, KV_CACHE_SIZED
from servesim.specs.kv_formats import KV_FORMATS

COMMANDS = {
    "run": ["run"],
    "compare": ["compare"],
    "explain-step": ["explain-step", "--decodes", "1"],
    "support": ["support", "meta-llama/Llama-3.1-8B", "--hardware", "H100"],
    "profile": ["profile", "meta-llama/Llama-3.1-8B", "--hardware", "H100", "--source", "roofline"],
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_format_without_bytes_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused([*COMMANDS[command], "--kv-cache-dtype", "octave_k3v4"], capsys)
    assert "neither its bytes nor its kernel times are known" in error
    assert "nvfp4" in error
    assert "invalid choice" not in error


@pytest.mark.parametrize("name", KV_CACHE_SIZED)
def test_options_take_every_format_with_bytes(name: str) -> None:
    assert RuntimeOptions(kv_cache_dtype=name).kv_cache_dtype == name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KV_CACHE_NAMED)
def test_options_refuse_it_as_flags_do(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot be simulated"):
        RuntimeOptions(kv_cache_dtype=name)  # type: ignore[arg-type]


def test_every_sized_format_has_bytes() -> None:
    assert set(KV_CACHE_SIZED) <= set(KV_FORMATS)


def test_a_word_that_is_no_format_is_an_invalid_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice" in refused(["run", "--kv-cache-dtype", "fp7"], capsys)


def test_one_manager_is_a_flag_of_models_with_windows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--disable-hybrid-kv-cache-manager"]) == 2
    assert "no layer of the model attends to a window or a chunk" in capsys.readouterr().err


def test_a_gpu_refuses_a_format_that_it_cannot_run() -> None:
    with pytest.raises(InputError, match=r"A100 has compute capability 8\.0"):
        simulate(model="openai/gpt-oss-20b", hardware="A100", kv_cache_dtype="fp8", num_reqs=1)
