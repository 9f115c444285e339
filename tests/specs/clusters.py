"""Small clusters and model configs to start a test from."""

from __future__ import annotations

from typing import Any


def npu_mem(**changes: Any) -> dict[str, Any]:
    return {"mem_size": 96, "mem_bw": 1597, "mem_latency": 0, **changes}


def instance(**changes: Any) -> dict[str, Any]:
    """One Llama-3.1-8B on one NPU; a change to ``...`` leaves the key out."""
    base = {
        "model_name": "meta-llama/Llama-3.1-8B",
        "hardware": "RTXPRO6000",
        "npu_mem": npu_mem(),
        "num_npus": 1,
        "tp_size": 1,
        "pd_type": None,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def node(*instances: dict[str, Any], **changes: Any) -> dict[str, Any]:
    members = list(instances) or [instance()]
    base = {
        "num_instances": len(members),
        "cpu_mem": {"mem_size": 512, "mem_bw": 256, "mem_latency": 0},
        "instances": members,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def power(**changes: Any) -> dict[str, Any]:
    """A power section with nothing but the node and its RTXPRO6000s; changes are to the NPU."""
    npu = {"idle_power": 30, "standby_power": 90, "active_power": 600, "standby_duration": 5}
    return {"base_node_power": 60, "npu": {"RTXPRO6000": {**npu, **changes}}}


def cluster(*instances: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One node with the given instances (default: one)."""
    base = {"num_nodes": 1, "link_bw": 16, "link_latency": 20000, "nodes": [node(*instances)]}
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def model_config(**changes: Any) -> dict[str, Any]:
    """A small dense model's config.json; a change to ``...`` leaves the key out."""
    base = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}
