"""Flags, defaults, and which of flag and cluster config wins."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest

from servesim.specs.cluster import load_cluster
from servesim.specs.flags import flag_name, flag_of
from servesim.specs.model import load_model
from servesim.specs.options import (
    UNLIMITED,
    InstanceOptions,
    RuntimeOptions,
    add_arguments,
    from_namespace,
    per_instance_fields,
    resolve,
)
from tests.specs.clusters import cluster, instance, npu_mem

DOCUMENTED_DEFAULTS = {
    "cluster_config": "configs/cluster/single_node_single_instance.json",
    "dataset": "workloads/example_trace.jsonl",
    "output": None,
    "num_reqs": 0,
    "dtype": None,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "long_prefill_token_threshold": 0,
    "enable_chunked_prefill": True,
    "npu_memory_utilization": 0.9,
    "reserve_full_isl": True,
    "enable_prefix_caching": True,
    "enable_prefix_sharing": False,
    "prefix_storage": None,
    "request_routing_policy": "LOAD",
    "expert_routing_policy": "BALANCED",
    "enable_local_offloading": False,
    "enable_attn_offloading": False,
    "enable_sub_batch_interleaving": False,
    "enable_block_copy": True,
    "async_scheduling": True,
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
        assert flag_name(name) in text


@pytest.mark.parametrize(
    "line",
    [
        "(default: 16)",
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
def test_switches(flag: str, name: str, value: bool) -> None:
    assert getattr(RuntimeOptions(), name) is not value
    assert getattr(parsed(flag), name) is value


@pytest.mark.parametrize("alias", ["fp8_e4m3", "fp8_e5m2"])
def test_both_fp8_formats_are_fp8(alias: str) -> None:
    assert parsed("--kv-cache-dtype", alias).kv_cache_dtype == "fp8"
    assert RuntimeOptions(kv_cache_dtype=alias).kv_cache_dtype == "fp8"  # type: ignore[arg-type]


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


@pytest.mark.parametrize("name", per_instance_fields())
def test_each_per_instance_option_reaches_the_instance(name: str) -> None:
    other: dict[str, Any] = {"dtype": "fp8", "kv_cache_dtype": "fp8", "enable_sub_batch_interleaving": False}
    value = other.get(name)
    if value is None:
        default = getattr(RuntimeOptions(), name)
        value = not default if isinstance(default, bool) else default + 1
    assert getattr(resolved(**{name: value}), name) == value
    assert getattr(resolved(RuntimeOptions(**{name: value})), name) == value


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
