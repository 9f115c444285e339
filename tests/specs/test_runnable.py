"""Models whose layers the engine cannot simulate are refused by name; formats come from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servesim.errors import InputError, NotSupportedError
from servesim.memory.sizing import GIB, kv_bytes_per_token, weight_bytes_per_npu
from servesim.specs.block_layers import architecture_of
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model, model_from_config
from servesim.specs.options import RuntimeOptions
from servesim.specs.runnable import why_not_simulated
from tests.specs.clusters import cluster, instance, node

MODELS = Path(__file__).parents[1] / "golden/models"


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen__Qwen3-30B-A3B", "openai__gpt-oss-20b", "blis__yi-34b", "Qwen__Qwen3.5-27B"),
        *("deepseek-ai__DeepSeek-R1", "deepseek-ai__DeepSeek-V3.2", "google__gemma-4-26B-A4B"),
        "deepseek-ai__DeepSeek-V4-Flash",
        *("meta-llama__Llama-4-Maverick-17B-128E-Instruct", "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    ],
)
def test_models_that_can_be_simulated(name):
    config = json.loads((MODELS / f"{name}.json").read_text())
    assert why_not_simulated(model_from_config(config, name, name)) is None


def test_a_file_that_leaves_out_what_a_model_has_is_refused(root):
    text = (Path(__file__).parents[2] / "profiler/models/qwen3_moe.yaml").read_text()
    (root / "profiler/models").mkdir(parents=True)
    (root / "profiler/models/qwen3_next.yaml").write_text(text.replace("qwen3_moe", "qwen3_next"))
    with pytest.raises(InputError, match=r"qwen3_next.yaml: cannot describe .*shared experts"):
        architecture_of(load_model("Qwen/Qwen3-Next-80B-A3B-Instruct"))


def written(tmp_path, config, sidecar=None):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if sidecar:
        (folder / "hf_quant_config.json").write_text(json.dumps(sidecar))
    return str(folder)


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
