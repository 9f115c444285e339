"""LLMServingSim's published examples: single steps against sums by hand, from the tables and the links.

docs/from-llmservingsim.md has the same sums. Its per-request files tell what its own steps took.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest

import servesim
from servesim.api import read_cluster
from servesim.cost.batch_shape import Shape
from servesim.engine.build import step_pricing
from servesim.specs.cluster import load_cluster
from servesim.specs.options import RuntimeOptions
from servesim.specs.paths import bundles_from
from tests.recorded import recorded_path

LLAMA, QWEN = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"
NO_HOST = dict.fromkeys(
    (
        "prefill_step_overhead_us",
        "decode_step_overhead_us",
        "host_step_us",
        "host_sequence_us",
        "front_end_us",
    ),
    0,
)
LLAMA_BLOCK = (
    "layernorm",
    "layernorm",
    "qkv_proj",
    "rotary_emb",
    "o_proj",
    "gate_up_proj",
    "act_fn",
    "down_proj",
)
QWEN_BLOCK = ("layernorm", "layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj")
EXPERTS_1 = 50.2297
"""us of one token on 8 experts, the first row of moe.csv; where a rank has less, it is held there."""
PASS = 1.75
"""An exchange is so much faster than half an all-reduce, as fitted."""


def cluster_dict(name: str) -> dict[str, Any]:
    """A cluster config of the examples, without host time and padding, as LLMServingSim has it."""
    spec: dict[str, Any] = json.loads(recorded_path("examples", "cluster", f"{name}.json").read_text())
    for node in spec["nodes"]:
        for instance in node["instances"]:
            instance["engine"] = {**NO_HOST, "cudagraph": False}
    return spec


def step_us(name: str, decodes: int = 1, kv: int = 16, **flags: Any) -> list[float]:
    """us of the stages of one step of the first instance; members of its group have the same batch."""
    options = RuntimeOptions(dtype="bfloat16", **flags)
    batch = Shape((), decodes, decodes * kv, kv, kv, [kv] * decodes)
    with bundles_from(recorded_path("perf")):
        pricing = step_pricing(read_cluster(options, load_cluster(cluster_dict(name))), options, 0)
        return [sum(line.total_us for line in lines) for lines in pricing.stages(batch)]


@cache
def table(model: str, tp: int, name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Layer -> (counts, us) of a table of the bundle."""
    path = recorded_path("perf", "RTXPRO6000", *model.split("/"), "bf16", f"tp{tp}", f"{name}.csv")
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    with path.open() as handle:
        for layer, count, us in list(csv.reader(handle))[1:]:
            found[layer][0].append(float(count))
            found[layer][1].append(float(us))
    return found


def blocks_us(model: str, tp: int, block: tuple[str, ...], blocks: int, tokens: int = 1) -> float:
    """us of the dense layers of so many transformer blocks."""
    dense = table(model, tp, "dense")
    return blocks * sum(float(np.interp(tokens, *dense[layer])) for layer in block)


def ends_us(model: str, tp: int, *, first: bool = True, last: bool = True, sequences: int = 1) -> float:
    """us of what is before and behind the blocks."""
    dense, heads = table(model, tp, "dense"), table(model, tp, "per_sequence")
    total = float(np.interp(sequences, *dense["embedding"])) if first else 0.0
    if last:
        total += float(np.interp(sequences, *dense["final_layernorm"]))
        total += sum(float(np.interp(sequences, *heads[layer])) for layer in ("lm_head", "sampler"))
    return total


def attention_us(model: str, tp: int, decodes: int, kv: int) -> float:
    path = recorded_path("perf", "RTXPRO6000", *model.split("/"), "bf16", f"tp{tp}", "attention.csv")
    with path.open() as handle:
        for row in csv.DictReader(handle):
            if [int(row[key]) for key in ("prefill_chunk", "n_decode", "kv_decode")] == [0, decodes, kv]:
                return float(row["time_us"])
    raise AssertionError((decodes, kv))


def all_reduce_us(payload: float, bw: float, hop: float) -> float:
    """Over two ranks: there and back, half of the payload each."""
    return 2 * (hop + payload / 2 / bw / 1000)


def their_itl_ms(name: str) -> list[float]:
    """ms between the tokens of all requests that LLMServingSim published for an example."""
    csv.field_size_limit(1 << 24)
    with recorded_path("examples", "outputs", f"example_{name}_run.csv").open() as handle:
        return [value / 1e6 for row in csv.DictReader(handle) for value in json.loads(row["ITL"])]


def common(values: list[float], near: float) -> bool:
    """Whether eight gaps or more are within 1 % of ``near``."""
    return sum(abs(value / near - 1) < 0.01 for value in values) >= 8


def test_one_gpu_is_its_tables() -> None:
    by_hand = blocks_us(LLAMA, 1, LLAMA_BLOCK, 32) + 32 * attention_us(LLAMA, 1, 1, 16) + ends_us(LLAMA, 1)
    assert step_us("single_node_single_instance") == pytest.approx([by_hand], rel=1e-6)
    assert common(their_itl_ms("single"), by_hand / 1000)


def test_members_of_two_ranks_decode_side_by_side() -> None:
    blocks = blocks_us(QWEN, 2, QWEN_BLOCK, 48) + 48 * attention_us(QWEN, 2, 1, 16)
    by_hand = blocks + ends_us(QWEN, 2) + 96 * all_reduce_us(4096, 16, 20) + 48 * EXPERTS_1
    assert step_us("single_node_moe_dp_tp_instance") == pytest.approx([by_hand], rel=1e-6)
    assert by_hand == pytest.approx(7907, abs=2)
    theirs = their_itl_ms("moe_dp_tp")
    assert common(theirs, by_hand / 1000)  # while one member decodes
    assert common(theirs, 2 * by_hand / 1000)  # both, one after the other
    assert not common(theirs, 3 * by_hand / 1000)


