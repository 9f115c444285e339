"""The price of speculative decoding: verification, the drafter's passes and its memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from servesim.cost.batch_shape import Shape
from servesim.cost.build import Costs
from servesim.cost.cudagraph import capture_limit, capture_sizes
from servesim.cost.drafting import NGRAM_US
from servesim.memory.sizing import block_weight_bytes, drafter_bytes, kv_bytes_per_token
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.speculative import speculative_spec

CLUSTER = "configs/cluster/single_node_single_instance.json"
MODEL = load_model("meta-llama/Llama-3.1-8B")


def step_us(method: str | None, drafts: int = 3, **shape: Any) -> float:
    """µs of a step of the shipped Llama bundle."""
    cluster = load_cluster(CLUSTER)
    _, instance = cluster.instances[0]
    config = {"method": method, "num_speculative_tokens": drafts, "model": "meta-llama/Llama-3.1-8B"}
    asked = {"speculative_config": json.dumps(config)} if method else {}
    options = resolve(RuntimeOptions(**asked), instance, MODEL)
    cost = Costs(cluster).stage(instance, MODEL, options)
    batch = Shape(**{"num_decodes": 8, "kv_sum": 8000, "kv_min": 1000, "kv_max": 1000, **shape})
    ns = cost.step_ns(batch)
    explained = sum(line.total_us for line in cost.explain(batch))
    assert explained == pytest.approx(ns / 1000, rel=0.001)
    return ns / 1000


def test_verification_reads_the_cache_once() -> None:
    """32 queries of 8 sequences take little longer than 8, far less than 32 sequences."""
    plain, verified = step_us(None), step_us("ngram", draft_tokens=24) - 8 * NGRAM_US
    assert plain < verified < 1.2 * plain
    assert verified < step_us(None, num_decodes=32, kv_sum=32000)


def test_every_draft_is_a_pass_of_the_drafter() -> None:
    ngram = step_us("ngram", draft_tokens=24) - 8 * NGRAM_US
    # graphs of 32 tokens hold whole requests of 2, 4 and 8
    one, three, seven = (step_us("eagle3", drafts, draft_tokens=24) - ngram for drafts in (1, 3, 7))
    assert seven - three == pytest.approx(2 * (three - one), rel=0.01)
    assert 0 < one < ngram / 8  # one block of 32, and the output head
    whole = step_us("draft_model", 3, draft_tokens=24) - ngram
    assert 2.5 * ngram < whole < 3.5 * ngram  # the target as its own drafter, three passes


def test_graphs_hold_whole_requests() -> None:
    assert capture_limit(8, 2048, 4) == 64
    assert capture_sizes(64, 3).tolist()[:6] == [3, 6, 9, 18, 24, 33]
    assert all(size % 3 == 0 for size in capture_sizes(512, 3).tolist())
    assert capture_sizes(2, 4).tolist() == [4]


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_one_layer_takes_the_memory_of_one(method: str) -> None:
    spec = speculative_spec(json.dumps({"method": method, "model": "x", "num_speculative_tokens": 2}))
    assert spec is not None
    weights, kv = drafter_bytes(spec, MODEL, "bfloat16", "bfloat16", 1)
    assert kv == kv_bytes_per_token(MODEL, "bfloat16") // 32
    block = block_weight_bytes(MODEL, "bfloat16", 1, 1)
    assert block < weights < 2 * block


def test_a_draft_model_takes_its_own_memory() -> None:
    config = {"method": "draft_model", "model": MODEL.name, "num_speculative_tokens": 2}
    spec = speculative_spec(json.dumps(config))
    assert spec is not None
    weights, kv = drafter_bytes(spec, MODEL, "bfloat16", "bfloat16", 1)
    assert kv == kv_bytes_per_token(MODEL, "bfloat16")
    assert weights > 2 * 8e9


def test_lookups_of_n_grams_take_no_memory() -> None:
    spec = speculative_spec('{"method": "ngram", "num_speculative_tokens": 2}')
    assert spec is not None
    assert drafter_bytes(spec, MODEL, "bfloat16", "bfloat16", 1) == (0, 0)
