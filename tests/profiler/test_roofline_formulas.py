"""Kernel times from peak rates, worked out by hand on an accelerator with round numbers."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.profiler.roofline.efficiency import (
    Efficiency,
    efficiency_of,
    fits,
    share_at,
    typical,
    with_overrides,
)
from servesim.profiler.roofline.formulas import (
    AttentionShape,
    ExpertShape,
    accelerator,
    all_reduce_us,
    decode_us,
    gemm_us,
    mean_keys,
    moe_us,
    moved_us,
    prefill_us,
)
from servesim.specs.hardware import HardwareSpec, RooflineSpec, load_hardware
from tests.profiler.roofline_toy import PERFECT, TOY, TOY_HARDWARE, toy

SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=64, kv_bytes=2)


def test_a_product_of_one_token_streams_its_weights() -> None:
    # 4096 x 4096 in 16 bit are 33.6 MB: 33.6 us; its 64 tiles of 64 x 64 are 6.4 waves of 0.45 us.
    streamed = (4096 * 4096 * 2 + 4096 * 2 + 4096 * 2) / 1e6
    computed = 6.4 * 10 * 64 * 64 * 2 * (4096 + 256) / (1e9 * 0.8)
    assert computed == pytest.approx(2.85, abs=0.01)
    time = float(gemm_us(TOY, 1, 4096, 4096, "bfloat16"))
    assert time == pytest.approx((streamed**3.5 + computed**3.5) ** (1 / 3.5))
    assert time == pytest.approx(streamed, rel=1e-3)


def test_a_large_product_runs_at_the_peak_rate() -> None:
    flop = 2 * 8192 * 8192 * 8192
    padded = flop * (8192 + 256) / 8192  # filling and draining the pipelines costs 512 bytes of k
    assert float(gemm_us(TOY, 8192, 8192, 8192, "bfloat16")) == pytest.approx(padded / 1e9, rel=0.01)


def test_8_bit_gemms_halve_the_weights_and_pay_to_quantise() -> None:
    one = float(gemm_us(TOY, 1, 4096, 4096, "fp8"))
    assert one == pytest.approx(float(gemm_us(TOY, 1, 4096, 4096, "bfloat16")) / 2, rel=0.01)
    narrow = float(gemm_us(TOY, 8192, 64, 4096, "fp8"))
    assert narrow > 8192 * 4096 * 3 / 1e6  # reading 16-bit activations and writing 8-bit ones


def test_8_bit_weights_stream_faster_without_8_bit_rates() -> None:
    plain = accelerator(
        TOY_HARDWARE.model_copy(update={"peak_tflops": {"bfloat16": 1000.0}}), efficiency=PERFECT
    )
    assert plain.rate("fp8") == (1e9, False)
    assert float(gemm_us(plain, 1, 4096, 4096, "fp8")) < 20.0
    large = [float(gemm_us(plain, 8192, 4096, 4096, dtype)) for dtype in ("fp8", "bfloat16")]
    assert large[0] == pytest.approx(large[1], rel=0.05)


def test_decodes_stream_their_kv_at_the_share_that_is_reached() -> None:
    # 4 sequences of 1000 tokens: 4 x 1000 x 2 x 2 x 64 x 2 bytes = 2.048 MB at half of 1 MB/us.
    assert float(decode_us(TOY, SHAPE, 4, 999)) == pytest.approx(10.0 + 4.096)


def test_every_kv_head_of_every_sequence_costs_its_block() -> None:
    blocks = toy(decode_block_us=0.01)
    assert float(decode_us(blocks, SHAPE, 4, 999)) == pytest.approx(10.0 + 4 * 2 * 0.01 + 4.096)


def test_fp8_kv_halves_the_streamed_bytes() -> None:
    small = AttentionShape(8, 2, 64, kv_bytes=1)
    assert float(decode_us(TOY, small, 4, 999)) == pytest.approx(10.0 + 2.048)


def test_a_window_caps_what_a_decode_reads() -> None:
    sliding = AttentionShape(8, 2, 64, kv_bytes=2, window=128)
    assert float(decode_us(TOY, sliding, 4, 100_000)) == float(decode_us(TOY, SHAPE, 4, 127))
    assert float(decode_us(TOY, sliding, 4, 50)) == float(decode_us(TOY, SHAPE, 4, 50))


def test_prefill_pays_for_every_pair_and_half_a_tile() -> None:
    # 128 tokens are a whole number of row tiles: 8 heads x 128 rows x (64.5 + 64) keys x 4 x 64 flop.
    flop = 8 * 128 * (64.5 + 64) * 4 * 64
    streamed = (128 * 512 + 128 * 8 * 64 * 4) / (1e6 * 0.8)
    expected = (flop / 1e9) ** 3 + streamed**3
    assert float(prefill_us(TOY, SHAPE, 128, 0)) == pytest.approx(expected ** (1 / 3))


@given(
    chunk=st.integers(1, 200),
    history=st.integers(0, 300),
    window=st.integers(1, 250),
)
def test_mean_keys_counts_what_each_token_sees(chunk: int, history: int, window: int) -> None:
    sliding = AttentionShape(1, 1, 8, 2, window=window)
    seen = [min(history + i, window) for i in range(1, chunk + 1)]
    found = mean_keys(sliding, np.float64(chunk), np.float64(history))
    assert float(found) == pytest.approx(sum(seen) / chunk)


def test_few_experts_stream_fewer_weights() -> None:
    experts = ExpertShape(hidden=1024, inter=512, top_k=2, dtype="bfloat16")
    one_expert = 3 * 1024 * 512 * 2 / 1e6
    few, many = (float(moe_us(TOY, experts, 1, active)) for active in (2, 8))
    assert few == pytest.approx(2 * one_expert, rel=0.35)
    assert many > 3 * few


def test_moved_bytes_go_at_the_memorys_speed_beyond_the_cache() -> None:
    assert float(moved_us(TOY, 5e6)) == pytest.approx(2.0 + 5.0)
    cached = accelerator(TOY_HARDWARE, efficiency=PERFECT)
    assert float(moved_us(cached, 5e6)) == pytest.approx(2.0 + 5.0 / 3.5)


def test_an_all_reduce_of_two_ranks_sends_its_payload_once() -> None:
    assert float(all_reduce_us(TOY, 2, 1e6)) == pytest.approx(5.0 + 1e6 / (1e5 * 0.5))
    assert float(all_reduce_us(TOY, 1, 1e6)) == 0.0


@given(
    tokens=st.integers(1, 20_000),
    more=st.integers(0, 20_000),
    n=st.integers(1, 40_000),
    k=st.integers(64, 20_000),
    dtype=st.sampled_from(["bfloat16", "fp8"]),
)
def test_gemms_never_beat_the_roofline(tokens: int, more: int, n: int, k: int, dtype: str) -> None:
    less, greater = gemm_us(TOY, np.array([tokens, tokens + more]), n, k, dtype)
    assert less <= greater * (1 + 1e-12)
    element = 1 if dtype == "fp8" else 2
    assert less >= max(2 * tokens * n * k / TOY.rate(dtype)[0], n * k * element / 1e6) * (1 - 1e-12)


@given(chunk=st.integers(1, 5000), history=st.integers(0, 100_000), extra=st.integers(0, 100_000))
def test_history_never_makes_a_chunk_cheaper(chunk: int, history: int, extra: int) -> None:
    less, greater = prefill_us(TOY, SHAPE, chunk, np.array([history, history + extra]))
    assert less <= greater * (1 + 1e-12)


def test_a_share_may_be_a_curve_over_size() -> None:
    curve = ((1.0, 0.2), (100.0, 0.6))
    assert share_at(curve, [0.5, 1, 10, 100, 1000]).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    slow = toy(decode_stream=((1.0, 0.25), (4.0, 0.5)))
    assert float(decode_us(slow, SHAPE, 4, 999)) == float(decode_us(TOY, SHAPE, 4, 999))
    assert float(decode_us(slow, SHAPE, 1, 999)) > float(decode_us(TOY, SHAPE, 1, 999))


def test_the_hardware_file_may_state_every_constant() -> None:
    constants = {field.name for field in fields(Efficiency)}
    assert set(RooflineSpec.model_fields) == constants | {"launch_us"}


def test_what_the_hardware_file_states_wins_over_every_fit() -> None:
    stated = RooflineSpec(product_compute=0.33, launch_us=4.5, decode_start_us=7.0)
    changed = with_overrides(PERFECT, stated)
    assert changed.product_compute == 0.33
    assert changed.moved_start_us == 2.0 + 3.0  # 1.5 us of launch are in every start
    assert changed.decode_start_us == 7.0


def test_gpus_not_measured_have_the_median_constants() -> None:
    own = fits()["gpus"]["h100_sxm"]
    assert efficiency_of(load_hardware("H100")).product_stream == own["product_stream"]
    assert efficiency_of(load_hardware("MI300X")) == typical()
    assert efficiency_of(load_hardware("NPU-X")) == typical()


def test_leaving_a_gpu_out_leaves_its_fit_out() -> None:
    gpus = fits()["gpus"]
    assert typical(set(gpus) - {"l40s"}).product_stream == gpus["l40s"]["product_stream"]


def test_fitted_shares_are_physical() -> None:
    for gpu in fits()["gpus"].values():
        shares = {name: value for name, value in gpu.items() if not name.endswith(("_us", "_tail"))}
        assert all(0.0 < value < 1.05 for value in shares.values())
        assert all(value >= 0.0 for value in gpu.values())
        assert all(math.isfinite(value) for value in gpu.values())


@pytest.mark.parametrize("missing", ["memory_bandwidth_gbs", "l2_mib", "sm_count"])
def test_a_hardware_file_without_a_needed_fact_names_it(missing: str) -> None:
    hardware = TOY_HARDWARE.model_copy(update={missing: None})
    with pytest.raises(InputError, match=rf"configs/hardware/Toy.yaml: {missing}: is missing"):
        accelerator(hardware)


def test_unknown_hardware_is_told_where_to_put_its_file() -> None:
    with pytest.raises(InputError, match=r"configs/hardware/Nothing.yaml: memory_bandwidth_gbs: is missing"):
        accelerator(HardwareSpec(name="Nothing"))


def test_a_dtype_without_a_peak_rate_is_refused() -> None:
    with pytest.raises(InputError, match=r"peak_tflops.float32: is missing"):
        gemm_us(TOY, 1, 64, 64, "float32")
