"""A small world in one folder, sound as it stands: a toy model, its bundle, hardware, cluster, workload."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.bench import recordings
from tests.cost.bundles import HARDWARE, MODEL, Toy, toy_architecture

TOY_CONFIG: dict[str, Any] = {
    "architectures": ["ToyForCausalLM"],
    "model_type": "toy",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
TOY_HARDWARE: dict[str, Any] = {
    "gpu": "Toy GPU",
    "memory_gib": 8,
    "memory_bandwidth_gbs": 500,
    "l2_mib": 40,
    "sm_count": 60,
    "peak_tflops": {"bfloat16": 100, "fp8": 200},
    "link": {"bandwidth_gbs": 50, "latency_us": 5.0},
    "roofline": {"launch_us": 1.5, "product_compute": 0.7, "decode_stream": [[1, 0.5], [64, 0.8]]},
    "engine": {"prefill_step_overhead_us": 10.0, "decode_step_overhead_us": 1.0, "cudagraph": True},
}
PIM = """\
[dram]
capacity_gb = 2
data_rate_mts = 4266
bus_width_bits = 64
burst_length = 16
row_to_column_ns = 18
cas_latency_ns = 20

[attention]
slope = 40
intercept = 900
"""
POWER: dict[str, Any] = {
    "base_node_power": 60,
    "npu": {HARDWARE: {"idle_power": 30, "standby_power": 90, "active_power": 300, "standby_duration": 1.5}},
    "cpu": {"idle_power": 40, "active_power": 200, "util": 0.3},
    "dram": {"dimm_size": 64, "idle_power": 3, "energy_per_bit": 4},
    "link": {"num_links": 1, "idle_power": 2, "energy_per_bit": 3},
    "nic": {"num_nics": 1, "idle_power": 5},
    "storage": {"num_devices": 1, "idle_power": 4},
}


def instance(**changes: Any) -> dict[str, Any]:
    """One replica of the toy model."""
    base = {
        "model_name": MODEL,
        "hardware": HARDWARE,
        "npu_mem": {"mem_size": 8, "mem_bw": 500, "mem_latency": 0},
        "num_npus": 1,
        "tp_size": 1,
        "pd_type": None,
        "num_gpu_blocks": 300,
    }
    return base | changes


def cluster(*instances: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One node, with its own PIM memory."""
    members = list(instances) or [instance()]
    memory = {"mem_size": 64, "mem_bw": 100, "mem_latency": 0, "pim_config": "TOY"}
    node = {"num_instances": len(members), "cpu_mem": memory, "instances": members}
    return {"num_nodes": 1, "link_bw": 16, "link_latency": 20000, "nodes": [node]} | changes


CXL = {"mem_size": 16, "mem_bw": 60, "mem_latency": 250, "num_devices": 2}
OFFLOAD = {
    "default": {"weights": "npu", "kv_loc": "npu", "kv_evict_loc": "cxl:0"},
    "blocks": [{"blocks": "1", "weights": "cpu", "kv_loc": "cpu"}],
    "layers": {"embedding": {"weights": "cxl:1"}},
}
CLUSTERS: tuple[dict[str, Any], ...] = (
    cluster(),
    cluster(instance(), instance(num_gpu_blocks=40, max_num_seqs=4, block_size=8)),
    cluster(instance(pd_type="prefill"), instance(pd_type="decode")),
    cluster(instance(placement=OFFLOAD, engine={"cudagraph": False}), cxl_mem=CXL),
    cluster(instance(num_gpu_blocks=100, enable_attn_offloading=True), link_topology=["ring"]),
    cluster(instance(num_npus=2, pp_size=2), link_bw=[16, 8], link_latency=[100, 200]),
    cluster(instance(dp_group="A"), instance(dp_group="A")),
)
for _base in CLUSTERS[:2]:
    _base["nodes"][0]["power"] = POWER


@cache
def sound_files() -> dict[str, bytes]:
    """Relative path -> content of every file of the world that does not differ from case to case."""
    with TemporaryDirectory() as name:
        root = Path(name)
        toy = Toy()
        toy.comm = [("all_reduce", 2, 1024, 5.0), ("all_reduce", 2, 1 << 20, 50.0)]
        toy.write(root)
        toy_architecture(root)
        made = {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
    return made | {
        f"configs/model/{MODEL}.json": json.dumps(TOY_CONFIG).encode(),
        f"configs/hardware/{HARDWARE}.yaml": yaml.safe_dump(TOY_HARDWARE).encode(),
        "configs/pim/TOY.ini": PIM.encode(),
    }


@cache
def recording() -> dict[str, Any]:
    """A recording: its metadata, rows and cluster."""
    sent = recordings.workload(12)
    result = recordings.simulated(sent=sent)
    with TemporaryDirectory() as name:
        folder = recordings.write(Path(name), recordings.rows(result))
        return {
            "meta": json.loads((folder / "meta.json").read_text()),
            "rows": recordings.rows(result),
            "cluster": recordings.cluster(),
        }


def requests(count: int) -> list[dict[str, Any]]:
    """A few requests and a session, with ids that share a prefix."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        ids = [*range(24), *([i] * (i % 40))]
        entry: dict[str, Any] = {"input_toks": len(ids), "output_toks": 1 + i % 9, "input_tok_ids": ids}
        if i % 4 == 3:
            later = {"input_toks": 60, "output_toks": 3, "output_tok_ids": [1, 2, 3]}
            first = entry | {"tool_duration_ns": 10**6}
            made.append({"session_id": f"s{i}", "arrival_time_ns": i * 10**6, "sub_requests": [first, later]})
        else:
            made.append(entry | {"arrival_time_ns": i * 10**6})
    return made


def mooncake(count: int) -> list[dict[str, Any]]:
    """Lines of a Mooncake trace, the last two of them a session."""
    made: list[dict[str, Any]] = [
        {"timestamp": 100 * i, "input_length": 700 + i, "output_length": 4, "hash_ids": [1, 2 + i % 2]}
        for i in range(count)
    ]
    session = {"session_id": "a", "input_length": 50, "output_length": 2}
    return [*made, session | {"timestamp": 5}, session | {"delay": 10.5, "input_length": 90}]


CHATS = [
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40, "output_length": 8,
     "type": "text", "turn": 1, "hash_ids": [11, 12, 13]},
    {"chat_id": 2, "parent_chat_id": 1, "timestamp": 2.25, "input_length": 56, "output_length": 6,
     "type": "text", "turn": 2, "hash_ids": [11, 12, 13, 14]},
]  # fmt: skip
CSVS = (
    b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,4\n1.25,396,9\n4.5,879,5\n",
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.680,374,4\n2023-11-16 18:15:50.99,396,9\n",
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,G,472,18,490,x\n45,G,1,2,3,y\n",
)
TEXTS = [
    {"conversations": [{"from": "human", "value": "Who wrote the"}, {"from": "gpt", "value": "the ?"}]},
    {"conversations": [{"from": "human", "value": "Who"}, {"from": "gpt", "value": "wrote"}]},
]
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"?": 0, "Who": 1, "wrote": 2, "the": 3}, "unk_token": "?"},
}
BENCH = {
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "total_token_throughput": 100.0,
    "input_lens": [100, 200, 50],
    "output_lens": [10, 20, 5],
    "ttfts": [0.1, 0.2, 0.3],
    "start_times": [1000.25, 1000.0, 1002.0],
}
