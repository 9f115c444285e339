"""KV that ranks share by tokens: blocks and bytes against vLLM's planner, and the prefixes that hit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import simulate
from servesim.memory.plan import kv_plan
from servesim.specs.model import load_model
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import KV_BYTES_PER_TOKEN, toy_cluster, toy_instance, toy_world
from tests.specs.test_context_parallel import DEEPSEEK, LLAMA, options_of

if TYPE_CHECKING:
    from pathlib import Path

QWEN = "Qwen/Qwen3-30B-A3B"
GIB = 1 << 30
PLANNED = [
    (LLAMA, 16, 1, 16, 10 * GIB, 131072, 40960, 16, 262144, 5.0),
    (LLAMA, 16, 2, 16, 10 * GIB, 131072, 40960, 32, 262144, 10.0),
    (QWEN, 8, 2, 16, int(3.3 * GIB), 40960, 9011, 32, 393216, 7.03984375),
    (DEEPSEEK, 8, 1, 64, 20 * GIB, 163840, 4774, 64, 4497408, 1.86484375),
    (DEEPSEEK, 8, 8, 64, 20 * GIB, 163840, 4774, 512, 4497408, 14.91875),
    (DEEPSEEK, 8, 4, 64, 20 * GIB, 163841, 4774, 256, 4497408, 7.4477379095163805),
]
"""Model, tp, size, ``block_size``, bytes, context -> blocks, the scheduler's block, bytes of a block on a
rank, requests at once: ``get_kv_cache_configs``, ``resolve_kv_cache_block_sizes`` and
``get_max_concurrency_for_kv_cache_config`` of vLLM 0.33.0 for these layers."""


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: f"{row[0]}-{row[2]}")
def test_the_plan_is_that_of_vllm(row: Any) -> None:
    model, tp, size, block_size, room, longest, blocks, scheduler_block, page, concurrency = row
    flags = {"decode_context_parallel_size": size, "block_size": block_size}
    plan = kv_plan(load_model(model), options_of(model, tp, flags), tp)
    assert (plan.num_blocks(room), plan.block_size, plan.bytes_per_block) == (blocks, scheduler_block, page)
    assert blocks / plan.request_blocks(longest, 2048) == concurrency
    assert plan.bytes_per_token == page / scheduler_block


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with toy_world(tmp_path_factory.mktemp("shared")) as root:
        yield root


def run(workload: Workload, **own: Any) -> Any:
    instance = {**toy_instance(tp_size=4, **own), "num_gpu_blocks": None}
    return simulate(toy_cluster([instance]), workload)


def test_half_the_bytes_hold_twice_the_tokens(world: Path) -> None:
    del world
    one, two = (
        run(Workload([Request(0, 20, 2, 0)], "w"), decode_context_parallel_size=size).instances[0].capacity
        for size in (1, 2)
    )
    assert (one.bytes_per_token, two.bytes_per_token) == (KV_BYTES_PER_TOKEN // 2, KV_BYTES_PER_TOKEN // 4)
    assert (one.block_size, two.block_size) == (16, 32)
    assert one.bytes_per_block == two.bytes_per_block == 16 * KV_BYTES_PER_TOKEN // 2
    assert one.num_blocks == two.num_blocks
    assert two.tokens == 2 * one.tokens


def test_prefixes_hit_in_the_blocks_of_all_ranks(world: Path) -> None:
    """60 tokens are said twice: three blocks of 16, or one of 32, are found; the last token never is."""
    del world
    import numpy as np

    ids = np.arange(60)
    requests = [Request(i, 60, 2, i * 10**9, input_ids=ids) for i in range(2)]
    hits = [
        run(Workload(requests, "w"), decode_context_parallel_size=size).requests["npu_hit"].tolist()
        for size in (1, 2)
    ]
    assert hits == [[0, 48], [0, 32]]
