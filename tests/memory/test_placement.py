"""What lies where: rules, bytes, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servesim.errors import InputError
from servesim.memory.memory_map import MemoryMap
from servesim.memory.placement import block_weights, evict_place, placed_stages, rule_for
from servesim.memory.plan import kv_cache_capacity
from servesim.memory.sizing import GIB, weight_bytes_per_npu
from servesim.specs.architecture import load_architecture
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.layers import Experts
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.weights import layer_bytes, stage_bytes
from tests.specs.clusters import cluster, instance, node

LLAMA = "meta-llama/Llama-3.1-8B"
KV_PER_TOKEN = 131_072
"""Of Llama-3.1-8B in 16 bit: 32 blocks of 4096 bytes."""
BLOCK = 2 * 218_112_000
"""Bytes of the weights of one of its blocks."""
MIXED = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Experts in blocks 3, 5 and 7, dense blocks otherwise."""
CXL = {"mem_size": 16, "mem_bw": 60, "mem_latency": 250, "num_devices": 4}


def memory_map(config: dict[str, Any], **flags: Any) -> MemoryMap:
    loaded = load_cluster(config)
    models = check_cluster(loaded)
    options = RuntimeOptions(**flags)
    return MemoryMap(
        loaded, models, [resolve(options, spec, models[spec.model_name]) for _, spec in loaded.instances]
    )


def placed(placement: dict[str, Any], **more: Any) -> dict[str, Any]:
    return cluster(instance(placement=placement, **more.pop("keys", {})), cxl_mem=CXL, **more)


def with_memory(size: float, *instances: dict[str, Any], **more: Any) -> dict[str, Any]:
    memory = {"mem_size": size, "mem_bw": 256, "mem_latency": 100, **more}
    return cluster(nodes=[node(*instances, cpu_mem=memory)])


def test_a_rule_changes_only_what_it_names() -> None:
    placement = {
        "default": {"weights": "cpu", "kv_loc": "cxl:0"},
        "blocks": [{"blocks": "0-3", "weights": "cxl:1"}, {"blocks": "3,5", "kv_loc": "npu"}],
        "layers": {"o_proj": {"weights": "npu"}},
    }
    [(_, spec)] = load_cluster(placed(placement)).instances
    assert rule_for(spec, "qkv_proj", 2) == ("cxl:1", "cxl:0")
    assert rule_for(spec, "qkv_proj", 3) == ("cxl:1", "npu")
    assert rule_for(spec, "qkv_proj", 5) == ("cpu", "npu")
    assert rule_for(spec, "o_proj", 2) == ("npu", "cxl:0")
    assert rule_for(spec, "embedding", None) == ("cpu", "cxl:0")


@pytest.mark.parametrize(
    ("name", "dtype", "tp"),
    [(LLAMA, "bfloat16", 1), (LLAMA, "fp8", 2), ("Qwen/Qwen3-30B-A3B-Instruct-2507", "bfloat16", 2)],
)
def test_the_layers_of_a_block_add_up_to_the_block(name: str, dtype: str, tp: int) -> None:
    model = load_model(name).stored_as(dtype)
    names = load_architecture(model.model_type).block_layers(isinstance(model.layers[-1].mlp, Experts))
    weights, experts = block_weights(model.layers[-1], model.formats, tp, 1, names)
    assert sum(weights) + experts == layer_bytes(model.layers[-1], model.formats, tp)


