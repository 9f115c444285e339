"""Whole runs with weights, KV cache or attention outside of the NPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import load_cluster, simulate
from servesim.cost.batch_shape import Shape
from servesim.engine.build import build_simulation, step_pricing
from servesim.errors import InputError
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.test_random_clusters import check_cluster_run
from tests.engine.toy_world import DENSE, LAYERS, MOE, WINDOWS, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.results.records import RunLog

US = 1000
NPU_BLOCK = 3 * 10
"""µs of the dense layers of a block for a single token: three layers of 1 + 9."""
ONCE = (1 + 1) + 1 + (1 + 49)
"""µs of embedding, final norm and output head for a single token and sequence."""
PIM = {"mem_size": 2, "mem_bw": 100, "mem_latency": 0, "pim_config": "Toy"}
"""Two channels; a decode of L tokens takes 1000 + 100 L ns a block, see :func:`toys`."""


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[Path]:
    with toy_world(tmp_path):
        folder = tmp_path / "configs" / "pim"
        folder.mkdir()
        # gqa of the toy is 4 query heads of 4 over 32 x 128, kv_scale 2 x 4 x 2 bytes over 8 x 128 x 2.
        (folder / "Toy.ini").write_text(
            "[dram]\ncapacity_gb = 1\ndata_rate_mts = 1000\nbus_width_bits = 64\nburst_length = 8\n"
            "row_to_column_ns = 10\ncas_latency_ns = 12\n"
            f"[attention]\nslope = {100 * 256}\nintercept = {1000 * 128}\n"
        )
        yield tmp_path


def run(cluster: dict[str, Any], requests: list[Request], **flags: Any) -> RunLog:
    flags = {"block_size": 8, "cudagraph": False, "async_scheduling": False, **flags}
    workload = Workload(requests, "w")
    simulation = build_simulation(load_cluster(cluster), workload, RuntimeOptions(**flags))
    log = simulation.run()
    check_cluster_run(simulation, log, workload)
    return log


def step_us(log: RunLog, index: int = -1) -> float:
    steps = log.instances[0].steps
    return (steps.end_ns[index] - steps.start_ns[index]) / US


def pim_cluster(*instances: dict[str, Any], **memory: Any) -> dict[str, Any]:
    made = toy_cluster(list(instances) or [toy_instance(enable_attn_offloading=True)])
    made["nodes"][0]["cpu_mem"] = {**PIM, **memory}
    return made


def decodes(*lengths: int) -> list[Request]:
    """Prompts whose KV is there from the start, one token each."""
    return [Request(index, length + 1, 1, 0) for index, length in enumerate(lengths)]


def test_four_devices_make_a_step_four_times_as_fast() -> None:
    cxl = {"mem_size": 1, "mem_bw": 1e-5, "mem_latency": 0, "num_devices": 4}

    def decode_us(blocks: list[dict[str, Any]]) -> float:
        # The model has five blocks; the last stays on the NPU, so that the four are equal.
        cluster = toy_cluster([toy_instance(placement={"blocks": blocks})], cxl_mem=cxl)
        return step_us(run(cluster, decodes(63), skip_prefill=True))

    one = decode_us([{"blocks": "0-3", "weights": "cxl:0"}])
    four = decode_us([{"blocks": str(block), "weights": f"cxl:{block}"} for block in range(4)])
    # Projections, MLP and two norms, 2 bytes each; 100 us a byte.
    block_us = 2 * (16 * (4 + 4) * 4 + 16 * 16 + 3 * 16 * 32 + 2 * 16) * 100
    behind = NPU_BLOCK + 5 + 1 + 1 + 1 + (1 + 49)  # the last block, the norm, the head
    assert one == pytest.approx(4 * block_us + behind, rel=1e-4)
    assert four == pytest.approx(one / 4, rel=1e-3)


def test_memory_that_is_fast_enough_costs_nothing() -> None:
    usual = run(toy_cluster([toy_instance()]), [Request(0, 90, 20, 0)])
    fast = toy_cluster([toy_instance(placement={"default": {"weights": "cpu", "kv_loc": "cpu"}})])
    fast["nodes"][0]["cpu_mem"]["mem_bw"] = 1e6
    assert run(fast, [Request(0, 90, 20, 0)]).end_ns == usual.end_ns


def test_kv_on_a_slow_memory_sets_the_pace() -> None:
    slow = toy_cluster([toy_instance(placement={"default": {"kv_loc": "cpu"}})])
    slow["nodes"][0]["cpu_mem"].update(mem_bw=0.001, mem_latency=500)
    log = run(slow, decodes(64), skip_prefill=True)
    # A token has 32 bytes a block (both sides, 2 heads of 4, 2 bytes); 1000 ns a byte; 64 tokens.
    read_us = LAYERS * (0.5 + 64 * 32)
    behind = 2 * 10 + 1 + 50  # after the last attention: two layers, the norm, the head
    assert step_us(log) == read_us + behind
    assert step_us(run(slow, decodes(64), skip_prefill=True, kv_cache_dtype="fp8")) == pytest.approx(
        LAYERS * (0.5 + 64 * 16) + behind
    )


def test_the_history_of_a_chunk_is_read_from_where_it_lies() -> None:
    # The second chunk's attention reads 64 tokens of 32 bytes in every block, 1000 ns a byte.
    requests, flags = [Request(0, 128, 1, 0)], {"max_num_batched_tokens": 64, "max_num_seqs": 64}
    slow = toy_cluster([toy_instance(placement={"default": {"kv_loc": "cpu"}})])
    slow["nodes"][0]["cpu_mem"].update(mem_bw=0.001, mem_latency=500)
    usual = run(toy_cluster([toy_instance()]), requests, **flags)
    late = run(slow, requests, **flags)
    assert step_us(late, 0) == step_us(usual, 0)
    behind = 2 * (64 + 9) + 1 + 50  # two layers of the last block, the norm, the head
    assert step_us(late, 1) == pytest.approx(LAYERS * (0.5 + 64 * 32) + behind)


def test_local_offloading_waits_for_the_weights() -> None:
    slow = {"mem_size": 1, "mem_bw": 0.001, "mem_latency": 0, "reserve": 0}
    cluster = toy_cluster([toy_instance(npu_mem=slow)])
    block = 2 * (16 * (4 + 4) * 4 + 16 * 16 + 3 * 16 * 32 + 2 * 16)
    head, norm, row = 2 * 64 * 16, 2 * 16, 2 * 16
    usual = step_us(run(cluster, decodes(64), skip_prefill=True))
    again = step_us(run(cluster, decodes(64), skip_prefill=True, enable_local_offloading=True))
    assert usual == LAYERS * (NPU_BLOCK + 5 + 1 + 1) + ONCE
    assert again == row + LAYERS * block + norm + head


@pytest.mark.parametrize(("lengths", "slowest"), [((50,), 50), ((80, 50), 80)])
def test_the_npu_waits_for_the_slowest_channel(lengths: tuple[int, ...], slowest: int) -> None:
    log = run(pim_cluster(), decodes(*lengths), skip_prefill=True)
    n = len(lengths)
    dense = LAYERS * 3 * (n + 9) + (n + 1) + 1 + (n + 49)
    assert step_us(log) == pytest.approx(dense + LAYERS * (1 + 0.1 * slowest))


def test_three_requests_on_two_channels() -> None:
    # 11, 9 and 6 us: the longest alone, the others one after the other.
    log = run(pim_cluster(), decodes(80, 50, 100), skip_prefill=True)
    assert step_us(log) == pytest.approx(LAYERS * 3 * 12 + 4 + 1 + 52 + LAYERS * 15)


def test_halves_of_a_batch_overlap() -> None:
    flags = {"skip_prefill": True, "enable_sub_batch_interleaving": True}
    # Two decodes of 990 tokens, 100 us each in memory; a half has 10 us on the NPU before, 20 after.
    # NPU A 0-10, B 10-20; memory A 10-110, B 110-210; NPU A 110-140; memory A 210-310: it never rests.
    log = run(pim_cluster(mem_size=1), decodes(990, 990), **flags)
    once = 3 + 1 + 51
    assert step_us(log) == pytest.approx(10 + LAYERS * 2 * 100 + 20 + once)
    apart = run(pim_cluster(mem_size=1), decodes(990, 990), skip_prefill=True)
    assert step_us(apart) == pytest.approx(LAYERS * (3 * 11 + 200) + once)


def test_a_half_attends_to_its_own_prompts() -> None:
    """The NPU has the dense layers of both halves to do, and the attention of the prompt."""

    def us(cluster: dict[str, Any], batch: Shape, **flags: Any) -> float:
        options = RuntimeOptions(block_size=8, cudagraph=False, **flags)
        return step_pricing(load_cluster(cluster), options, 0).us(batch)

    chunk = ((64, 0),)
    prompt_us = us(toy_cluster([toy_instance()]), Shape(chunk, 0, 0, 0, 0, []))
    both = Shape(chunk, 1, 50, 50, 50, [50])
    split_us = us(pim_cluster(), both, enable_sub_batch_interleaving=True)
    assert split_us >= prompt_us + LAYERS * NPU_BLOCK


def test_one_request_is_not_split() -> None:
    alone = run(pim_cluster(), [Request(0, 50, 9, 0)])
    split = run(pim_cluster(), [Request(0, 50, 9, 0)], enable_sub_batch_interleaving=True)
    assert split.end_ns == alone.end_ns


def test_prompts_are_attended_to_on_the_npu() -> None:
    usual = run(toy_cluster([toy_instance()]), [Request(0, 64, 1, 0)])
    assert step_us(run(pim_cluster(), [Request(0, 64, 1, 0)])) == step_us(usual)


def test_the_history_of_a_chunk_is_read_out_of_pim() -> None:
    # The second chunk's attention reads 64 tokens of 32 bytes in every block.
    requests, flags = [Request(0, 128, 1, 0)], {"max_num_batched_tokens": 64, "max_num_seqs": 64}
    fast = run(pim_cluster(), requests, **flags)
    usual = run(toy_cluster([toy_instance()]), requests, **flags)
    assert fast.end_ns == usual.end_ns  # 16 GB/s are plenty
    toy = Path("configs/pim/Toy.ini").read_text()
    Path("configs/pim/Slow.ini").write_text(toy.replace("data_rate_mts = 1000", "data_rate_mts = 0.01"))
    late = run(pim_cluster(pim_config="Slow"), requests, **flags)
    assert step_us(late, 0) == step_us(usual, 0)
    read_us = 64 * 32 / (2 * 0.01 * 8) + 0.022 + 8 / 0.01  # bytes over two channels, then the first burst
    assert step_us(late, 1) == pytest.approx(LAYERS * read_us + 2 * (64 + 9) + 1 + 50, rel=1e-6)


SHAPES: dict[str, dict[str, Any]] = {
    "alone": {},
    "tensor parallel": {"tp_size": 2},
    "pipeline": {"pp_size": 2},
    "both": {"tp_size": 2, "pp_size": 2},
    "experts": {"model": MOE},
    "shared experts": {"model": MOE, "tp_size": 2, "ep_size": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "weights": {"placement": {"blocks": [{"blocks": "1-3", "weights": "cpu"}]}},
    "kv": {"placement": {"default": {"kv_loc": "cxl:1"}, "layers": {"lm_head": {"weights": "cxl:0"}}}},
    "local": {"enable_local_offloading": True},
    "pim": {"enable_attn_offloading": True},
    "halves": {"enable_attn_offloading": True, "enable_sub_batch_interleaving": True},
    "all": {
        "placement": {"default": {"weights": "cpu"}},
        "enable_local_offloading": True,
        "enable_attn_offloading": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_request_ends_in_every_combination(shape: str, way: str) -> None:
    keys = {**SHAPES[shape], **WAYS[way]}
    if way == "halves" and keys.get("pp_size", 1) > 1:
        pytest.skip("halves need a single stage")
    cluster = pim_cluster(toy_instance(num_gpu_blocks=61, **keys), mem_size=16, mem_bw=0.5)
    cluster["cxl_mem"] = {"mem_size": 1, "mem_bw": 0.5, "mem_latency": 100, "num_devices": 2}
    requests = [Request(i, 20 + 13 * i % 90, 3 + 7 * i % 40, i * 50 * US) for i in range(25)]
    flags = {"async_scheduling": True, "max_num_batched_tokens": 96, "max_num_seqs": 6, "cudagraph": True}
    log = run(cluster, requests, **flags)
    assert len(log.requests) == 25
    again = run(cluster, requests, **flags, stepped=True)
    assert again.instances[0].steps.end_ns == log.instances[0].steps.end_ns


def test_members_of_a_group_and_both_sides_of_a_split_may_offload() -> None:
    offload = {"enable_attn_offloading": True, "placement": {"default": {"weights": "cpu"}}}
    requests = [Request(i, 20 + i, 5, i * US) for i in range(20)]
    group = [toy_instance(MOE, dp_group="g", ep_size=2, **offload) for _ in range(2)]
    assert len(run(pim_cluster(*group), requests).requests) == 20
    sides = [toy_instance(pd_type=side, **offload) for side in ("prefill", "decode")]
    assert len(run(pim_cluster(*sides), requests).requests) == 20


def test_the_lower_tier_has_what_weights_leave() -> None:
    weights = toy_cluster([toy_instance(placement={"default": {"weights": "cpu"}})])
    assert run(weights, [Request(0, 20, 3, 0)], prefix_storage="CPU").end_ns
    kv = toy_cluster([toy_instance(placement={"default": {"kv_loc": "cpu"}})])
    with pytest.raises(InputError, match="where whole KV caches leave no room"):
        run(kv, [Request(0, 20, 3, 0)], prefix_storage="CPU")


def test_evicted_kv_goes_where_placement_says() -> None:
    cluster = toy_cluster([toy_instance(placement={"default": {"kv_evict_loc": "cpu"}})])
    result = simulate(cluster, Workload([Request(0, 600, 3, 0)], "w"))
    tier = result.instances[0].tier
    assert tier is not None
    assert tier.storage == "CPU"
    assert sum(result.instances[0].steps.tier_bytes) == 2 * tier.chunk_bytes


def test_what_lies_elsewhere_is_shown_and_summarised() -> None:
    cluster = pim_cluster(
        toy_instance(enable_attn_offloading=True, placement={"default": {"weights": "cpu"}})
    )
    result = simulate(cluster, Workload([Request(0, 20, 3, 0)], "w"))
    [entry] = json.loads(json.dumps(result.summary))["instances"]
    assert [memory["place"] for memory in entry["outside"]] == ["cpu", "pim"]
    assert entry["weight_bytes"] == 0
    assert entry["outside"][1]["kv_bytes"] == 1001 * 16 * LAYERS * 32


def test_kv_that_steps_read_elsewhere_is_logged() -> None:
    requests = [Request(0, 128, 3, 0)]
    slow = toy_cluster([toy_instance(placement={"default": {"kv_loc": "cpu"}})])
    log = run(slow, requests, max_num_batched_tokens=64, max_num_seqs=64)
    # two chunks, the second looks back at 64 tokens; then decodes at 128 and 129
    assert list(log.instances[0].kv_reads or ()) == [0, 64, 128, 129]
    assert list(
        run(pim_cluster(), requests, max_num_batched_tokens=64, max_num_seqs=64).instances[0].kv_reads or ()
    ) == [
        *(0, 64),
        *(0, 0),
    ]
    assert run(toy_cluster([toy_instance()]), requests).instances[0].kv_reads is None


def test_windows_read_what_they_see() -> None:
    """Kept whole by one manager, the KV of two of five layers is read 99 tokens far, beside the new one."""
    requests = [Request(0, 128, 3, 0)]
    kept = {"placement": {"default": {"kv_loc": "cpu"}}}
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 64}

    def kv_in_cpu(model: str, **more: Any) -> RunLog:
        made = toy_cluster([toy_instance(model, **kept, **more)])
        made["nodes"][0]["cpu_mem"]["mem_bw"] = 0.0001  # the step waits for it
        return run(made, requests, **options)

    windows = kv_in_cpu(WINDOWS, disable_hybrid_kv_cache_manager=True)
    [log] = windows.instances
    assert list(log.kv_reads or ()) == [0, 64, 128, 129]
    assert {reach: list(reads) for reach, reads in log.window_reads.items()} == {100: [0, 64, 99, 99]}
    whole = kv_in_cpu(DENSE)
    assert whole.instances[0].window_reads == {}
    # two layers of 5 read 29 and 30 tokens of 32 bytes less, at 0.1 bytes a us
    saved = round(2 * (29 + 30) * 32 / 0.0001)
    assert whole.end_ns - windows.end_ns == pytest.approx(saved, rel=1e-6)
