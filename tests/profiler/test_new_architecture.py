"""A new architecture needs two files and no code: from its YAML to a finished simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import servesim
from servesim.__main__ import main
from servesim.specs.architecture import load_architecture
from servesim.specs.model import load_model
from tests.specs import clusters

ARCHITECTURE = """\
model_type: plainlm
sequence:
  prologue: [embedding]
  pre_attn: [input_norm, qkv_proj, rotary_emb]
  post_attn: [out_proj, post_attn_norm]
  mlp_dense: [fc_in, gelu, fc_out, post_mlp_norm]
  head: [final_layernorm, lm_head, sampler]
catalog:
  dense:
    embedding: {class: VocabParallelEmbedding}
    input_norm: {class: RMSNorm}
    qkv_proj: {class: QKVParallelLinear}
    rotary_emb: {class: RotaryEmbedding}
    out_proj: {class: RowParallelLinear, within: PlainAttention}
    post_attn_norm: {class: RMSNorm}
    fc_in: {class: ColumnParallelLinear}
    gelu: {class: NewGELU}
    fc_out: {class: RowParallelLinear, within: PlainMLP}
    post_mlp_norm: {class: RMSNorm}
    final_layernorm: {class: RMSNorm}
  per_sequence:
    lm_head: {class: LogitsProcessor}
    sampler: {class: Sampler}
  attention:
    attention: {class: Attention}
"""
CONFIG = {
    "model_type": "plainlm",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def cluster(model: str) -> dict[str, object]:
    memory = {"mem_size": 128, "mem_bw": 5000, "mem_latency": 0}
    return clusters.cluster(clusters.instance(model_name=model, hardware="NPU-X", npu_mem=memory))


pytestmark = pytest.mark.usefixtures("root")


def profile_and_run(model: str) -> servesim.Result:
    assert main(["profile", model, "--hardware", "NPU-X", "--source", "roofline"]) == 0
    return servesim.simulate(cluster(model), num_reqs=5)


def test_an_invented_architecture_runs_from_its_two_files(root: Path) -> None:
    for relative, text in {
        "profiler/models/plainlm.yaml": ARCHITECTURE,
        "configs/model/me/plain-lm.json": json.dumps(CONFIG),
    }.items():
        path = root / relative
        path.parent.mkdir(parents=True)
        path.write_text(text)
    result = profile_and_run("me/plain-lm")
    assert result.summary["completed"] == 5


def test_gemma2_runs_with_four_norms_a_block_and_its_windows() -> None:
    block = load_architecture("gemma2").block_layers(moe=False)
    assert block.count("layernorm") == 4
    model = load_model("google/gemma-2-9b-it")
    assert model.num_sliding_layers == 21
    result = profile_and_run("google/gemma-2-9b-it")
    assert result.summary["completed"] == 5


def test_gpt_oss_runs_with_its_experts_and_short_windows() -> None:
    model = load_model("openai/gpt-oss-20b")
    assert (model.num_experts, model.num_experts_per_tok, model.num_sliding_layers) == (32, 4, 12)
    result = profile_and_run("openai/gpt-oss-20b")
    assert result.summary["completed"] == 5