@pytest.mark.parametrize(
    "name",
    [
        LLAMA,
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "microsoft/Phi-mini-MoE-instruct",
        "openai/gpt-oss-20b",
        "mixed",
    ],
)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_placed_layers_weigh_what_the_plan_says(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    if name == "mixed":
        name = str(tmp_path / "mixed.json")
        Path(name).write_text(json.dumps(MIXED))
    config = cluster(instance(model_name=name, num_npus=tp * pp, tp_size=tp, pp_size=pp, placement={}))
    [(_, spec)] = load_cluster(config).instances
    model = load_model(name)
    options = resolve(RuntimeOptions(), spec, model)
    architecture = load_architecture(model.model_type)
    if not architecture.sequence.mlp_dense:  # the shipped file knows blocks with experts only
        dense = load_architecture("qwen3").sequence.mlp_dense
        sequence = architecture.sequence.model_copy(update={"mlp_dense": dense})
        architecture = architecture.model_copy(update={"sequence": sequence})
    stages = placed_stages(spec, model, options, architecture)
    weights = [sum(layer.stored_bytes for layer in stage) for stage in stages]
    assert weights == list(stage_bytes(model.stored_as(options.dtype), tp, pp))


def test_layers_that_have_no_name_count_to_the_largest() -> None:
    model = load_model(LLAMA).stored_as("bfloat16")
    weights, _ = block_weights(model.layers[0], model.formats, 1, 1, ["qkv_proj", "o_proj", "down_proj"])
    assert weights[:2] == [2 * 4096 * 6144, 2 * 4096 * 4096]
    assert sum(weights) == BLOCK


def test_weights_elsewhere_make_room_for_kv_on_the_npu() -> None:
    usual = memory_map(cluster()).capacity(0)
    plan = memory_map(placed({"default": {}, "blocks": [{"blocks": "0-15", "weights": "cpu"}]})).capacity(0)
    assert plan.weight_bytes == usual.weight_bytes - 16 * BLOCK
    assert plan.kv_bytes - usual.kv_bytes == pytest.approx(16 * BLOCK, abs=16 * KV_PER_TOKEN)
    [cpu] = plan.outside
    assert (cpu.place, cpu.weight_bytes, cpu.kv_bytes_per_token) == ("cpu", 16 * BLOCK, 0)


def test_without_rules_the_plan_is_the_usual_one() -> None:
    model = load_model(LLAMA)
    [(_, spec)] = load_cluster(cluster()).instances
    usual = kv_cache_capacity(model, spec, resolve(RuntimeOptions(), spec, model), "instance 0")
    assert memory_map(cluster()).capacity(0) == usual
    assert memory_map(placed({"default": {"weights": "npu"}})).capacity(0) == usual


def test_half_the_kv_elsewhere_doubles_what_the_npu_holds() -> None:
    usual = memory_map(cluster()).capacity(0)
    config = with_memory(
        512, instance(placement={"blocks": [{"blocks": "16-31", "kv_loc": "cpu"}], "default": {}})
    )
    plan = memory_map(config).capacity(0)
    assert plan.num_blocks == pytest.approx(2 * usual.num_blocks, abs=2)
    assert plan.outside[0].kv_bytes_per_token == KV_PER_TOKEN // 2
    assert plan.npu_bytes_per_block == 16 * KV_PER_TOKEN // 2


def test_kv_in_cpu_memory_is_bounded_by_it_and_halved_by_fp8() -> None:
    config = with_memory(16, instance(placement={"default": {"kv_loc": "cpu"}}))
    assert memory_map(config).capacity(0).num_blocks == 16 * GIB // (16 * KV_PER_TOKEN)
    assert memory_map(config, kv_cache_dtype="fp8").capacity(0).num_blocks == 16 * GIB // (8 * KV_PER_TOKEN)


def test_instances_split_what_weights_leave_of_a_memory() -> None:
    kv = instance(placement={"default": {"kv_loc": "cpu"}})
    weights = instance(placement={"blocks": [{"blocks": "0-9", "weights": "cpu"}], "default": {}})
    made = memory_map(with_memory(16, kv, weights, kv))
    room = (16 * GIB - 10 * BLOCK) // 2
    assert [made.capacity(index).num_blocks for index in (0, 2)] == [room // (16 * KV_PER_TOKEN)] * 2


def test_instances_that_read_the_same_memory_split_its_bandwidth() -> None:
    kv = instance(placement={"default": {"kv_loc": "cpu"}})
    ports = memory_map(with_memory(64, kv, kv)).ports(0)
    assert (ports["cpu"].bandwidth_gbs, ports["cpu"].latency_ns) == (128, 100)
    assert ports["npu"].bandwidth_gbs == 1597


def test_two_ranks_keep_their_weights_in_one_memory() -> None:
    one = memory_map(placed({"default": {"weights": "cpu"}})).capacity(0)
    two = memory_map(placed({"default": {"weights": "cpu"}}, keys={"num_npus": 2, "tp_size": 2})).capacity(0)
    norms = 2 * (2 * 32 + 1) * 4096  # each rank has them whole
    assert two.outside[0].weight_bytes == one.outside[0].weight_bytes + norms
    assert one.outside[0].weight_bytes == weight_bytes_per_npu(load_model(LLAMA), "bfloat16")


def test_tied_weights_are_kept_once() -> None:
    rules = {"default": {}, "layers": {"embedding": {"weights": "cxl:2"}}}
    resident = memory_map(placed(rules, keys={"model_name": "Qwen/Qwen3-0.6B"})).resident(0)
    assert resident is not None
    vocabulary = 2 * 151936 * 1024
    [head] = [layer for layer in resident.stages[0] if layer.name == "lm_head"]
    assert (head.place, head.stored_bytes, head.read_bytes) == ("cxl:2", 0, vocabulary)
    assert resident.elsewhere["cxl:2"] == (vocabulary, 0)


def test_every_device_must_hold_the_weights_put_on_it() -> None:
    blocks = [{"blocks": "0-19", "weights": "cxl:0"}, {"blocks": "20-31", "weights": "cxl:1"}]
    two = [instance(placement={"default": {}, "blocks": blocks})] * 2
    with pytest.raises(InputError) as error:
        memory_map(cluster(*two, cxl_mem=CXL))
    assert (
        f"puts {40 * BLOCK} bytes of weights in the CXL device 0, which has {16 * GIB} bytes "
        f"(instance 0 {20 * BLOCK} bytes, instance 1 {20 * BLOCK} bytes)"
    ) in str(error.value)


def test_no_room_for_kv_is_told_with_the_figures() -> None:
    config = with_memory(0.001, instance(placement={"default": {"kv_loc": "cpu"}}))
    with pytest.raises(InputError) as error:
        memory_map(config).capacity(0)
    assert f"in cpu: of {int(0.001 * GIB)} bytes" in str(error.value)
    assert f"blocks of {16 * KV_PER_TOKEN} bytes" in str(error.value)


def test_a_layer_that_the_model_does_not_have_is_told() -> None:
    with pytest.raises(
        InputError, match=r"placement\.layers\.lmhead: llama has no such layer; did you mean 'lm_head'"
    ):
        memory_map(placed({"layers": {"lmhead": {"weights": "cpu"}}}))


def pim_node(size: float, *instances: dict[str, Any]) -> dict[str, Any]:
    return with_memory(size, *instances, pim_config="DDR4_8GB_3200")


def test_pim_holds_the_kv_cache() -> None:
    made = memory_map(pim_node(64, instance(enable_attn_offloading=True)))
    plan = made.capacity(0)
    assert plan.num_blocks == 64 * GIB // (16 * KV_PER_TOKEN)
    assert plan.kv_bytes == 0
    assert made.channels(0) == 8
    assert made.ports(0)["pim"].bandwidth_gbs == pytest.approx(8 * 25.6)


def test_instances_split_the_channels_of_their_node() -> None:
    offloads = instance(enable_attn_offloading=True)
    made = memory_map(pim_node(64, offloads, instance(), offloads))
    assert (made.channels(0), made.channels(2)) == (4, 4)


def test_pim_with_fewer_channels_than_ranks_is_told() -> None:
    made = memory_map(pim_node(8, instance(enable_attn_offloading=True, num_npus=2, tp_size=2)))
    with pytest.raises(
        InputError, match="8 GB of DDR4_8GB_3200 are 1 channels of 8 GB, too few for 1 instances"
    ):
        made.channels(0)


def test_offloading_attention_needs_pim() -> None:
    with pytest.raises(InputError, match=r"needs memory that computes; set nodes.0.\.cpu_mem.pim_config"):
        memory_map(cluster(instance(enable_attn_offloading=True)))


def test_kv_placed_elsewhere_and_in_pim_is_told() -> None:
    both = instance(enable_attn_offloading=True, placement={"default": {"kv_loc": "cxl:0"}})
    with pytest.raises(InputError, match="keeps the KV cache in PIM memory"):
        memory_map({**pim_node(64, both), "cxl_mem": CXL})


def _evicted_to(placement: dict[str, Any] | None) -> str:
    [(_, spec)] = load_cluster(cluster(instance(**({"placement": placement} if placement else {})))).instances
    eight = load_model(LLAMA).model_copy(update={"num_hidden_layers": 8})
    return evict_place(spec, eight, "here")


@pytest.mark.parametrize(
    "placement",
    [
        {"default": {"kv_evict_loc": "cpu"}},
        {"blocks": [{"blocks": "0-3", "kv_evict_loc": "cpu"}, {"blocks": "4-7", "kv_evict_loc": "cpu"}]},
        {"layers": {"attention": {"kv_evict_loc": "cpu"}}},
        {"default": {"kv_evict_loc": "npu"}, "blocks": [{"blocks": "0-7", "kv_evict_loc": "cpu"}]},
    ],
)
def test_evicted_kv_goes_to_one_place(placement: dict[str, Any]) -> None:
    assert _evicted_to(placement) == "cpu"


def test_evicted_kv_is_dropped_unless_a_rule_keeps_it() -> None:
    assert _evicted_to(None) == "npu"
    assert _evicted_to({"layers": {"o_proj": {"kv_evict_loc": "cpu"}}}) == "npu"


@pytest.mark.parametrize(
    ("default", "told"),
    [({"kv_evict_loc": "cpu"}, "'cpu' for block 0 and 'npu' for block 2"), ({}, "'npu' for block 3")],
)
def test_evicted_kv_cannot_be_scattered(default: dict[str, str], told: str) -> None:
    blocks = {"blocks": "2-3" if default else "0-2", "kv_evict_loc": "npu" if default else "cpu"}
    with pytest.raises(InputError, match=rf"here\.placement: kv_evict_loc: is .*{told}; evicted KV is kept"):
        _evicted_to({"default": default, "blocks": [blocks]})
