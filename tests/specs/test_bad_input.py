"""Everything a user can get wrong in a cluster, a model, a hardware file, an architecture or an option.

Each case: what is wrong, and the words the message must hold (where it is, what is allowed or what to do).
The message must be an InputError (exit status 2) whose first line tells the whole story of the first problem.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from servesim.errors import InputError
from servesim.specs.architecture import load_architecture, read_architecture
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions, add_arguments, from_namespace
from tests.specs.clusters import cluster, instance, model_config, node, npu_mem, power

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


def assert_told_well(error: InputError, where: str, *words: str) -> None:
    """One message: the place first, then what is wrong, all of it on the first line."""
    message = str(error)
    first = message.splitlines()[0]
    assert error.exit_status == 2
    assert first.startswith(where), message
    for word in words:
        assert word in first, message
    assert len(first) < 1000
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert "For further information" not in message


# --- files that are no cluster at all: content, then what the message holds after the file's path --

TEXT = json.dumps(cluster(), indent=2).encode()
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("line 1", "empty")),
    "blank file": (b" \n\n ", ("line 1", "empty")),
    "truncated": (TEXT[: len(TEXT) // 2], ("line ", "column", "not valid JSON", "cut short")),
    "comma too many": (b'{\n  "num_nodes": 1,\n}', ("line 3 column 1", "not valid JSON")),
    "single quotes": (b"{'num_nodes': 1}", ("line 1 column 2", "not valid JSON")),
    "comment": (b'{\n  "num_nodes": 1  # one\n}', ("line 2", "not valid JSON")),
    "text after the object": (TEXT + b"\n}", ("not valid JSON", "Extra data")),
    "not UTF-8": (b'{\n "num_nodes": "\xff"}', ("line 2", "0xff", "UTF-8")),
    "UTF-16": (json.dumps(cluster()).encode("utf-16"), ("line 1", "UTF-8")),
    "list instead of object": (b"[1, 2]", ("line 1", "a list", "JSON object")),
    "number instead of object": (b"7", ("line 1", "JSON object")),
    "null": (b"null", ("line 1", "nothing", "JSON object")),
    "repeated key": (
        b'{"num_nodes": 1,\n "link_bw": 1,\n "num_nodes": 2}',
        ("line 3", '"num_nodes"', "twice"),
    ),
    "NaN": (TEXT.replace(b"1597", b"NaN"), ("line ", "NaN is not allowed", "finite")),
    "Infinity": (TEXT.replace(b"1597", b"-Infinity"), ("line ", "-Infinity is not allowed", "finite")),
    "number beyond float": (
        TEXT.replace(b"1597", b"1e999"),
        ("nodes[0].instances[0].npu_mem.mem_bw", "finite"),
    ),
    "integer of 5000 digits": (TEXT.replace(b"1597", b"9" * 5000), ("line 1", "digits")),
    "nested without end": (b"[" * 200_000, ("line 1", "nested too deeply")),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_no_cluster_is_told_with_its_line(case: str, tmp_path: Path) -> None:
    content, words = FILES[case]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert_told_well(caught.value, f"{path}: ", *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [("", ("folder",)), ("missing.json", ("no such cluster config",)), ("n" * 500, ("no such",))],
    ids=["a folder", "missing", "a name no file system takes"],
)
def test_path_that_is_no_file(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_cluster(tmp_path / name)
    assert_told_well(caught.value, str(tmp_path), *words)


# --- clusters: a config, then the field path and what the message holds ----------------------------

HERE = "nodes[0].instances[0]"
CLUSTERS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "key missing": (cluster(link_bw=...), "link_bw", ("is missing", "required")),
    "unknown key": (cluster(link_bandwith=1), "link_bandwith", ("unknown key", "'link_bw'")),
    "unknown key like no other": (cluster(zzz=1), "zzz", ("unknown key", "known: num_nodes, link_bw")),
    "misspelt required key": (
        cluster(instance(npu_mem=..., npu_memm=npu_mem())),
        f"{HERE}.npu_memm",
        ("unknown key", "'npu_mem'"),
    ),
    "misspelt degree": (
        cluster(instance(num_npus=..., tp_size=..., tp_sise=1)),
        f"{HERE}.tp_sise",
        ("unknown key", "'tp_size'"),
    ),
    "degree run together": (
        cluster(instance(num_npus=..., tp_size=..., tpsize=1)),
        f"{HERE}.tpsize",
        ("unknown key", "'tp_size'"),
    ),
    "unknown deep key": (
        cluster(instance(npu_mem=npu_mem(mem_utilization=0.9))),
        f"{HERE}.npu_mem.mem_utilization",
        ("unknown key", "'mem_util'"),
    ),
    "text for a whole number": (
        cluster(num_nodes="1"),
        "num_nodes",
        ('"1" is not allowed', "a whole number"),
    ),
    "true for a whole number": (
        cluster(num_nodes=True),
        "num_nodes",
        ("true is not allowed", "a whole number"),
    ),
    "fraction for a whole number": (
        cluster(num_nodes=1.5),
        "num_nodes",
        ("1.5 is not allowed", "a whole number"),
    ),
    "null for a number": (cluster(num_nodes=None), "num_nodes", ("null is not allowed", "a whole number")),
    "text for a number": (
        cluster(link_latency="fast"),
        "link_latency",
        ('"fast" is not allowed', "a number"),
    ),
    "true for a number": (cluster(link_bw=True), "link_bw", ("true is not allowed", "a number")),
    "object for a number": (cluster(link_bw={"tp": 1}), "link_bw", ("is not allowed", "a number")),
    "negative size": (
        cluster(instance(npu_mem=npu_mem(mem_size=-3))),
        f"{HERE}.npu_mem.mem_size",
        ("-3 is not allowed", "must be >= 1e-06 GB"),
    ),
    "no bandwidth": (cluster(link_bw=0), "link_bw", ("0 is not allowed", "must be >= 1e-06 GB/s")),
    "one of the bandwidths negative": (
        cluster(link_bw=[16, -1]),
        "link_bw[1]",
        ("-1 is not allowed", "must be >= 1e-06 GB/s"),
    ),
    "no bandwidth at all": (cluster(link_bw=[]), "link_bw", ("at least 1",)),
    "negative latency": (cluster(link_latency=-1), "link_latency", ("must be >= 0 ns",)),
    "huge whole number": (cluster(num_nodes=10**30), "num_nodes", ("is not allowed", "must be")),
    "huge size": (
        cluster(instance(npu_mem=npu_mem(mem_size=10**40))),
        f"{HERE}.npu_mem.mem_size",
        ("is not allowed", "must be <= 1e+06 GB"),
    ),
    "NaN from Python": (cluster(link_bw=float("nan")), "link_bw", ("NaN is not allowed", "finite")),
    "inf from Python": (cluster(link_latency=float("inf")), "link_latency", ("finite",)),
    "share above one": (
        cluster(instance(npu_mem=npu_mem(mem_util=1.1))),
        f"{HERE}.npu_mem.mem_util",
        ("1.1 is not allowed", "<= 1"),
    ),
    "share of nothing": (
        cluster(instance(npu_mem=npu_mem(mem_util=0))),
        f"{HERE}.npu_mem.mem_util",
        ("must be >= 1e-06",),
    ),
    "negative reserve": (
        cluster(instance(npu_mem=npu_mem(reserve=-1))),
        f"{HERE}.npu_mem.reserve",
        ("must be >= 0 GB",),
    ),
    "nodes is an object": (cluster(nodes={}), "nodes", ("{} is not allowed", "a list")),
    "no nodes": (cluster(nodes=[]), "nodes", ("at least 1",)),
    "no instances": (cluster(nodes=[node(instances=[])]), "nodes[0].instances", ("at least 1",)),
    "instance is a text": (cluster(nodes=[node(instances=["a"])]), f"{HERE}", ('"a"', "an object")),
    "node count differs": (cluster(num_nodes=2), "num_nodes", ("2 is not allowed", "must be 1")),
    "instance count differs": (
        cluster(nodes=[node(num_instances=3)]),
        "nodes[0].num_instances",
        ("3 is not allowed", "must be 1"),
    ),
    "degrees disagree": (
        cluster(instance(num_npus=4, tp_size=2)),
        f"{HERE}.num_npus",
        ("4 is not allowed", "must be 2 = tp_size 2 * pp_size 1"),
    ),
    "NPUs not a multiple of the stages": (
        cluster(instance(num_npus=3, tp_size=..., pp_size=2)),
        f"{HERE}.num_npus",
        ("3 is not allowed",),
    ),
    "no degree": (
        cluster(instance(num_npus=..., tp_size=...)),
        HERE,
        ("num_npus or tp_size is missing",),
    ),
    "degree of zero": (
        cluster(instance(num_npus=..., tp_size=0)),
        f"{HERE}.tp_size",
        ("0 is not allowed", "must be >= 1"),
    ),
    "role missing": (cluster(instance(pd_type=...)), f"{HERE}.pd_type", ("is missing",)),
    "unknown role": (
        cluster(instance(pd_type="prefil")),
        f"{HERE}.pd_type",
        ('"prefil" is not allowed', "prefill, decode", "did you mean 'prefill'"),
    ),
    "prefill alone": (
        cluster(instance(pd_type="prefill")),
        f"{HERE}.pd_type",
        ("needs a 'decode' instance",),
    ),
    "decode alone": (cluster(instance(pd_type="decode")), f"{HERE}.pd_type", ("needs a 'prefill' instance",)),
    "prefill of one model, decode of another": (
        cluster(instance(pd_type="prefill"), instance(pd_type="decode", model_name="Qwen/Qwen3-8B")),
        f"{HERE}.pd_type",
        ("needs a 'decode' instance of meta-llama/Llama-3.1-8B",),
    ),
    "roles mixed with none": (
        cluster(instance(pd_type="prefill"), instance(pd_type="decode"), instance()),
        "nodes[0].instances[2].pd_type",
        ("null is not allowed",),
    ),
    "group of two models": (
        cluster(instance(dp_group="A"), instance(dp_group="A", model_name="Qwen/Qwen3-8B")),
        "nodes[0].instances[1].model_name",
        ("'Qwen/Qwen3-8B' is not allowed", "'meta-llama/Llama-3.1-8B'", "dp_group 'A'"),
    ),
    "group of two degrees": (
        cluster(instance(dp_group="A"), instance(dp_group="A", num_npus=2, tp_size=2)),
        "nodes[0].instances[1].tp_size",
        ("2 is not allowed", "must be 1"),
    ),
    "hardware with a slash": (cluster(instance(hardware="../x")), f"{HERE}.hardware", ("is not allowed",)),
    "model of two lines": (cluster(instance(model_name="a\nb")), f"{HERE}.model_name", ("one line",)),
    "nameless model": (cluster(instance(model_name="")), f"{HERE}.model_name", ("not empty",)),
    "bad per-instance dtype": (
        cluster(instance(dtype="bf16")),
        f"{HERE}.dtype",
        ('"bf16" is not allowed', "bfloat16"),
    ),
    "bad per-instance KV dtype": (
        cluster(instance(kv_cache_dtype="fp4")),
        f"{HERE}.kv_cache_dtype",
        ("auto, bfloat16, float16, fp8",),
    ),
    "bad per-instance block size": (
        cluster(instance(block_size=0)),
        f"{HERE}.block_size",
        ("0 is not allowed", ">= 1 tokens"),
    ),
    "option that no instance has": (cluster(instance(seed=1)), f"{HERE}.seed", ("unknown key",)),
    "one block is the null block": (
        cluster(instance(num_gpu_blocks=1)),
        f"{HERE}.num_gpu_blocks",
        (">= 2 blocks",),
    ),
    "engine typo": (
        cluster(instance(engine={"prefil_step_overhead_us": 1})),
        f"{HERE}.engine.prefil_step_overhead_us",
        ("unknown key", "'prefill_step_overhead_us'"),
    ),
    "placement nowhere": (
        cluster(instance(placement={"default": {"weights": "disk"}})),
        f"{HERE}.placement.default.weights",
        ('"disk" is not allowed', "npu, cpu or cxl:<device>"),
    ),
    "placement range backwards": (
        cluster(instance(placement={"blocks": [{"blocks": "3-1", "weights": "cpu"}]})),
        f"{HERE}.placement.blocks[0].blocks",
        ("runs backwards",),
    ),
    "placement typo": (
        cluster(instance(placement={"layers": {"lm_head": {"weight": "cpu"}}})),
        f"{HERE}.placement.layers.lm_head.weight",
        ("unknown key", "'weights'"),
    ),
    "negative power": (
        cluster(nodes=[node(power={"base_node_power": -1})]),
        "nodes[0].power.base_node_power",
        ("must be >= 0 W",),
    ),
    "NPU that draws less when it works": (
        cluster(nodes=[node(power=power(active_power=5))]),
        "nodes[0].power.npu.RTXPRO6000.active_power",
        ("5 is not allowed; must be >= 90 W, the standby_power",),
    ),
    "CPU that draws less when it works": (
        cluster(nodes=[node(power={**power(), "cpu": {"idle_power": 9, "active_power": 8}})]),
        "nodes[0].power.cpu.active_power",
        ("8 is not allowed; must be >= 9 W, the idle_power",),
    ),
    "power of other hardware": (
        cluster(nodes=[node(instance(hardware="H100"), power=power())]),
        "nodes[0].power.npu",
        ("has no H100", "described: RTXPRO6000"),
    ),
    "power of PIM that is not there": (
        cluster(nodes=[node(power={**power(), "pim": {"active_power": 8}})]),
        "nodes[0].power.pim",
        ("the node has no PIM",),
    ),
    # Known only from the model:
    "unknown model": (
        cluster(instance(model_name="meta-llama/Llama-3.1-8")),
        f"{HERE}.model_name",
        ("no such model config", "did you mean 'meta-llama/Llama-3.1-8B'"),
    ),
    "more stages than layers": (
        cluster(instance(num_npus=33, tp_size=1, pp_size=33)),
        f"{HERE}.pp_size",
        ("33 is not allowed", "<= 32"),
    ),
    "heads do not divide": (
        cluster(instance(num_npus=3, tp_size=3)),
        f"{HERE}.tp_size",
        ("3 is not allowed", "32 attention heads"),
    ),
    "experts of a dense model": (
        cluster(instance(ep_size=2)),
        f"{HERE}.ep_size",
        ("no experts", "must be 1"),
    ),
    "experts do not divide": (
        cluster(instance(model_name=MIXTRAL, num_npus=4, tp_size=4, ep_size=3)),
        f"{HERE}.ep_size",
        ("3 is not allowed", "8 experts"),
    ),
    "more expert ranks than ranks": (
        cluster(instance(model_name=MIXTRAL, num_npus=2, tp_size=2, ep_size=4)),
        f"{HERE}.ep_size",
        ("4 is not allowed", "<= 2"),
    ),
    "expert ranks that cut across instances": (
        cluster(*[instance(model_name=MIXTRAL, num_npus=4, tp_size=4, ep_size=8, dp_group="A")] * 3),
        f"{HERE}.ep_size",
        ("8 is not allowed", "must divide tp_size 4", "divisor of the 3 members"),
    ),
    "placement on a block too many": (
        cluster(instance(placement={"blocks": [{"blocks": "30-32", "weights": "cpu"}]})),
        f"{HERE}.placement.blocks[0].blocks",
        ("blocks 0 to 31",),
    ),
    "placement without CXL": (
        cluster(instance(placement={"default": {"weights": "cxl:0"}})),
        f"{HERE}.placement.default.weights",
        ("'cxl:0' is not allowed", "no cxl_mem"),
    ),
}


@pytest.mark.parametrize("case", CLUSTERS)
def test_bad_cluster_is_told_with_file_and_field(case: str, tmp_path: Path) -> None:
    config, field, words = CLUSTERS[case]
    with pytest.raises(InputError) as caught:
        check_cluster(load_cluster(config))
    assert_told_well(caught.value, f"cluster: {field}: ", *words)
    if "from Python" in case:
        return  # JSON has no such numbers
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        check_cluster(load_cluster(path))
    assert_told_well(caught.value, f"{path}: {field}: ", *words)


def test_several_problems_come_in_one_message() -> None:
    with pytest.raises(InputError) as caught:
        load_cluster(cluster(num_nodes=0, link_bw=0, link_latency=-1))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["cluster", "  also link_bw", "  also link_latency"]


def test_a_flood_of_problems_is_counted_not_printed() -> None:
    with pytest.raises(InputError, match="and 12 more"):
        load_cluster(cluster(*[instance(block_size=0) for _ in range(20)]))


# --- models ----------------------------------------------------------------------------------------

MODELS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "field missing": (model_config(vocab_size=...), "vocab_size", ("is missing",)),
    "required field misspelt": (
        model_config(hidden_size=..., hiden_size=64),
        "hiden_size",
        ("unknown key", "'hidden_size'"),
    ),
    "optional field misspelt": (
        model_config(tie_word_embedding=True),
        "tie_word_embedding",
        ("unknown key", "'tie_word_embeddings'"),
    ),
    "not a number": (model_config(hidden_size=math.nan), "hidden_size", ("NaN is not allowed",)),
    "endless": (model_config(vocab_size=math.inf), "vocab_size", ("Infinity is not allowed",)),
    "text for a number": (
        model_config(hidden_size="64"),
        "hidden_size",
        ('"64" is not allowed', "a whole number"),
    ),
    "negative layers": (
        model_config(num_hidden_layers=-1),
        "num_hidden_layers",
        ("-1 is not allowed", ">= 1"),
    ),
    "no layers": (model_config(num_hidden_layers=0), "num_hidden_layers", (">= 1",)),
    "no heads": (model_config(num_attention_heads=0), "num_attention_heads", (">= 1",)),
    "huge vocabulary": (model_config(vocab_size=10**25), "vocab_size", ("is not allowed",)),
    "boolean layers": (model_config(num_hidden_layers=True), "num_hidden_layers", ("true is not allowed",)),
    "KV heads do not divide": (model_config(num_key_value_heads=3), "num_key_value_heads", ("must divide",)),
    "no head_dim to derive": (model_config(hidden_size=65), "head_dim", ("is missing", "65")),
    "unknown dtype": (model_config(torch_dtype="float8"), "torch_dtype", ("'float8' is not allowed", "fp8")),
    "number for a dtype": (model_config(torch_dtype=16), "torch_dtype", ("16 is not allowed", "a text")),
    "number for a model type": (model_config(model_type=1), "model_type", ("a text",)),
    "layer types too few": (
        model_config(sliding_window=128, layer_types=["sliding_attention"]),
        "layer_types",
        ("1 entries", "(4)"),
    ),
    "layer type unknown": (
        model_config(layer_types=["linear_attention"] * 4),
        "layer_types[0]",
        ("'linear_attention' is not supported yet",),
    ),
    "window missing": (
        model_config(layer_types=["sliding_attention"] * 4),
        "sliding_window",
        ("is missing",),
    ),
    "window of zero": (model_config(sliding_window=0), "sliding_window", (">= 1",)),
    "more experts chosen than there are": (
        model_config(num_experts=4, num_experts_per_tok=8),
        "num_experts_per_tok",
        ("8 is not allowed", "(4)"),
    ),
    "no experts chosen": (model_config(num_local_experts=4), "num_experts_per_tok", ("0 is not allowed",)),
    "MLA without its rope part": (model_config(kv_lora_rank=512), "qk_rope_head_dim", ("is missing",)),
    "quantised in an unknown way": (
        model_config(quantization_config={"quant_method": "aqlm"}),
        "quantization_config.quant_method",
        ("'aqlm' is not modelled",),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_is_told_with_file_and_field(case: str, tmp_path: Path) -> None:
    config, field, words = MODELS[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert_told_well(caught.value, f"{path}: {field}: ", *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_model_file_that_is_no_object(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert_told_well(caught.value, f"{path}: line 1")


# --- hardware and architecture files ---------------------------------------------------------------

HARDWARE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "empty": ("", "line 1", ("empty",)),
    "only a comment": ("# nothing\n", "line 1", ("nothing is not allowed",)),
    "a list": ("- a\n", "line 1", ("a list", "mapping")),
    "bad YAML": ("gpu: [a\n", "line 2", ("not valid YAML",)),
    "a tab": ("gpu: a\n\tl2_mib: 1\n", "line 2", ("not valid YAML",)),
    "repeated key": ("gpu: a\ngpu: b\n", "line 2", ("'gpu' stands twice",)),
    "typo": ("l2_mb: 128\n", "l2_mb", ("unknown key", "'l2_mib'")),
    "text for a number": ("sm_count: many\n", "sm_count", ('"many" is not allowed', "a whole number")),
    "negative": ("memory_bandwidth_gbs: -1\n", "memory_bandwidth_gbs", ("must be >= 1e-06 GB/s",)),
    "not a number": ("memory_gib: .nan\n", "memory_gib", ("NaN is not allowed",)),
    "engine typo": ("engine:\n  skew: true\n", "engine.skew", ("unknown key", "'skew_in_mixed_steps'")),
    "engine number for a switch": (
        "engine: {skew_in_mixed_steps: 1}\n",
        "engine.skew_in_mixed_steps",
        ("1 is not allowed", "true or false"),
    ),
    "negative host time": (
        "engine: {decode_step_overhead_us: -5}\n",
        "engine.decode_step_overhead_us",
        ("-5 is not allowed", "must be >= 0 us"),
    ),
}


@pytest.mark.parametrize("case", HARDWARE)
def test_bad_hardware_file(case: str, root: Path) -> None:
    content, where, words = HARDWARE[case]
    (root / "configs/hardware").mkdir(parents=True)
    (root / "configs/hardware/X.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        load_hardware("X")
    assert_told_well(caught.value, f"configs/hardware/X.yaml: {where}", *words)


GOOD_ARCHITECTURE = """\
model_type: tiny
sequence:
  prologue: [embedding]
  pre_attn: [qkv_proj]
  post_attn: [o_proj]
  mlp_dense: [down_proj]
  head: [lm_head]
