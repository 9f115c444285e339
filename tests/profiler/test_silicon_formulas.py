"""The silicon source's formulas on kernel tables made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.errors import InputError
from servesim.profiler.silicon.gemm import LAUNCH_US, GemmTimes, tile_edge
from servesim.profiler.silicon.meter import head_norm_us, moved_us
from servesim.profiler.silicon.moe import ROUTER_US, START_US, ExpertSizes, MoeTimes
from servesim.profiler.silicon.skew import SkewModel, num_splits, unequal_lengths
from tests.profiler.silicon_data import TOY, table, toy_attention

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_products_fill_tiles_of_32_rows_to_256_and_of_128_beyond() -> None:
    rows = np.array([1, 100, 128, 129, 200, 256, 257, 384, 385])
    assert tile_edge(rows).tolist() == [1, 100, 128, 160, 224, 256, 384, 384, 512]


def _gemm(us: float = 50.0) -> GemmTimes:
    rows = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "us": us * m / 128}
        for m in (1, 128, 256, 512)
        for n in (100, 200)
        for k in (10, 20)
    ]
    return GemmTimes(TOY, "bfloat16", table("gemm_perf", rows))


def test_a_product_costs_the_tile_it_fills() -> None:
    times = _gemm().time_us(np.array([257, 300, 384]), 100, 10)
    assert times.tolist() == pytest.approx([LAUNCH_US + 150.0] * 3)


def test_a_product_beyond_the_table_is_proportional() -> None:
    base = _gemm().time_us(np.array([512]), 200, 20)[0] - LAUNCH_US
    assert _gemm().time_us(np.array([1024]), 400, 20)[0] - LAUNCH_US == pytest.approx(4 * base)


def _streaming(small_share: float) -> GemmTimes:
    """Weights of 1024 x 1024, six times in an L2 of 16 MB, at a share of their time from DRAM, and larger."""
    rows = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": 1024, "us": _from_dram_us(n) * share}
        for n, share in ((1024, small_share), (2048, 1.0), (3072, 1.0))
        for m in (1, 16)
    ]
    return GemmTimes(replace(TOY, l2_bytes=16e6), "bfloat16", table("gemm_perf", rows))


def _from_dram_us(n: int) -> float:
    return 2.0 + n * 1024 * 2 / 0.8e6  # 2 us and 0.8 TB/s


def test_weights_always_come_from_dram() -> None:
    times = _streaming(0.4)
    assert times.warm
    for n in (1024, 2048, 3072):
        assert times.time_us(np.array([1]), n, 1024)[0] == pytest.approx(LAUNCH_US + _from_dram_us(n))


def test_a_table_without_a_jump_is_taken_as_measured() -> None:
    times = _streaming(0.95)
    assert not times.warm
    assert times.time_us(np.array([1]), 1024, 1024)[0] == pytest.approx(
        LAUNCH_US + 0.95 * _from_dram_us(1024)
    )


def test_a_tile_that_beats_the_peak_stands_for_its_own_rows() -> None:
    """257 rows in 100 us: 384 would be 1.28 times the peak of a GPU that computes 300 rows in that time."""
    rows = [(256, 95.0), (257, 100.0), (512, 185.0)]
    listed = [{"gemm_dtype": "bfloat16", "m": m, "n": 1024, "k": 1024, "us": us} for m, us in rows]
    peak = 2 * 300 * 1024 * 1024 / 100e-6
    limited = replace(TOY, peak_flops_s=(("bfloat16", peak),))
    at = np.array([384, 512])
    assert GemmTimes(TOY, "bfloat16", table("gemm_perf", listed)).time_us(at, 1024, 1024).tolist() == [
        LAUNCH_US + 100.0,
        LAUNCH_US + 185.0,
    ]
    between = 100.0 + 85.0 * (384 - 257) / (512 - 257)
    found = GemmTimes(limited, "bfloat16", table("gemm_perf", listed)).time_us(at, 1024, 1024)
    assert found.tolist() == pytest.approx([LAUNCH_US + between, LAUNCH_US + 185.0])


def test_a_dtype_without_rows_names_those_that_were_measured() -> None:
    with pytest.raises(InputError, match=r"no fp8 GEMMs .* measured: bfloat16"):
        GemmTimes(TOY, "fp8", _gemm().table)


def test_what_fits_l2_moves_faster_than_the_rest() -> None:
    small = moved_us(TOY, np.array([0.38e6]), 2.0)[0]
    assert small == pytest.approx(2.0 + 0.38e6 / 3.5e12 * 1e6)
    assert moved_us(TOY, np.array([1.38e6]), 2.0)[0] == pytest.approx(small + 1e6 / 0.85e12 * 1e6)


def test_head_norms_cost_one_block_a_row() -> None:
    assert head_norm_us(TOY, np.array([4000.0]), 2.0)[0] == pytest.approx(2.0 + 58.0)


def _moe(tp: int = 1) -> MoeTimes:
    fixed = {
        "moe_dtype": "bfloat16",
        "hidden_size": 100,
        "inter_size": 40,
        "topk": 2,
        "num_experts": 8,
        "moe_tp_size": tp,
        "moe_ep_size": 1,
        "distribution": "balanced",
    }
    rows = [{**fixed, "num_tokens": tokens, "us": 10.0 + tokens} for tokens in (64, 128, 256, 512)]
    return MoeTimes(TOY, table("moe_perf", rows), "bfloat16", ExpertSizes(100, 40, 8, 2), 16.0, tp)


def test_few_tokens_pay_for_the_weights_of_the_experts_they_touch() -> None:
    one = 3 * 100 * 40 * 2 / (0.85 * 1e12) * 1e6
    assert _moe().time_us(1, 2) == pytest.approx(ROUTER_US + START_US + 2 * one)
    assert _moe(tp=2).time_us(1, 2) == pytest.approx(ROUTER_US + START_US + one)


def test_all_experts_active_cost_what_was_measured() -> None:
    assert _moe().time_us(256, 8) == pytest.approx(ROUTER_US + 266.0)
    assert _moe().time_us(1024, 8) == pytest.approx(ROUTER_US + 10.0 + 1024.0)


def test_the_toy_prefill_constants_are_found_again() -> None:
    times = toy_attention()
    assert times.tile_start_us == pytest.approx(1.0, rel=0.05)
    assert times.tile_token_us == pytest.approx(0.01, rel=0.01)
    assert times.bandwidth_bytes_s == pytest.approx(1e12, rel=0.001)


def test_a_long_decode_costs_its_kv_bytes() -> None:
    times = toy_attention()
    assert times.decode_us(64, 16383) == pytest.approx(5.0 + times.shape.kv_bytes(64, 16384) / 1e6, rel=0.01)


def test_fp8_kv_halves_the_bytes_of_a_decode() -> None:
    wide, narrow = toy_attention(), toy_attention(kernel="toy_flashinfer", kv_dtype="fp8")
    gain = (narrow.decode_us(64, 16383) - 5.0) / (wide.decode_us(64, 16383) - 5.0)
    assert gain == pytest.approx(0.5, rel=0.01)


def test_history_lengthens_every_round_of_tiles_alike() -> None:
    times = toy_attention()
    # 128 tokens: 2 tiles x 2 heads = 4 blocks, one round on 4 SMs; 192 tokens: 6 blocks, two rounds
    assert times.prefill_us(128, 1000) - times.prompt_us(128) == pytest.approx(1000 * times.tile_token_us)
    assert times.prefill_us(192, 1000) - times.prompt_us(192) == pytest.approx(2000 * times.tile_token_us)


def test_two_launches_cost_their_sum() -> None:
    flashinfer = toy_attention(kernel="toy_flashinfer")
    both = flashinfer.mixed_us(128, 1000, 8, 500)
    assert both == pytest.approx(flashinfer.prefill_us(128, 1000) + flashinfer.decode_us(8, 500))
    fa2 = toy_attention()
    assert fa2.mixed_us(128, 1000, 8, 500) >= fa2.prefill_us(128, 1000)


def test_without_splits_decodes_queue_for_the_sms() -> None:
    times = toy_attention()
    few, many = (times.mixed_us(16, 0, n, 1000) for n in (2, 20))
    per_round = times.tile_start_us + times.tile_token_us * 1001
    assert many - few == pytest.approx((20 - 2) * 2 / 4 * per_round, rel=0.15)


def test_sequences_are_split_only_while_sms_are_idle() -> None:
    assert num_splits(blocks=64, sm_count=10, longest=4096) == 1
    assert num_splits(blocks=1, sm_count=10, longest=128) == 1
    assert num_splits(blocks=1, sm_count=10, longest=4096) > 8


@pytest.mark.parametrize("rate", [0.03, 0.27, 0.85])
def test_unequal_batches_have_the_asked_extremes_and_rate(rate: float) -> None:
    lengths = unequal_lengths(64, rate, 8192, 1 / 16, seed=0)
    assert (min(lengths), max(lengths), len(lengths)) == (512, 8192, 64)
    mean = sum(lengths) / 64
    assert (mean - 512) / (8192 - 512) == pytest.approx(rate, abs=0.03)


def test_unequal_lengths_cost_less_than_the_longest_for_all() -> None:
    model = SkewModel(toy_attention(), token_us=0.02)
    mixed, _ = model.alpha(128, 0, 16, 0.27, 8192)
    alone, batches = model.alpha(0, 0, 64, 0.27, 8192)
    assert 0.0 <= mixed <= 1.0
    assert 0.0 <= alone < 0.5
    assert batches == 4
    assert model.alone_us([700] * 9) == model.alone_us([700] * 9)


def test_unequal_lengths_are_priced_at_the_sizes_around() -> None:
    """And at no other, whose equal lengths may fill their waves worse than those of the table do."""
    sizes = set()

    class Noted(SkewModel):
        def alone_us(self, lengths: Sequence[int]) -> float:
            sizes.add(len(lengths))
            return super().alone_us(lengths)

    Noted(toy_attention(), token_us=0.02).alpha(0, 0, 64, 0.27, 8192)
    assert sizes == {64}


def test_split_decodes_have_no_skew() -> None:
    assert SkewModel(toy_attention(), token_us=0.02).alpha(0, 0, 2, 0.55, 8192) == (0.0, 0)


def test_longer_decodes_than_measured_go_on_by_bytes_and_rate() -> None:
    # every toy decode takes 5 us and its bytes at 1 TB/s, so that a time in proportion is too long
    times = toy_attention()
    for sequences in (1, 4, 64):
        exact = 5.0 + times.shape.kv_bytes(sequences, 131072) / 1e6
        assert times.measured_us(sequences, 131072) == pytest.approx(exact, rel=1e-9)


def test_large_batches_go_on_from_the_lengths_they_have() -> None:
    whole = toy_attention()
    rows = whole.generation
    sizes, lengths = rows.integers("batch_size"), rows.integers("step") + 1
    keep = ~((sizes == 64) & (lengths == 16384))
    columns = {name: values[keep] for name, values in rows.columns.items()}
    short = replace(whole, generation=replace(rows, latency_us=rows.latency_us[keep], columns=columns))
    assert short.measured_us(64, 16384) == pytest.approx(whole.measured_us(64, 16384), rel=1e-9)
    # 40 decodes lie between 16 and 64, of which one length less is known
    assert short.measured_us(40, 16384) == pytest.approx(5.0 + short.shape.kv_bytes(40, 16384) / 1e6, rel=0.1)


def test_no_decode_reads_faster_than_the_memory() -> None:
    times = toy_attention()
    times.bandwidth_bytes_s = 5e12  # a table whose rows were warm
    times._lengths, times._grid = times._lengths[:2], times._grid[:, :2]
    longer = times.measured_us(1, 4096) - times.measured_us(1, 64)
    assert longer == pytest.approx(times.shape.kv_bytes(1, 4096 - 64) / 1e6)
