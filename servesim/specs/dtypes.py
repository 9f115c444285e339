"""Number formats of weights and KV cache, and the names that profile variants are made of."""

from __future__ import annotations

from typing import Literal

WeightDtypeName = Literal["float16", "bfloat16", "float32", "fp8", "int8"]
KvCacheDtypeName = Literal["auto", "bfloat16", "float16", "fp8", "int8"]

WEIGHT_DTYPES: tuple[str, ...] = ("float16", "bfloat16", "float32", "fp8", "int8")
KV_CACHE_DTYPES: tuple[str, ...] = (
    *("auto", "bfloat16", "float16"),
    *("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"),
    "int8",
)
KV_CACHE_ALIASES: dict[str, str] = {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "fp8_inc": "fp8"}
"""Spellings of the engine that cost the same bytes and read the same profile."""

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1, "int8": 1}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fp8": "fp8", "int8": "int8"}


def dtype_bytes(name: str) -> int:
    """Bytes of one element of ``name`` (a canonical name or a KV spelling such as ``fp8_e4m3``)."""
    return _BYTES[_canonical(name)]


def short_dtype(name: str) -> str:
    """``bfloat16`` -> ``bf16``: the spelling in variant folder names."""
    return _SHORT[_canonical(name)]


def resolve_kv_dtype(dtype: str, kv_cache_dtype: str) -> str:
    """The format the KV cache is really stored in.

    ``auto`` follows the weights, except that 8-bit weights keep a 16-bit (bfloat16) cache.
    """
    if kv_cache_dtype != "auto":
        return _canonical(kv_cache_dtype)
    return "bfloat16" if dtype_bytes(dtype) == 1 else _canonical(dtype)


def variant_name(dtype: str, kv_cache_dtype: str) -> str:
    """Folder name of a profile variant: ``bf16``, ``bf16-kvfp8``, ``fp8``, ``fp8-kvfp8``, ...

    A cache whose format is named and as wide as ``auto`` would make it reads the same kernel times.
    """
    wide = resolve_kv_dtype(dtype, kv_cache_dtype)
    if kv_cache_dtype == "auto" or dtype_bytes(wide) == dtype_bytes(resolve_kv_dtype(dtype, "auto")) == 2:
        return short_dtype(dtype)
    return f"{short_dtype(dtype)}-kv{short_dtype(kv_cache_dtype)}"


def _canonical(name: str) -> str:
    name = KV_CACHE_ALIASES.get(name, name)
    if name not in _BYTES:
        raise ValueError(f"{name!r} is not a dtype; known: {', '.join(WEIGHT_DTYPES)}")
    return name