catalog:
  dense: {embedding: {class: E}, qkv_proj: {class: Q}, o_proj: {class: O}, down_proj: {class: D}}
  per_sequence: {lm_head: {class: L}}
  attention: {attention: {class: A}}
"""
ARCHITECTURES: dict[str, tuple[tuple[str, str], str, tuple[str, ...]]] = {
    "layer not in the catalog": (
        ("[o_proj]", "[o_porj]"),
        "sequence.post_attn[0]",
        ("'o_porj' is not in the catalog", "'o_proj'"),
    ),
    "attention listed": (
        ("[qkv_proj]", "[qkv_proj, attention]"),
        "sequence.pre_attn[1]",
        ("'attention'", "by itself"),
    ),
    "no MLP": (("  mlp_dense: [down_proj]\n", ""), "sequence", ("mlp_dense or mlp_moe is missing",)),
    "no head": (("  head: [lm_head]\n", ""), "sequence.head", ("is missing",)),
    "part misspelt": (("prologue:", "prologe:"), "sequence.prologe", ("unknown key", "'prologue'")),
    "no class": (("{class: Q}", "{}"), "catalog.dense.qkv_proj.class", ("is missing",)),
    "entry misspelt": (
        ("{class: Q}", "{class: Q, tp_stabel: true}"),
        "catalog.dense.qkv_proj.tp_stabel",
        ("unknown key", "'tp_stable'"),
    ),
    "two attentions": (
        ("{attention: {class: A}}", "{a: {class: A}, b: {class: B}}"),
        "catalog.attention",
        ("2 layers",),
    ),
    "layer in two tables": (
        ("{lm_head:", "{embedding: {class: E}, lm_head:"),
        "catalog",
        ("two of its tables",),
    ),
    "head layer in a block": (("[o_proj]", "[lm_head]"), "sequence.post_attn[0]", ("belongs to head",)),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_bad_architecture_file(case: str, tmp_path: Path) -> None:
    (old, new), field, words = ARCHITECTURES[case]
    path = tmp_path / "tiny.yaml"
    assert GOOD_ARCHITECTURE.count(old) == 1
    path.write_text(GOOD_ARCHITECTURE.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_architecture(path)
    assert_told_well(caught.value, f"{path}: {field}: ", *words)


def test_the_architecture_the_cases_spoil_is_good(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD_ARCHITECTURE)
    assert read_architecture(path).block_layers(moe=False) == ["qkv_proj", "attention", "o_proj", "down_proj"]


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        load_architecture("lama")
    assert_told_well(caught.value, "profiler/models/lama.yaml: ", "no such architecture", "'llama'")


# --- options ---------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "block of nothing": (["--block-size", "0"], "--block-size", ("0 is not allowed", ">= 1 tokens")),
    "negative sequences": (["--max-num-seqs", "-1"], "--max-num-seqs", ("-1 is not allowed", ">= 0")),
    "huge budget": (
        ["--max-num-batched-tokens", str(10**20)],
        "--max-num-batched-tokens",
        ("is not allowed",),
    ),
    "share of zero": (["--npu-memory-utilization", "0"], "--npu-memory-utilization", ("must be >= 1e-06",)),
    "share above one": (["--npu-memory-utilization", "1.5"], "--npu-memory-utilization", ("must be <= 1",)),
    "share of NaN": (
        ["--npu-memory-utilization", "nan"],
        "--npu-memory-utilization",
        ("NaN is not allowed",),
    ),
    "rate of zero": (["--request-rate", "0"], "--request-rate", ("must be >= 1e-09 req/s",)),
    "rate of NaN": (["--request-rate", "nan"], "--request-rate", ("NaN is not allowed",)),
    "no interval": (["--log-interval", "0"], "--log-interval", ("must be >= 1e-06 s",)),
    "endless interval": (["--log-interval", "inf"], "--log-interval", ("is not allowed",)),
    "negative seed": (["--seed", "-1"], "--seed", (">= 0",)),
    "unknown policy": (
        ["--request-routing-policy", "LOD"],
        "--request-routing-policy",
        ("LOAD, RR, RAND, PREFIX",),
    ),
    "custom without a callable": (
        ["--request-routing-policy", "CUSTOM"],
        "--request-routing-policy",
        ("module:call",),
    ),
    "expert policy": (["--expert-routing-policy", "a:b:c"], "--expert-routing-policy", ("BALANCED",)),
    "run id with a slash": (["--run-id", "../x"], "--run-id", ("letters, digits",)),
    "no output": (["--output", ""], "--output", ("not empty",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option_is_told_with_its_flag(case: str) -> None:
    arguments, flag, words = OPTIONS[case]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(InputError) as caught:
        from_namespace(parser.parse_args(arguments))
    assert_told_well(caught.value, f"{flag}: ", *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "bf16"],
        ["--kv-cache-dtype", "fp4"],
        ["--block-size", "8.0"],
        ["--seed", "x"],
        ["--blok-size", "8"],
    ],
)
def test_word_the_parser_refuses_ends_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_bad_option_from_python_is_an_input_error() -> None:
    with pytest.raises(InputError) as caught:
        RuntimeOptions(block_size=0)
    assert_told_well(caught.value, "options: block_size: ", "0 is not allowed")
    with pytest.raises(InputError, match="did you mean 'block_size'"):
        RuntimeOptions(blocksize=16)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="must be >= 1"):
        RuntimeOptions().replace(block_size=0)


def test_interleaving_halves_needs_offloaded_attention() -> None:
    loaded = load_cluster(cluster(instance(enable_sub_batch_interleaving=True)))
    model = check_cluster(loaded)["meta-llama/Llama-3.1-8B"]
    with pytest.raises(InputError, match="--enable-sub-batch-interleaving: needs --enable-attn-offloading"):
        resolve(RuntimeOptions(), loaded.instances[0][1], model)


@pytest.mark.parametrize("load", [load_cluster, load_model])
def test_a_folder_without_a_config_is_no_input(load: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
