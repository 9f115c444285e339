"""Sizes worked out by hand from the published shapes of the models."""

from __future__ import annotations

from typing import Any

import pytest

from servesim.errors import InputError
from servesim.memory.ledger import Memory, Share
from servesim.memory.plan import KvCapacity, kv_cache_capacity
from servesim.memory.sizing import (
    GIB,
    kv_bytes_per_token,
    weight_bytes_per_npu,
)
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.weights import stage_layers
from tests.specs import clusters

LLAMA, QWEN_MOE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"


def plan(instance: dict[str, Any] | None = None, **flags: Any) -> KvCapacity:
    return plan_with(None, (), instance, **flags)


def plan_with(
    on_npus: list[tuple[int, int]] | None,
    outside: tuple[Share, ...],
    instance: dict[str, Any] | None = None,
    **flags: Any,
) -> KvCapacity:
    cluster = load_cluster(clusters.cluster(clusters.instance(tp_size=..., **(instance or {}))))
    spec = cluster.instances[0][1]
    model = load_model(spec.model_name)
    options = resolve(RuntimeOptions(**flags), spec, model)
    return kv_cache_capacity(model, spec, options, on_npus=on_npus, outside=outside)


def test_llama_has_eight_billion_weights() -> None:
    # 32 blocks of 218,112,000 (qkv 25,165,824, o 16,777,216, mlp 176,160,768, norms 8,192), two matrices of
    # 128256 x 4096, a norm: 8,030,261,248 parameters, as the model's card says.
    assert weight_bytes_per_npu(load_model(LLAMA), "bfloat16") == 2 * 8_030_261_248


def test_weights_are_halved_by_two_ranks_but_for_norms() -> None:
    model = load_model(LLAMA)
    norms = 2 * (2 * 32 + 1) * 4096
    whole = weight_bytes_per_npu(model, "bfloat16")
    assert weight_bytes_per_npu(model, "bfloat16", tp=2) == (whole - norms) // 2 + norms


def test_fp8_weights_keep_embedding_and_head_in_16_bit() -> None:
    model = load_model(LLAMA)
    vocabulary, norms = 2 * 128256 * 4096, (2 * 32 + 1) * 4096
    blocks = 8_030_261_248 - vocabulary - norms
    assert weight_bytes_per_npu(model, "fp8") == blocks + 2 * (vocabulary + norms)


def test_experts_are_sharded_by_expert_parallelism() -> None:
    model = load_model(QWEN_MOE)
    experts = 48 * 3 * 2048 * 768 * 128 * 2
    saved = weight_bytes_per_npu(model, "bfloat16") - weight_bytes_per_npu(model, "bfloat16", ep=2)
    assert saved == experts // 2


def test_remaining_layers_go_to_the_stages_before_the_last() -> None:
    assert stage_layers(32, 4) == [8, 8, 8, 8]
    assert stage_layers(10, 4) == [2, 3, 3, 2]
    assert stage_layers(61, 8) == [7, 7, 8, 8, 8, 8, 8, 7]


@pytest.mark.parametrize(("tp", "expected"), [(1, 131072), (2, 65536), (8, 16384), (16, 16384)])
def test_kv_bytes_of_a_token_are_split_by_heads_down_to_one(tp: int, expected: int) -> None:
    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 131072
    assert kv_bytes_per_token(load_model(LLAMA), "bfloat16", tp) == expected


def test_fp8_kv_halves_a_block_and_doubles_the_blocks() -> None:
    auto, fp8 = plan(), plan(kv_cache_dtype="fp8")
    assert auto.bytes_per_block == 2 * fp8.bytes_per_block == 16 * 131072
    assert fp8.num_blocks // 2 == auto.num_blocks
    assert fp8.num_blocks - 2 * auto.num_blocks in (0, 1)
    assert auto.weight_bytes == fp8.weight_bytes


def test_no_reserve_gives_all_that_is_left_to_the_cache() -> None:
    memory = {"mem_size": 96, "mem_bw": 1597, "mem_latency": 0, "reserve": 0}
    left = int(96 * GIB * 0.9) - 2 * 8_030_261_248
    assert plan({"npu_mem": memory}).num_blocks == left // (16 * 131072) == 36578


def test_the_band_holds_what_vllm_gave() -> None:
    # vLLM 0.19 on an RTX 4090 (25,250,627,584 bytes): 2588 blocks, max_num_seqs 256, 2048 batched tokens
    memory = {"mem_size": 25_250_627_584 / GIB, "mem_bw": 1008, "mem_latency": 0}
    capacity = plan({"npu_mem": memory}, max_num_seqs=256)
    assert capacity.num_blocks == pytest.approx(2588, rel=0.04)
    low, high = capacity.band_blocks
    assert low <= capacity.num_blocks <= high
    assert low <= 2588 <= high


def test_what_is_given_has_no_band() -> None:
    memory = {"mem_size": 96, "mem_bw": 1597, "mem_latency": 0, "reserve": 4}
    for capacity in (plan({"num_gpu_blocks": 500}), plan({"npu_mem": memory})):
        assert capacity.band_blocks == (capacity.num_blocks, capacity.num_blocks)
        assert capacity.band_tokens == (capacity.tokens, capacity.tokens)


def test_kv_that_lies_elsewhere_has_no_band() -> None:
    elsewhere = Share("cpu", Memory("CPU", "node", 512 * GIB, 256, 0), 0, 131072, 100 * GIB)
    capacity = plan_with([(16 * GIB, 0)], (elsewhere,))
    assert capacity.band_blocks == (capacity.num_blocks, capacity.num_blocks) == (51200, 51200)


def test_the_number_of_blocks_can_be_given() -> None:
    capacity = plan({"num_gpu_blocks": 500})
    assert (capacity.num_blocks, capacity.usable_blocks, capacity.tokens) == (500, 499, 8000)
    assert capacity.overridden


def test_weights_that_do_not_fit_are_an_error_with_the_figures() -> None:
    memory = {"mem_size": 16, "mem_bw": 1597, "mem_latency": 0}
    with pytest.raises(InputError, match=r"take 14\.96 GiB per NPU .* allows 14\.40 GiB"):
        plan({"npu_mem": memory})


def test_no_room_for_a_block_is_an_error_with_the_figures() -> None:
    memory = {"mem_size": 17, "mem_bw": 1597, "mem_latency": 0}
    with pytest.raises(InputError, match=r"no room for the KV cache: of 15\.30 GiB, weights take 14\.96"):
        plan({"npu_mem": memory})


def test_stages_on_several_gpus_keep_memory_for_nccl() -> None:
    one, two = plan(), plan({"pp_size": 2, "num_npus": 2})
    assert one.non_torch_bytes / GIB == pytest.approx(0.13, abs=0.01)
    assert two.non_torch_bytes / GIB == pytest.approx(0.545, abs=0.01)
