"""Flags, defaults, and which of flag and cluster config wins."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest

from servesim.errors import InputError
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_changes import with_options
from servesim.specs.engine_options import EngineOptions
from servesim.specs.flags import flag_name, flag_of
from servesim.specs.instance_options import InstanceOptions, resolve
from servesim.specs.model import load_model
from servesim.specs.options import (
    RuntimeOptions,
    add_arguments,
    from_namespace,
)
from servesim.specs.validation import UNLIMITED
from tests.specs.clusters import cluster, instance, npu_mem

DOCUMENTED_DEFAULTS = {
    "cluster_config": "configs/cluster/single_node_single_instance.json",
    "dataset": "workloads/example_trace.jsonl",
    "output": None,
    "num_reqs": 0,
    "dtype": None,
    "kv_cache_dtype": "auto",
    "kv_cache_dtype_skip_layers": None,
    "block_size": 16,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "long_prefill_token_threshold": 0,
    "enable_chunked_prefill": True,
    "npu_memory_utilization": 0.9,
    "reserve_full_isl": True,
    "enable_prefix_caching": True,
    "disable_hybrid_kv_cache_manager": False,
    "enable_prefix_sharing": False,
    "prefix_storage": None,
    "request_routing_policy": "LOAD",
    "expert_routing_policy": "BALANCED",
    "enable_local_offloading": False,
    "enable_attn_offloading": False,
    "enable_sub_batch_interleaving": False,
    "enable_block_copy": True,
    "async_scheduling": True,
    "scheduling_policy": "fcfs",
    "skip_prefill": False,
    "max_concurrency": 0,
    "request_rate": None,
    "seed": 42,
    "log_interval": 1.0,
    "log_level": "WARNING",
    "summary": None,
    "timeline": None,
    "steps": None,
    "run_id": None,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(made)
    return made


def parsed(*arguments: str) -> RuntimeOptions:
    return from_namespace(parser().parse_args(arguments))


def resolved(options: RuntimeOptions | None = None, **changes: Any) -> InstanceOptions:
    [(_, spec)] = load_cluster(cluster(instance(**changes))).instances
    return resolve(options or RuntimeOptions(), spec, load_model(spec.model_name))


def test_the_documented_defaults() -> None:
    options = RuntimeOptions()
    assert {name: getattr(options, name) for name in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS


def test_no_arguments_are_the_defaults() -> None:
    assert parsed() == RuntimeOptions()
    assert parsed().model_fields_set == set()


def test_every_option_has_a_flag_with_help() -> None:
    text = parser().format_help()
    for name, field in RuntimeOptions.model_fields.items():
        flag = flag_of(field)
        assert flag is not None, name
        assert flag.help
        assert flag.hidden is (flag_name(name) not in text)


@pytest.mark.parametrize(
    "line",
    [
        "(default: 16, or more where",
        "(default: 2048)",
        "(default: auto =",
        "(default: on)",
        "(default: 0 = all)",
        "(default: LOAD)",
    ],
)
def test_help_shows_the_defaults(line: str) -> None:
    assert line in " ".join(parser().format_help().split())


def test_the_documented_command_line() -> None:
    options = parsed(
        *("--cluster-config", "configs/cluster/single_node_single_instance.json", "--dtype", "bfloat16"),
        *("--kv-cache-dtype", "fp8", "--block-size", "16", "--dataset", "workloads/example_trace.jsonl"),
        *("--output", "outputs/fp8_kv_run.csv", "--log-interval", "1.0"),
    )
    assert (options.dtype, options.kv_cache_dtype, options.block_size) == ("bfloat16", "fp8", 16)
    assert (options.output, options.log_interval) == ("outputs/fp8_kv_run.csv", 1.0)


@pytest.mark.parametrize("name", ["enable_chunked_prefill", "reserve_full_isl", "enable_prefix_caching"])
def test_what_is_on_can_be_turned_off(name: str) -> None:
    off = "--no-" + flag_name(name).removeprefix("--")
    assert getattr(parsed(off), name) is False
    assert getattr(parsed(off, flag_name(name)), name) is True  # the last one wins


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--no-itl", "itl", False),
        ("--no-cudagraph", "cudagraph", False),
        ("--no-async-scheduling", "async_scheduling", False),
        ("--no-enable-block-copy", "enable_block_copy", False),
        ("--lenient", "lenient", True),
        ("--stepped", "stepped", True),
        ("--skip-prefill", "skip_prefill", True),
        ("--enable-prefix-sharing", "enable_prefix_sharing", True),
    ],
)
def test_a_switch_changes_its_option(flag: str, name: str, value: bool) -> None:
    assert getattr(RuntimeOptions(), name) is not value
    assert getattr(parsed(flag), name) is value


@pytest.mark.parametrize("alias", ["fp8_e4m3", "fp8_e5m2"])
def test_both_fp8_formats_are_fp8(alias: str) -> None:
    assert parsed("--kv-cache-dtype", alias).kv_cache_dtype == "fp8"
    assert RuntimeOptions(kv_cache_dtype=alias).kv_cache_dtype == "fp8"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--gpu-memory-utilization", "0.8"], "npu_memory_utilization", 0.8),
        (["--tensor-parallel-size", "2"], "tp", 2),
        (["-tp", "2"], "tp", 2),
        (["--pipeline-parallel-size", "2"], "pp", 2),
        (["-pp", "2"], "pp", 2),
        (["--data-parallel-size", "2"], "dp", 2),
        (["-dp", "2"], "dp", 2),
        (["--num-gpu-blocks-override", "900"], "num_gpu_blocks", 900),
        (["--enforce-eager"], "cudagraph", False),
        (["--scheduler-reserve-full-isl"], "reserve_full_isl", True),
        (["--no-scheduler-reserve-full-isl"], "reserve_full_isl", False),
        (["--kv-cache-dtype", "fp8_inc"], "kv_cache_dtype", "fp8"),
        (["--kv-cache-dtype", "bfloat16"], "kv_cache_dtype", "bfloat16"),
    ],
)
def test_names_of_the_real_engine_are_accepted(words: list[str], name: str, value: object) -> None:
    options = parsed(*words)
    assert getattr(options, name) == value
    assert options.model_fields_set == {name}


def test_their_names_are_keys_of_python_too() -> None:
    values: dict[str, Any] = {"gpu_memory_utilization": 0.8, "enforce_eager": True, "tensor_parallel_size": 2}
    options = RuntimeOptions(**values)
    assert (options.npu_memory_utilization, options.cudagraph, options.tp) == (0.8, False, 2)
    assert options.model_fields_set == {"npu_memory_utilization", "cudagraph", "tp"}


def test_their_names_are_keys_of_an_instance_too() -> None:
    values: dict[str, Any] = {"gpu_memory_utilization": 0.8, "enforce_eager": True}
    own = resolved(RuntimeOptions(), **values, num_gpu_blocks_override=900)
    assert (own.npu_memory_utilization, own.cudagraph, own.num_gpu_blocks) == (0.8, False, 900)
    degrees = instance(num_npus=..., tp_size=..., tensor_parallel_size=2, pipeline_parallel_size=2)
    [(_, spec)] = load_cluster(cluster(degrees)).instances
    assert (spec.tp_size, spec.pp_size, spec.num_npus) == (2, 2, 4)


@pytest.mark.parametrize(
    "keys",
    [
        {"gpu_memory_utilization": 0.8, "npu_memory_utilization": 0.8},
        {"npu_memory_utilization": 0.8, "npu_mem": npu_mem(mem_util=0.8)},
        {"tensor_parallel_size": 1},
        {"enforce_eager": True, "cudagraph": True},
    ],
)
def test_one_thing_under_two_names_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="keep one"):
        load_cluster(cluster(instance(**keys)))


def test_pipeline_stages_of_every_instance() -> None:
    [(_, spec)] = with_options(load_cluster(cluster()), RuntimeOptions(pp=2, tp=2)).instances
    assert (spec.tp_size, spec.pp_size, spec.num_npus) == (2, 2, 4)


def test_copies_side_by_side_once() -> None:
    options = RuntimeOptions(dp=3)
    made = with_options(load_cluster(cluster(instance(), instance(block_size=32))), options)
    assert [spec.block_size for _, spec in made.instances] == [None] * 3 + [32] * 3
    assert made.nodes[0].num_instances == 6
    assert with_options(made, options) == made
    assert with_options(load_cluster(cluster()), RuntimeOptions(dp=1)) == load_cluster(cluster())


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (cluster(instance(model_name="mistralai/Mixtral-8x7B-v0.1")), "expert layers"),
        (cluster(instance(dp_group="a"), instance(dp_group="a")), "dp_group already"),
    ],
)
def test_copies_that_need_more_said(described: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        with_options(load_cluster(described), RuntimeOptions(dp=3))


def test_a_custom_policy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="SERVESIM_ROUTING_POLICY=module:callable"):
        RuntimeOptions(request_routing_policy="CUSTOM")
    with pytest.raises(InputError, match="SERVESIM_EXPERT_POLICY=module:callable"):
        RuntimeOptions(expert_routing_policy="CUSTOM")
    monkeypatch.setenv("SERVESIM_ROUTING_POLICY", "my.module:route")
    assert RuntimeOptions(request_routing_policy="CUSTOM").request_routing_policy == "my.module:route"
    monkeypatch.setenv("SERVESIM_ROUTING_POLICY", "no callable")
    with pytest.raises(InputError, match="'no callable' is not allowed"):
        RuntimeOptions(request_routing_policy="CUSTOM")


def test_no_lower_tier_can_be_said_in_words() -> None:
    assert parsed("--prefix-storage", "None").prefix_storage is None
    assert parsed("--prefix-storage", "CXL").prefix_storage == "CXL"


def test_all_requests_at_once() -> None:
    assert parsed("--request-rate", "inf").request_rate == math.inf


def test_a_policy_of_ones_own() -> None:
    assert parsed("--request-routing-policy", "my.module:route").request_routing_policy == "my.module:route"


def test_a_command_may_take_some_flags_only() -> None:
    made = argparse.ArgumentParser()
    add_arguments(made, only=["block_size", "seed"], exclude=["seed"])
    assert from_namespace(made.parse_args(["--block-size", "8"]), seed=7) == RuntimeOptions(
        block_size=8, seed=7
    )
    with pytest.raises(SystemExit):
        made.parse_args(["--seed", "1"])


def test_changing_options_keeps_what_was_set() -> None:
    options = parsed("--block-size", "32").replace(kv_cache_dtype="fp8")
    assert options == RuntimeOptions(block_size=32, kv_cache_dtype="fp8")
    assert options.model_fields_set == {"block_size", "kv_cache_dtype"}


# --- what holds for an instance --------------------------------------------------------------------


def test_the_flag_holds_where_the_instance_is_silent() -> None:
    assert resolved(RuntimeOptions(block_size=32)).block_size == 32


def test_the_instance_wins_over_the_flag() -> None:
    options = RuntimeOptions(block_size=32, enable_prefix_caching=True, kv_cache_dtype="fp8")
    own = resolved(options, block_size=64, enable_prefix_caching=False, kv_cache_dtype="auto")
    assert (own.block_size, own.enable_prefix_caching, own.variant) == (64, False, "bf16")


@pytest.mark.parametrize("name", list(EngineOptions.model_fields))
def test_each_per_instance_option_reaches_the_instance(name: str) -> None:
    other: dict[str, Any] = {
        "dtype": "fp8",
        "kv_cache_dtype": "fp8",
        "kv_cache_dtype_skip_layers": "0,1",
        "block_size": 32,
        "enable_sub_batch_interleaving": False,
        "npu_memory_utilization": 0.5,
        "num_gpu_blocks": 900,
        "max_model_len": 4096,
        "scheduling_policy": "priority",
        "max_num_active_seqs": 5,
        "max_num_scheduled_tokens": 300,
        "watermark": 0.1,
        "dcp_comm_backend": "a2a",
        "kv_load": "async",
    }
    degree = {"tp_size": 16, "num_npus": 16} if name == "decode_context_parallel_size" else {}
    value = other.get(name)
    if value is None:
        default = getattr(RuntimeOptions(), name)
        value = not default if isinstance(default, bool) else default + 1
    assert getattr(resolved(**{name: value}, **degree), name) == value
    assert getattr(resolved(RuntimeOptions(**{name: value}), **degree), name) == value


def test_memory_share_of_the_instance_wins_over_the_flag() -> None:
    options = RuntimeOptions(npu_memory_utilization=0.5)
    assert resolved(options).npu_memory_utilization == 0.5
    assert resolved(options, npu_mem=npu_mem(mem_util=0.8)).npu_memory_utilization == 0.8


def test_zero_means_no_limit() -> None:
    own = resolved(RuntimeOptions(max_num_seqs=0, long_prefill_token_threshold=0))
    assert own.max_num_seqs == UNLIMITED
    assert own.long_prefill_token_threshold == UNLIMITED


def test_a_budget_of_zero_is_the_models_context() -> None:
    own = resolved(RuntimeOptions(max_num_batched_tokens=0))
    assert own.max_num_batched_tokens == own.max_model_len == 131072


def test_fp8_kv_changes_the_variant_and_the_cache_not_the_weights() -> None:
    own = resolved(RuntimeOptions(kv_cache_dtype="fp8"))
    assert (own.dtype, own.kv_dtype, own.variant) == ("bfloat16", "fp8", "bf16-kvfp8")


def test_fp8_weights_alone_keep_a_bf16_cache() -> None:
    own = resolved(RuntimeOptions(dtype="fp8"))
    assert (own.dtype, own.kv_cache_dtype, own.kv_dtype, own.variant) == ("fp8", "auto", "bfloat16", "fp8")


def test_without_a_dtype_the_model_decides() -> None:
    model = load_model("meta-llama/Llama-3.1-8B").model_copy(update={"torch_dtype": "float16"})
    [(_, spec)] = load_cluster(cluster()).instances
    assert resolve(RuntimeOptions(), spec, model).variant == "fp16"
