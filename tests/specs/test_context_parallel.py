"""Which ranks may share KV by tokens, as vLLM says, and what is refused beside it."""

from __future__ import annotations

from typing import Any

import pytest

from servesim.errors import InputError, NotSupportedError
from servesim.specs.cluster import load_cluster
from servesim.specs.context_parallel import allowed_sizes, new_tokens_apart, shared_attention
from servesim.specs.instance_options import InstanceOptions, resolve
from servesim.specs.layers import Attention, LatentAttention
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from tests.engine.toy_world import toy_cluster, toy_instance

LLAMA, DEEPSEEK = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1"
OF_VLLM = {
    (32, 8): {8: [1], 16: [1, 2], 32: [1, 2, 4]},
    (64, 4): {8: [1, 2], 16: [1, 2, 4], 32: [1, 2, 4, 8]},
    (40, 8): {10: [1], 20: [1], 40: [1, 5]},
    (48, 1): {4: [1, 2, 4], 6: [1, 2, 3, 6], 12: [1, 2, 3, 4, 6, 12]},
    (12, 2): {4: [1, 2], 6: [1, 2, 3], 12: [1, 2, 3, 6]},
    (32, 4): {8: [1, 2]},
    (96, 8): {12: [1], 24: [1, 2, 3], 48: [1, 2, 3, 4, 6]},
}
"""(heads, KV heads) -> tp -> what ``ModelConfig.verify_with_parallel_config`` of vLLM 0.24.0, 0.28.0 and
0.33.0 lets through."""


@pytest.mark.parametrize("heads", OF_VLLM)
def test_the_sizes_are_those_of_vllm(heads: tuple[int, int]) -> None:
    attention = Attention("full", *heads, head_dim=16, value_dim=16)
    assert {tp: allowed_sizes(attention, tp) for tp in OF_VLLM[heads]} == OF_VLLM[heads]


def test_all_ranks_have_the_same_latent_vectors() -> None:
    latent = LatentAttention(128, 512, 64, 128, 128, 1536)
    assert allowed_sizes(latent, 8) == [1, 2, 4, 8]


def options_of(model: str, tp: int, flags: dict[str, Any] | None = None, **own: Any) -> InstanceOptions:
    cluster = load_cluster(toy_cluster([{**toy_instance(model, tp_size=tp), "hardware": "H100", **own}]))
    ((_, instance),) = cluster.instances
    return resolve(RuntimeOptions(**(flags or {})), instance, load_model(model))


def test_one_is_the_default() -> None:
    assert options_of(LLAMA, 16).decode_context_parallel_size == 1
    assert options_of(LLAMA, 16).dcp_comm_backend == "ag_rs"
    assert options_of(LLAMA, 16, {"decode_context_parallel_size": 2}).decode_context_parallel_size == 2
    assert options_of(DEEPSEEK, 8, decode_context_parallel_size=8).decode_context_parallel_size == 8


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(InputError, match=r"4 is not allowed for .*; must be 1 or 2: a divisor of tp_size 16"):
        options_of(LLAMA, 16, {"decode_context_parallel_size": 4})
    with pytest.raises(
        InputError, match=r"must be 1: .* one of 8 KV heads \(vLLM does not start otherwise\)"
    ):
        options_of(LLAMA, 8, decode_context_parallel_size=2)
    with pytest.raises(InputError, match=r"3 is not allowed for .*; must be 1, 2, 4 or 8: a divisor"):
        options_of(DEEPSEEK, 8, {"decode_context_parallel_size": 3})


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("openai/gpt-oss-120b", "full, sliding"),
        ("deepseek-ai/DeepSeek-V3.2", "sparse mla"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "full, gated delta net"),
    ],
)
def test_other_attention_is_refused_by_name(model: str, kinds: str) -> None:
    with pytest.raises(NotSupportedError, match=rf"whose attention is {kinds}; it is for attention of one"):
        shared_attention(load_model(model))


@pytest.mark.parametrize(
    ("flags", "own", "named"),
    [
        ({"kv_cache_dtype": "fp8"}, {}, "a KV cache in fp8"),
        ({"speculative_config": '{"method": "ngram", "num_speculative_tokens": 2}'}, {}, "speculative"),
        ({"prefix_storage": "CPU"}, {}, "a lower tier"),
        ({"enable_local_offloading": True}, {}, "--enable-local-offloading"),
        ({"enable_attn_offloading": True}, {}, "--enable-attn-offloading"),
        ({}, {"placement": {"default": {"weights": "cpu"}}}, "placement"),
    ],
)
def test_what_is_not_simulated_beside_it(flags: Any, own: Any, named: str) -> None:
    with pytest.raises(NotSupportedError, match=rf"not simulated with {named}"):
        options_of(LLAMA, 16, {"decode_context_parallel_size": 2, **flags}, **own)


def test_flashinfer_decodes_in_one_kernel() -> None:
    assert [new_tokens_apart(each) for each in ("9.0", "12.0", "8.0", None)] == [True] * 4
    assert not new_tokens_apart("10.0")
