"""What ``--kv-cache-dtype fp8`` is said to do: other kernel times, half the bytes, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.api import simulate
from servesim.workload.request import Request, Workload
from tests.engine.test_properties import workloads
from tests.engine.toy_world import KV_BYTES_PER_TOKEN, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.results.result import Result


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Its FP8 tables are copies of the 16-bit ones, so that bytes are all that differs."""
    with toy_world(tmp_path_factory.mktemp("toys")):
        yield


def ran(workload: Workload, kv: str, **instance: Any) -> Result:
    return simulate(toy_cluster([toy_instance(**instance)]), workload, kv_cache_dtype=kv)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(longest=60), st.integers(25, 140))
def test_with_as_many_blocks_the_run_is_the_same(workload: Workload, blocks: int) -> None:
    wide, narrow = (ran(workload, kv, num_gpu_blocks=blocks) for kv in ("auto", "fp8"))
    assert wide.requests.tolist() == narrow.requests.tolist()
    assert wide.steps.tolist() == narrow.steps.tolist()
    assert wide.instances[0].capacity.bytes_per_block == 2 * narrow.instances[0].capacity.bytes_per_block


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(longest=60), st.integers(132, 300))
def test_in_the_same_memory_twice_the_blocks_run(workload: Workload, blocks: int) -> None:
    """FP8 is what 16 bit would be with twice the room for KV."""
    weights = ran(workload, "auto").instances[0].capacity.weight_bytes
    held = blocks * 16 * KV_BYTES_PER_TOKEN
    memory = {"mem_size": (weights + held) / 2**30 + 1e-9, "mem_util": 1, "reserve": 0}
    narrow = ran(workload, "fp8", npu_mem=memory, num_gpu_blocks=None)
    wide = ran(workload, "auto", npu_mem=memory, num_gpu_blocks=None)
    assert wide.summary["kv_cache"]["blocks"] == blocks
    assert narrow.summary["kv_cache"]["blocks"] == 2 * blocks
    assert narrow.requests.tolist() == ran(workload, "auto", num_gpu_blocks=2 * blocks).requests.tolist()


def test_under_memory_pressure_twice_as_many_run() -> None:
    """Prompts of 300 tokens: 8 of them fill 152 blocks of 16 bit."""
    workload = Workload([Request(index, 300, 4, 0) for index in range(40)], "burst")
    wide, narrow = (ran(workload, "auto", num_gpu_blocks=blocks) for blocks in (153, 305))
    assert wide.summary["peak_batch"] == 8
    assert narrow.summary["peak_batch"] == 16


def test_prefix_hits_and_fp8_compound() -> None:
    """Which prompt tokens are found does not depend on the format; where room is short, more are kept."""
    made = [
        Request(index, 320, 4, index * 10**9, np.full(320, index % 4, dtype=np.int64)) for index in range(12)
    ]
    hits = {
        blocks: ran(Workload(made, "turns"), "fp8", num_gpu_blocks=blocks).summary["prefix_cache"][
            "hit_tokens"
        ]
        for blocks in (45, 90)
    }
    assert hits[90] == 8 * 304  # every prompt but the first four, without its last block
    assert hits[45] == 0  # four prompts of 20 blocks take turns in 44


@pytest.mark.parametrize(
    ("dtype", "kv", "variant"), [("bfloat16", "fp8", "bf16-kvfp8"), ("fp8", "fp8", "fp8-kvfp8")]
)
def test_both_dtypes_choose_the_folder(dtype: str, kv: str, variant: str) -> None:
    workload = Workload([Request(0, 30, 4, 0)], "one")
    found = simulate(toy_cluster([toy_instance()]), workload, dtype=dtype, kv_cache_dtype=kv).instances[0]
    wide = simulate(
        toy_cluster([toy_instance()]), workload, dtype=dtype, kv_cache_dtype="bfloat16"
    ).instances[0]
    assert f"org/toy/{variant} " in found.bundle_source
    assert found.capacity.weight_bytes == wide.capacity.weight_bytes
