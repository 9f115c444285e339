"""What dtypes cost and how variants are named."""

from __future__ import annotations

import pytest

from servesim.specs.dtypes import (
    WEIGHT_DTYPES,
    dtype_bytes,
    resolve_kv_dtype,
    short_dtype,
    variant_name,
)


def test_fp8_kv_takes_half_the_bytes_of_bf16() -> None:
    assert dtype_bytes(resolve_kv_dtype("bfloat16", "auto")) == 2
    assert dtype_bytes(resolve_kv_dtype("bfloat16", "fp8")) == 1


@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_8_bit_weights_keep_a_16_bit_cache(weights: str) -> None:
    assert resolve_kv_dtype(weights, "auto") == "bfloat16"


@pytest.mark.parametrize("weights", ["float16", "bfloat16", "float32"])
def test_an_auto_cache_follows_wide_weights(weights: str) -> None:
    assert resolve_kv_dtype(weights, "auto") == weights


@pytest.mark.parametrize(
    ("weights", "kv", "variant"),
    [
        ("bfloat16", "auto", "bf16"),
        ("bfloat16", "fp8", "bf16-kvfp8"),
        ("bfloat16", "fp8_e5m2", "bf16-kvfp8"),
        ("bfloat16", "int8", "bf16-kvint8"),
        ("float16", "fp8", "fp16-kvfp8"),
        ("float32", "auto", "fp32"),
        ("fp8", "auto", "fp8"),
        ("fp8", "fp8", "fp8-kvfp8"),
        ("int8", "auto", "int8"),
    ],
)
def test_a_variant_names_weights_and_cache(weights: str, kv: str, variant: str) -> None:
    assert variant_name(weights, kv) == variant


def test_every_pair_of_dtypes_has_a_variant_of_its_own() -> None:
    plain_kv = ["auto", "fp8", "int8"]
    names = {variant_name(weights, kv) for weights in WEIGHT_DTYPES for kv in plain_kv}
    assert len(names) == len(WEIGHT_DTYPES) * len(plain_kv)


@pytest.mark.parametrize("kv", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["bfloat16", "float16", "fp8", "int8"])
def test_a_16_bit_cache_is_what_auto_makes(weights: str, kv: str) -> None:
    assert variant_name(weights, kv) == variant_name(weights, "auto")
    assert dtype_bytes(resolve_kv_dtype(weights, kv)) == 2


def test_a_16_bit_cache_beside_32_bit_weights() -> None:
    assert variant_name("float32", "bfloat16") == "fp32-kvbf16"


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp4' is not a dtype; known: float16"):
        short_dtype("fp4")
