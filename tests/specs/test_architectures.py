"""The order in which a model's layers run, and which table times each."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.architecture import load_architecture, read_architecture


def test_a_llama_block_in_running_order() -> None:
    llama = load_architecture("llama")
    assert llama.block_layers(moe=False) == [
        *("layernorm", "qkv_proj", "rotary_emb", "attention"),
        *("o_proj", "layernorm", "gate_up_proj", "act_fn", "down_proj"),
    ]
    assert llama.layers_outside_blocks() == ["embedding", "final_layernorm"]
    assert llama.head_layers() == ["lm_head", "sampler"]


def test_a_block_of_experts_has_one_expert_layer() -> None:
    qwen = load_architecture("qwen3_moe")
    assert qwen.block_layers(moe=True)[-1] == "moe"
    assert qwen.kind("moe") == "moe"
    assert "qk_norm" in qwen.block_layers(moe=True)


def test_a_dense_model_has_no_block_of_experts() -> None:
    with pytest.raises(InputError, match=r"profiler/models/llama.yaml: sequence.mlp_moe: is missing"):
        load_architecture("llama").block_layers(moe=True)


def test_every_layer_has_one_table() -> None:
    llama = load_architecture("llama")
    assert llama.kind("qkv_proj") == "dense"
    assert llama.kind("sampler") == "per_sequence"
    assert llama.kind("attention") == "attention"
    with pytest.raises(InputError, match="'nothing' is in none of its tables"):
        llama.kind("nothing")


def test_a_norm_takes_the_same_time_at_any_degree() -> None:
    entry = load_architecture("llama").catalog.dense["layernorm"]
    assert (entry.class_name, entry.tp_stable) == ("RMSNorm", True)


@pytest.mark.parametrize("path", paths.find_all("profiler/models/*.yaml"), ids=lambda path: path.stem)
def test_every_shipped_architecture_is_good_and_named_as_its_file(path) -> None:  # type: ignore[no-untyped-def]
    assert read_architecture(path).model_type == path.stem


def test_a_class_may_be_named_by_its_engine(tmp_path: Path) -> None:
    ours = paths.find("profiler/models/llama.yaml")
    theirs = tmp_path / "llama.yaml"
    theirs.write_text(ours.read_text(encoding="utf-8").replace("{class:", "{vllm:"), encoding="utf-8")
    assert read_architecture(theirs) == read_architecture(ours)


def test_a_class_under_both_names_is_refused(tmp_path: Path) -> None:
    text = paths.find("profiler/models/llama.yaml").read_text(encoding="utf-8")
    path = tmp_path / "llama.yaml"
    path.write_text(text.replace("{class: Sampler", "{class: Sampler, vllm: Sampler"), encoding="utf-8")
    with pytest.raises(InputError, match=r"catalog.per_sequence.sampler.vllm"):
        read_architecture(path)