def test_chunks_of_two_nodes_by_hand() -> None:
    blocks = blocks_us(QWEN, 2, QWEN_BLOCK, 48) + 48 * attention_us(QWEN, 2, 1, 16)
    rows = 4  # a chunk of one token on each of 4 ranks, half of them padding
    there, back = (
        20.5 + rows * size / PASS * (1 / 2 / 128 + 1 / 4 / 16) / 1000 for size in (4096 + 256, 4096)
    )
    gather = 0.5 + 2 * 4096 / PASS / 2 / 128 / 1000
    exchange = 48 * (there + back + gather)
    by_hand = blocks + ends_us(QWEN, 2) + 48 * all_reduce_us(4096, 128, 0.5) + exchange + 48 * EXPERTS_1
    assert step_us("dual_node_moe_dp_ep_intra_inter_instance") == pytest.approx([by_hand], rel=1e-6)
    assert common(their_itl_ms("dual_moe_dp_ep"), 2 * 6.084)  # again one member after the other


def test_stages_of_a_pipeline_by_hand() -> None:
    block = blocks_us(LLAMA, 1, LLAMA_BLOCK, 8) + 8 * attention_us(LLAMA, 1, 1, 16)
    send = 20 + 8192 / 16 / 1000
    last = block + ends_us(LLAMA, 1, first=False)
    first = block + ends_us(LLAMA, 1, last=False) + send
    stages = step_us("single_node_pp_instance")
    assert stages == pytest.approx([first, block + send, block + send, last], rel=1e-6)
    theirs = their_itl_ms("pp")
    assert common(theirs, sum(stages) / 1000)  # alone
    assert common(theirs, 4 * last / 1000)  # four batches behind the slowest stage


def test_a_group_of_pipelines_by_hand() -> None:
    block = blocks_us(QWEN, 1, QWEN_BLOCK, 24) + 24 * (attention_us(QWEN, 1, 1, 16) + EXPERTS_1)
    exchange = sum(24 * (20 + size / PASS / 16 / 1000) for size in (4096 + 256, 4096))
    send = 20 + 4096 / 16 / 1000
    first = block + exchange + ends_us(QWEN, 1, last=False) + send
    last = block + exchange + ends_us(QWEN, 1, first=False)
    stages = step_us("single_node_moe_dp_pp_instance")
    assert stages == pytest.approx([first, last], rel=1e-6)
    assert common(their_itl_ms("moe_dp_pp"), sum(stages) / 1000)


def test_a_prompt_of_ten_tokens_touches_thirty_experts() -> None:
    options = RuntimeOptions(dtype="bfloat16")
    with bundles_from(recorded_path("perf")):
        cluster = read_cluster(options, load_cluster(cluster_dict("single_node_moe_single_instance")))
        (lines,) = step_pricing(cluster, options, 0).stages(Shape(((10, 0),), 0, 0, 0, 0, []))
    (experts,) = [line.us for line in lines if line.layer == "experts"]
    path = recorded_path("perf", "RTXPRO6000", *QWEN.split("/"), "bf16", "tp1", "moe.csv")
    with path.open() as handle:
        rows = [[float(value) for value in row.values()] for row in csv.DictReader(handle)]
    (before,), (behind,) = (
        [us for tokens, touched, us in rows if (tokens, touched) == (4, end)] for end in (16, 32)
    )
    assert before < experts < behind * 1.1


def test_separate_prefill_takes_one_decode_more() -> None:
    def first_ms(name: str) -> float:
        with bundles_from(recorded_path("perf")):
            trace = str(recorded_path("examples", "example_trace.jsonl"))
            spec = cluster_dict(name)
            result = servesim.simulate(spec, trace, dtype="bfloat16", async_scheduling=False, num_reqs=1)
        return result.figure("mean_ttft_ms")

    alone = first_ms("single_node_single_instance")
    decode = step_us("single_node_single_instance")[0] / 1000
    assert first_ms("single_node_pd_instance") == pytest.approx(alone + decode, rel=0.002)


def test_members_without_experts_do_not_wait_for_each_other() -> None:
    spec, trace = (
        cluster_dict("single_node_dp_instance"),
        str(recorded_path("examples", "example_trace.jsonl")),
    )
    with bundles_from(recorded_path("perf")):
        result = servesim.simulate(spec, trace, dtype="bfloat16", async_scheduling=False, num_reqs=2)
    # the second request comes while the first decodes on the other member
    assert result.requests["queuing_delay"].tolist() == [0, 0]


def test_weights_in_cxl_arrive_at_the_rate_of_the_fullest_device() -> None:
    block = 2 * 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336) + 4 * 4096
    head = 2 * 4096 * 128256
    # blocks 11 to 23 and the head, 60 GB/s, with 250 ns for each of six layers of a block and the head
    fullest_us = (13 * block + head) / 60_000 + (13 * 6 + 1) * 0.25
    (stage,) = step_us("single_node_cxl_instance")
    assert stage == pytest.approx(fullest_us + 24.7, rel=1e-4)  # and the sampler
    lm_head = float(np.interp(1, *table(LLAMA, 1, "per_sequence")["lm_head"]))
    assert common(their_itl_ms("cxl"), (stage + lm_head) / 1000)
