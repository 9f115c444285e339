"""Models whose layers the engine cannot simulate are refused by name; formats come from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servesim.errors import InputError, NotSupportedError
from servesim.memory.sizing import GIB, kv_bytes_per_token, weight_bytes_per_npu
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.model import load_model, model_from_config
from servesim.specs.options import RuntimeOptions, resolve
from servesim.specs.runnable import missing_kinds
from tests.specs.clusters import cluster, instance, node

MODELS = Path(__file__).parents[1] / "golden/models"


def missing(name):
    config = json.loads((MODELS / f"{name}.json").read_text())
    return " ".join(missing_kinds(model_from_config(config, name, name).layers))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen__Qwen3.5-27B", "a state in place of a KV cache (gated_delta_net) (48 of 64 layers)"),
        ("deepseek-ai__DeepSeek-R1", "latent attention (MLA) (61 of 61 layers)"),
        ("deepseek-ai__DeepSeek-V3.2", "latent attention with an indexer"),
        ("deepseek-ai__DeepSeek-V4-Flash", "attention over a window and compressed tokens"),
        ("meta-llama__Llama-4-Maverick-17B-128E-Instruct", "attention in chunks of 8192 tokens"),
        ("google__gemma-4-26B-A4B", "attention of another shape than in other layers"),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "no attention"),
    ],
)
def test_kinds_that_cannot_be_simulated_are_named(name, kind):
    assert kind in missing(name)


@pytest.mark.parametrize("name", ["Qwen__Qwen3-30B-A3B", "openai__gpt-oss-20b", "blis__yi-34b"])
def test_models_that_can_be_simulated(name):
    assert missing(name) == ""


def written(tmp_path, config, sidecar=None):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if sidecar:
        (folder / "hf_quant_config.json").write_text(json.dumps(sidecar))
    return str(folder)


def test_a_cluster_with_such_a_model_is_refused(tmp_path):
    path = written(tmp_path, json.loads((MODELS / "deepseek-ai__DeepSeek-R1.json").read_text()))
    with pytest.raises(InputError, match=r"model_name: .*cannot be simulated yet.*latent attention"):
        check_cluster(load_cluster(cluster(nodes=[node(instance(model_name=path))])))


def test_a_sidecar_sets_weights_and_kv_cache(tmp_path):
    llama = {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    }  # fmt: skip
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    model = load_model(written(tmp_path, llama, {"quantization": quantization}))
    [(_, spec)] = load_cluster(cluster(nodes=[node(instance(tp_size=4, num_npus=4))])).instances
    options = resolve(RuntimeOptions(), spec, model)
    assert (options.dtype, options.kv_dtype, options.variant) == ("fp8", "fp8", "fp8-kvfp8")
    assert weight_bytes_per_npu(model, "fp8", 4) / GIB == pytest.approx(16.9, abs=0.05)
    assert kv_bytes_per_token(model, options.kv_dtype, 4) == 40_960


def test_an_unknown_family_with_other_layers_is_refused():
    config = json.loads((MODELS / "blis__yi-34b.json").read_text())
    with pytest.raises(NotSupportedError, match="shared_expert_intermediate_size tells of layers"):
        model_from_config({**config, "model_type": "own", "shared_expert_intermediate_size": 64}, "x", "x")


def test_a_dense_family_has_no_experts():
    config = json.loads((MODELS / "blis__yi-34b.json").read_text())
    with pytest.raises(NotSupportedError, match="num_experts: is not modelled for model_type 'llama'"):
        model_from_config({**config, "num_experts": 8, "num_experts_per_tok": 2}, "x", "x")
