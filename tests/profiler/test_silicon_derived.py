"""Shapes, experts and widths that were not measured, derived from those that were."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.errors import InputError
from servesim.profiler.silicon.attention import AttentionShape, AttentionTimes
from servesim.profiler.silicon.gemm import SQUARE, waves
from servesim.profiler.silicon.head_shapes import neighbours, rows_for
from servesim.profiler.silicon.list_schedule import repeated_makespan_us
from servesim.profiler.silicon.moe import ROUTER_US, START_US, ExpertSizes, MoeTimes
from servesim.profiler.silicon.tables import KernelTable
from tests.profiler.silicon_data import TOY, needs_silicon, table, toy_attention

GPUS = ("H100", "H200", "B200", "B300", "GB200", "GB300", "L40S", "A100", "B60", "RTXPRO6000")


def test_heads_lie_between_those_over_the_same_kv_heads() -> None:
    known = [(16, 4), (24, 4), (32, 8), (40, 8)]
    assert neighbours(known, 20, 4) == ((16, 4), (24, 4), 0.5)
    assert neighbours(known, 36, 8) == ((32, 8), (40, 8), 0.5)


def test_kv_heads_lie_between_those_of_the_same_group() -> None:
    known = [(8, 2), (16, 4), (32, 8), (12, 12)]
    assert neighbours(known, 24, 6) == ((16, 4), (32, 8), 0.5)
    assert neighbours(known, 40, 10) == ((16, 4), (32, 8), 1.5)  # the line goes on
    assert neighbours(known, 256, 64) is None  # but not that far


def test_rows_are_on_the_line_between_the_neighbours() -> None:
    fixed = {"head_dim": 64, "kv_cache_dtype": "bfloat16", "num_key_value_heads": 2, "step": 1}
    rows = [
        {**fixed, "num_heads": heads, "batch_size": batch, "us": 1.0 * heads + batch}
        for heads in (4, 8)
        for batch in (1, 2, 16 * heads)
    ]
    found, how = rows_for(
        table("generation", rows), AttentionShape(6, 2, 64, "bfloat16"), ("batch_size", "step")
    )
    assert found.latency_us.tolist() == [7.0, 8.0]  # the batches that both were measured with
    assert how == "6/2 heads between 4/2 and 8/2"


def test_measured_rows_are_taken_as_they_are() -> None:
    fixed = {"head_dim": 64, "kv_cache_dtype": "bfloat16", "num_key_value_heads": 1, "step": 1}
    rows = table("generation", [{**fixed, "num_heads": 2, "batch_size": 1, "us": 3.0}])
    found, how = rows_for(rows, AttentionShape(2, 1, 64, "bfloat16"), ("batch_size", "step"))
    assert (found.latency_us.tolist(), how) == ([3.0], "")
    assert len(rows_for(rows, AttentionShape(4, 2, 64, "bfloat16"), ("batch_size", "step"))[0]) == 0


def test_one_launch_of_flash_attention_3_saves_a_start() -> None:
    times = toy_attention(kernel="toy_flash_attn_fa3")
    both = times.prefill_us(128, 1000) + times.decode_us(8, 500)
    assert times.mixed_us(128, 1000, 8, 500) == pytest.approx(
        both - min(times.base_us, times.decode_us(1, 1))
    )


def test_a_chunk_takes_no_less_than_a_decode_over_the_same_history() -> None:
    times = toy_attention(kernel="toy_flashinfer")
    assert times.prefill_us(16, 16000) >= times.decode_us(1, 16000)


def test_blocks_that_are_many_keep_the_sms_level() -> None:
    # 1000 repeats of 7 blocks of 1 us on 4 SMs: 1750 rounds, whichever of them are counted one by one
    assert repeated_makespan_us([1.0] * 7, 1000, 4) == pytest.approx(1750.0, rel=1e-3)


def test_a_product_takes_whole_waves_of_tiles() -> None:
    tokens = np.array([256.0, 384.0, 512.0])
    # 4 columns of tiles, 5 SMs: 8 tiles of a GEMM too small to be cut like that, 12 and 16 tiles
    assert waves(tokens, 512, SQUARE, 5).tolist() == [1.0, 3.0, 4.0]
    assert waves(tokens, 512, (), 10).tolist() == [1.0, 1.0, 1.0]


def _experts(tp: int = 1, load: str = "balanced", **changes: int) -> MoeTimes:
    fixed = {"moe_dtype": "bfloat16", "hidden_size": 100, "inter_size": 40, "topk": 2, "num_experts": 8}
    rows = [
        {**fixed, "moe_ep_size": 1, "moe_tp_size": 1, "distribution": spread, "num_tokens": tokens, "us": us}
        for spread, slow in (("power_law_1.01", 1.0), ("power_law_1.2", 2.0))
        for tokens in (64, 128, 256, 512)
        for us in (START_US + slow * tokens,)
    ]
    sizes = ExpertSizes(**{"hidden": 100, "inter": 40, "experts": 8, "top_k": 2, **changes})
    return MoeTimes(TOY, table("moe_perf", rows), "bfloat16", sizes, 16.0, tp=tp, load=load)


def test_the_most_even_load_stands_in_for_a_balanced_one() -> None:
    times = _experts()
    assert times.time_us(256, 8) == pytest.approx(ROUTER_US + START_US + 256)
    assert times.notes == ["balanced load was not measured, power_law_1.01 stands in"]
    assert _experts(load="power_law_1.2").time_us(256, 8) == pytest.approx(ROUTER_US + START_US + 512)


def test_a_degree_that_was_not_measured_has_its_share_of_the_work() -> None:
    times = _experts(tp=4, load="power_law_1.01")
    assert times.time_us(256, 8) == pytest.approx(ROUTER_US + START_US + 64)
    assert times.notes == ["tp4 scaled from tp1"]


def test_experts_of_another_size_cost_their_arithmetic() -> None:
    times = _experts(load="power_law_1.01", inter=80)
    assert times.notes == ["8 experts of 100 x 80, top 2, scaled from 8 of 100 x 40, top 2"]
    assert times.token_us == pytest.approx(2.0)


def _cut_short(rows: KernelTable, **where: object) -> KernelTable:
    """All but the rows with 128 tokens or more of these."""
    long = rows.integers("num_tokens") >= 128
    for name, value in where.items():
        long &= rows.columns[name] == value
    return rows.those(~long)


def test_a_degree_measured_with_few_tokens_does_not_count() -> None:
    fixed = {"moe_dtype": "bfloat16", "hidden_size": 100, "inter_size": 40, "topk": 2, "num_experts": 8}
    rows = [
        {**fixed, "moe_ep_size": 1, "moe_tp_size": tp, "num_tokens": tokens, "us": START_US + tokens / tp}
        for tp in (1, 2, 8)
        for tokens in (1, 64, 128, 256)
    ]
    whole = table("moe_perf", rows)
    sizes = ExpertSizes(100, 40, 8, 2)
    assert MoeTimes(TOY, whole, "bfloat16", sizes, 16.0, tp=8).notes == []
    cut = _cut_short(whole, moe_tp_size=8)
    times = MoeTimes(TOY, cut, "bfloat16", sizes, 16.0, tp=8)
    assert times.notes == ["tp8 scaled from tp2"]
    assert times.time_us(256, 8) == pytest.approx(ROUTER_US + START_US + 256 / 8)
    with pytest.raises(InputError, match="no bfloat16 experts were measured on toy"):
        MoeTimes(TOY, _cut_short(whole), "bfloat16", sizes, 16.0)


def test_sizes_measured_with_one_number_of_tokens_are_scaled() -> None:
    fixed = {"moe_dtype": "bfloat16", "hidden_size": 100, "topk": 2, "num_experts": 8}
    rows = [
        {**fixed, "inter_size": inter, "moe_ep_size": 1, "moe_tp_size": 1, "num_tokens": tokens, "us": us}
        for inter in (40, 80, 90)
        for tokens in (64, 128, 256)
        for us in (START_US + inter * tokens,)
    ]
    cut = _cut_short(_cut_short(table("moe_perf", rows), inter_size=80), inter_size=90)
    times = MoeTimes(TOY, cut, "bfloat16", ExpertSizes(100, 80, 8, 2), 16.0)
    assert times.notes == ["8 experts of 100 x 80, top 2, scaled from 8 of 100 x 40, top 2"]
    assert times.token_us == pytest.approx(80.0)


def test_of_a_prompt_measured_twice_the_quicker_counts() -> None:
    once = toy_attention(kernel="toy_flashinfer")
    context = once.context
    twice = KernelTable(
        *(context.name, context.version, np.concatenate([context.latency_us + 2, context.latency_us])),
        {name: np.concatenate([column, column]) for name, column in context.columns.items()},
    )
    again = AttentionTimes(TOY, once.shape, once.generation, twice)
    assert again.pair_us == once.pair_us > 0
    assert again.prefill_us(1024, 2048) == once.prefill_us(1024, 2048)


def test_experts_in_a_format_nobody_measured_are_refused() -> None:
    with pytest.raises(InputError, match="no fp8 experts were measured on toy"):
        MoeTimes(TOY, _experts().table, "fp8", ExpertSizes(100, 40, 8, 2), 8.0)


@needs_silicon
@pytest.mark.parametrize("hardware", GPUS)
def test_every_gpu_makes_small_bundles_of_dense_and_expert_models(hardware: str) -> None:
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.sources import compute
    from servesim.specs.architecture import load_architecture
    from servesim.specs.hardware import load_hardware
    from servesim.specs.model import load_model

    for name in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-14B", "microsoft/Phi-mini-MoE-instruct"):
        model = load_model(name)
        job = ProfileJob(
            model, load_architecture(model.model_type), load_hardware(hardware), tp_degrees=(1, 4),
            max_num_batched_tokens=16, max_num_seqs=16, max_kv=16,
        )  # fmt: skip
        content = compute("silicon", job)
        assert all(row[-1] > 0 for rows in content.tables.values() for row in rows if len(row) != 7)
        assert content.meta["confidence"].startswith("decode ")
        assert content.meta["collectives"]["link"] in ("pcie", "nvlink")


@needs_silicon
def test_an_absent_head_count_is_told_as_derived() -> None:
    from servesim.profiler.silicon.attention import attention_times
    from servesim.profiler.silicon.tables import silicon_gpu
    from servesim.specs.hardware import load_hardware

    gpu = silicon_gpu(load_hardware("A100"))
    low, own, high = (
        attention_times(gpu, AttentionShape(heads, 4, 128, "bfloat16")) for heads in (16, 20, 24)
    )
    assert own.derived_heads == "20/4 heads between 16/4 and 24/4"
    assert low.prompt_us(4096) < own.prompt_us(4096) < high.prompt_us(4096)
    with pytest.raises(InputError, match="nor can it be derived"):
        attention_times(gpu, AttentionShape(7, 7, 96, "bfloat16"))
