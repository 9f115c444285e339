"""KV formats without kernels of their own: derived from bytes, said so, and run by the engine."""

from __future__ import annotations

import pytest

from servesim.memory.sizing import kv_bytes_per_token
from servesim.profiler.silicon.kv_narrow import ConvertedTimes, ScaledTimes
from servesim.results.stated_errors import DERIVED, stated_error
from servesim.specs.dtypes import KV_CACHE_SIZED, resolve_kv_dtype, variant_name
from servesim.specs.kv_formats import format_bytes
from servesim.specs.layers import Attention
from servesim.specs.model import load_model
from tests.profiler.roofline_toy import build_bundle, job
from tests.profiler.silicon_data import toy_attention

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("kv_format", "size"),
    [
        ("bfloat16", 131072),
        ("fp8", 65536),
        ("fp8_per_token_head", 67584),
        ("nvfp4", 36864),
        ("int4_per_token_head", 34816),
        ("turboquant_k8v4", 2 * 8 * 16 * 196),
        ("turboquant_3bit_nc", 2 * 8 * 16 * 102),
    ],
)
def test_a_token_of_llama_takes_what_vllm_keeps(kv_format: str, size: int) -> None:
    assert kv_bytes_per_token(load_model(LLAMA), kv_format) == size


def test_formats_of_latent_attention_keep_one_vector() -> None:
    assert kv_bytes_per_token(load_model("deepseek-ai/DeepSeek-R1"), "fp8", 8) == 61 * 576


@pytest.mark.parametrize("kv_format", KV_CACHE_SIZED)
def test_every_format_has_a_variant_of_its_own(kv_format: str) -> None:
    from servesim.cost.finding import has_public_format, variant_dtypes

    variant = variant_name("bfloat16", kv_format)
    assert variant == f"bf16-kv{kv_format}"
    assert variant_dtypes(variant) == ("bfloat16", kv_format)
    assert has_public_format(variant)
    assert resolve_kv_dtype("fp8", kv_format) == kv_format


def test_what_grows_with_the_context_shrinks_with_the_bytes() -> None:
    near = toy_attention(kernel="toy_flashinfer", kv_dtype="fp8")
    half = ScaledTimes(near, 0.5, "nvfp4", "fp8")
    start, long = near.decode_us(32, 16), near.decode_us(32, 8192)
    assert half.decode_us(32, 8192) == pytest.approx(start + (long - start) / 2)
    assert half.decode_us(32, 16) == start
    assert half.prefill_us(512, 1024) == near.prefill_us(512, 1024)
    saved = near.decode_us(32, 8192) - half.decode_us(32, 8192)
    assert half.mixed_us(512, 0, 32, 8192) == pytest.approx(near.mixed_us(512, 0, 32, 8192) - saved)
    assert "nvfp4 KV derived from the fp8 kernel" in half.notes[-1]


def test_before_ada_steps_take_what_was_measured() -> None:
    wide = toy_attention()
    times = ConvertedTimes(wide, lambda tokens: 100.0 + tokens)
    whole = wide.prefill_us(512, 0) + 612.0
    assert times.prefill_us(512, 0) + 612.0 == pytest.approx(1.034 * whole)
    decode = wide.decode_us(32, 4096) + 132.0
    assert times.decode_us(32, 4096) + 132.0 == pytest.approx(0.997 * decode)
    more = times.mixed_us(512, 0, 32, 4096) - wide.mixed_us(512, 0, 32, 4096)
    assert more == pytest.approx(0.034 * whole)


def test_a_derived_format_has_a_wide_band() -> None:
    meta = {"source": "silicon", "tables": {"moe": "measured"}}
    assert stated_error(meta, "H100", "bfloat16").percent < 10
    assert stated_error(meta, "H100", "nvfp4").percent == DERIVED
    narrow = {"source": "silicon", "tables": {"moe": "derived: derived from 16-bit experts and 4.25 bits"}}
    assert "experts derived" in stated_error(narrow, "H100", "bfloat16").reason


def test_bytes_of_a_format_count_its_scales() -> None:
    a = Attention("full", 32, 8, 128, 128)
    assert format_bytes("nvfp4", a) / format_bytes("fp8", a) == 0.5625
    assert format_bytes("int4_per_token_head", a) == 8 * 136


def test_the_roofline_reads_fewer_bytes_of_a_smaller_format() -> None:
    rows = {
        kv: {row[:4]: row[4] for row in build_bundle(job(kv_cache_dtype=kv)).tables[1, "attention.csv"]}
        for kv in ("fp8", "int4_per_token_head")
    }
    point = (0, 0, 16, 1024)
    assert rows["int4_per_token_head"][point] < rows["fp8"][point]


def test_slots_that_were_measured_are_no_derived_format() -> None:
    assert stated_error({"source": "silicon"}, "H200", "fp8_ds_mla").percent < DERIVED
    assert stated_error({"source": "roofline"}, "NPU-X", "int4_per_token_head").percent == DERIVED
