"""A model config says what sizes and kernel times depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from servesim.errors import InputError, MissingFileError
from servesim.specs.architecture import load_architecture
from servesim.specs.model import ModelSpec, known_models, load_model, model_from_config, shape_twin
from servesim.specs.validation import one_slip
from tests.recorded import recorded_path
from tests.specs.clusters import model_config

# Parameters as published, in billions: a check of the shipped shapes from outside.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.6,
    "meta-llama/Llama-3.3-70B-Instruct": 70.6,
    "Qwen/Qwen3-8B": 8.2,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-32B": 32.8,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30.5,
    "Qwen/Qwen3-235B-A22B": 235.0,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "microsoft/Phi-mini-MoE-instruct": 7.6,
}


def parse(**changes: object) -> ModelSpec:
    return model_from_config(model_config(**changes), "tiny", "config.json")


def parameters(model: ModelSpec) -> float:
    """Weight matrices only: attention, MLP or experts, embedding and lm_head."""
    attention = (
        2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    )
    mlp = 3 * model.hidden_size * model.intermediate_size
    if model.is_moe:
        mlp = 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return model.num_hidden_layers * (attention + mlp) + vocabulary


def test_every_shipped_model_is_covered_here() -> None:
    assert set(PARAMETERS) <= set(known_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(load_model(name)) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_model_has_an_architecture_with_its_blocks(name: str) -> None:
    model = load_model(name)
    layers = load_architecture(model.model_type).block_layers(model.is_moe)
    assert "attention" in layers
    assert ("moe" in layers) == model.is_moe


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-70B",
        "Qwen/Qwen3-32B",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "mistralai/Mixtral-8x7B-v0.1",
        "microsoft/Phi-mini-MoE-instruct",
    ],
)
def test_a_shipped_model_equals_its_full_config(name: str) -> None:
    full = json.loads(recorded_path("model", f"{name}.json").read_text())
    assert model_from_config(full, name, name) == load_model(name)


def test_head_dim_and_kv_heads_follow_from_the_rest() -> None:
    model = parse(num_key_value_heads=...)
    assert model.head_dim == 64 // 8
    assert model.num_key_value_heads == 8


def test_a_stated_head_dim_wins() -> None:
    assert parse(head_dim=128).head_dim == 128


def test_fields_without_influence_are_passed_over() -> None:
    extras = {"rope_theta": 5e5, "eos_token_id": [1, 2], "architectures": ["X"], "max_window_layers": 48}
    assert parse(**extras) == parse()


def test_null_means_not_used() -> None:
    assert parse(sliding_window=None, head_dim=None, num_experts=None) == parse()


def test_experts_under_any_of_their_names() -> None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        model = parse(model_type="qwen3_moe", **{name: 8, "num_experts_per_tok": 2})
        assert model.is_moe
        assert (model.num_experts, model.moe_intermediate_size) == (8, 128)


def test_an_own_name_wins_over_an_alias() -> None:
    assert parse(dtype="float16").torch_dtype == "bfloat16"
    assert parse(dtype="float16", torch_dtype=...).torch_dtype == "float16"


def test_some_layers_may_be_dense_in_a_model_of_experts() -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    assert parse(**experts).num_moe_layers == 4
    later = {**experts, "model_type": "dots1", "moe_intermediate_size": 64, "first_k_dense_replace": 1}
    assert parse(**later).num_moe_layers == 3
    assert parse(**experts, mlp_only_layers=[0, 2]).num_moe_layers == 2
    model = parse(**experts, decoder_sparse_step=2)
    assert [model.has_experts(layer) for layer in range(4)] == [False, True, False, True]
    assert parse().num_moe_layers == 0


def test_layers_slide_as_the_config_says() -> None:
    assert parse().num_sliding_layers == 0
    assert parse(sliding_window=128).num_sliding_layers == 4
    assert parse(sliding_window=128, use_sliding_window=False).num_sliding_layers == 0
    kinds = ["full_attention", "sliding_attention"] * 2
    assert parse(sliding_window=128, layer_types=kinds).num_sliding_layers == 2
    assert parse(sliding_window=128, use_sliding_window=True, max_window_layers=3).num_sliding_layers == 1


def test_an_fp8_checkpoint_has_fp8_weights() -> None:
    model = parse(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert model.torch_dtype == "fp8"


def test_the_language_model_of_a_multimodal_config() -> None:
    nested = {"model_type": "outer", "text_config": model_config()}
    assert model_from_config(nested, "tiny", "config.json") == parse()


def test_a_kv_rank_makes_attention_latent() -> None:
    assert not parse().is_mla
    assert parse(kv_lora_rank=512, qk_rope_head_dim=64).is_mla


def test_a_local_folder_or_file_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "MyModel"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_config()))
    assert load_model(folder).name == "MyModel"
    assert load_model(str(folder / "config.json")).model_dump() == load_model(folder).model_dump()


def test_a_hugging_face_cache_folder_keeps_the_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-32B" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config()))
    assert load_model(folder).name == "Qwen/Qwen3-32B"


def test_a_local_copy_of_a_known_model_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen" / "Qwen3-32B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config()))
    assert load_model(folder).name == "Qwen/Qwen3-32B"


def test_an_unknown_model_says_what_to_do() -> None:
    with pytest.raises(MissingFileError) as caught:
        load_model("Qwen/Qwen3-31B")
    message = str(caught.value)
    assert message.startswith(
        "configs/model/Qwen/Qwen3-31B.json: no such model config; did you mean 'Qwen/Qwen3-"
    )
    assert "give the folder that holds one as model_name" in message


# --- names and fields of published configs ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.3-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
    ],
)
def test_tuned_models_have_the_shape_of_their_base(name: str, known: str) -> None:
    assert load_model(name) == load_model(known)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-31B-A3B", "openai/gpt-oss-21b", "Llama-3.1"])
def test_another_model_is_no_twin(name: str) -> None:
    assert shape_twin(name) is None


@pytest.mark.parametrize(
    ("field", "read_as"),
    [("num_experts_per_token", "num_experts_per_tok"), ("num_shared_expert", "num_shared_experts")],
)
def test_other_names_of_published_fields_are_read(field: str, read_as: str) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    experts.pop(read_as, None)
    made = model_config(model_type="qwen3_moe", **experts, **{field: 2})
    model = model_from_config(made, "x", "config.json")
    assert getattr(model, read_as) == 2


@pytest.mark.parametrize("field", ["qk_head_dim", "time_step_limit", "head_dims_per_layer"])
def test_published_fields_near_ours_are_passed_over(field: str) -> None:
    base = model_from_config(model_config(), "x", "config.json")
    assert model_from_config(model_config(**{field: 4}), "x", "config.json") == base


def test_infinity_in_a_field_without_influence_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model_config(time_step_limit=[0.0, math.inf])), encoding="utf-8")
    assert load_model(path).hidden_size == 64


@pytest.mark.parametrize(
    ("typed", "meant", "near"),
    [
        ("hiden_size", "hidden_size", True),
        ("hidden_siez", "hidden_size", True),
        ("hidden-size", "hidden_size", True),
        ("hidden_sizes", "hidden_size", True),
        ("num_experts_per_token", "num_experts_per_tok", False),
        ("qk_head_dim", "head_dim", False),
        ("hd", "dh", True),
    ],
)
def test_what_is_a_slip_of_the_pen(typed: str, meant: str, near: bool) -> None:
    assert one_slip(typed, meant) is near
    assert one_slip(meant, typed) is near


@pytest.mark.parametrize("model_type", ["minimax_m2", "phi4mm", "deepseek_v3"])
def test_a_missing_architecture_suggests_no_other(model_type: str) -> None:
    with pytest.raises(
        MissingFileError, match=r"no such architecture; known: gemma2, .*This file is missing"
    ):
        load_architecture(model_type)


def test_no_published_config_fails_for_a_key_name() -> None:
    folder = recorded_path("..", "hf_configs")
    refused = {}
    for path in sorted(folder.glob("*/config.json")):
        try:
            load_model(path)
        except InputError as error:
            refused[path.parent.name] = str(error)
    told = [text for text in refused.values() if "unknown key" in text or "finite" in text]
    assert told == []


def test_experts_that_a_flag_turns_off_are_not_there(tmp_path: Path) -> None:
    config = json.loads(
        (Path(__file__).parents[1] / "golden/models/google__gemma-4-26B-A4B.json").read_text()
    )
    assert load_model(written(tmp_path / "on", config)).is_moe
    config["text_config"]["enable_moe_block"] = False
    dense = load_model(written(tmp_path / "off", config))
    assert not dense.is_moe
    assert dense.num_moe_layers == 0


def written(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
