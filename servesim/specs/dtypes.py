"""Number formats of weights and KV cache, and the names that profile variants are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

WeightDtypeName = Literal["float16", "bfloat16", "float32", "fp8", "int8"]
KvCacheDtypeName = Literal[
    "auto", "bfloat16", "float16", "fp8", "int8",
    "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4", "fp8_ds_mla",
    "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc",
]  # fmt: skip

WEIGHT_DTYPES: tuple[str, ...] = ("float16", "bfloat16", "float32", "fp8", "int8")
KV_CACHE_SIZED: tuple[str, ...] = (
    *("fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4", "fp8_ds_mla"),
    *("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"),
)
"""Formats of vLLM 0.33 whose bytes are known (:mod:`servesim.specs.kv_formats`) and whose kernels nobody
published times of: they are derived."""
KV_CACHE_DTYPES: tuple[str, ...] = (
    *("auto", "bfloat16", "float16"),
    *("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"),
    "int8",
    *KV_CACHE_SIZED,
)
KV_CACHE_ALIASES: dict[str, str] = {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "fp8_inc": "fp8"}
"""Spellings of the engine that cost the same bytes and read the same profile."""

KV_CACHE_NAMED: tuple[str, ...] = (
    *("nvfp4_ds_mla", "nvfp4_4over6", "ultraquant_4bit"),
    *("octave_k3v4", "octave_k3v3", "octave_k3v3_compact"),
)
"""Formats of vLLM 0.33 of which only the name is known here."""

EIGHT_BIT = ("fp8", "int8")
"""Formats of one byte whose arithmetic runs at the 8-bit rate."""
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1, "int8": 1}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fp8": "fp8", "int8": "int8"}


def kv_refusal(name: str) -> str:
    """Why a format of vLLM cannot be simulated, and what is possible; empty: it can, or is no format."""
    if name in KV_CACHE_NAMED:
        return (
            f"{name!r} cannot be simulated: neither its bytes nor its kernel times are known here; simulated "
            f"are {', '.join(KV_CACHE_DTYPES)}"
        )
    return ""


def dtype_bytes(name: str) -> int:
    """Bytes of one element of ``name`` (a canonical name or a KV spelling such as ``fp8_e4m3``)."""
    return _BYTES[_canonical(name)]


def short_dtype(name: str) -> str:
    """``bfloat16`` -> ``bf16``: the spelling in variant folder names."""
    return name if name in KV_CACHE_SIZED else _SHORT[_canonical(name)]


def resolve_kv_dtype(dtype: str, kv_cache_dtype: str) -> str:
    """The format the KV cache is really stored in.

    ``auto`` follows the weights, except that 8-bit weights keep a 16-bit (bfloat16) cache.
    """
    if kv_cache_dtype in KV_CACHE_SIZED:
        return kv_cache_dtype
    if kv_cache_dtype != "auto":
        return _canonical(kv_cache_dtype)
    return "bfloat16" if dtype_bytes(dtype) == 1 else _canonical(dtype)


def variant_name(dtype: str, kv_cache_dtype: str) -> str:
    """Folder name of a profile variant: ``bf16``, ``bf16-kvfp8``, ``fp8``, ``fp8-kvnvfp4``, ...

    A cache whose format is named and as wide as ``auto`` would make it reads the same kernel times.
    """
    wide = resolve_kv_dtype(dtype, kv_cache_dtype)
    like_auto = dtype_bytes(resolve_kv_dtype(dtype, "auto")) == 2
    if kv_cache_dtype == "auto" or (wide not in KV_CACHE_SIZED and like_auto and dtype_bytes(wide) == 2):
        return short_dtype(dtype)
    return f"{short_dtype(dtype)}-kv{short_dtype(kv_cache_dtype)}"


def _canonical(name: str) -> str:
    name = KV_CACHE_ALIASES.get(name, name)
    if name not in _BYTES:
        raise ValueError(f"{name!r} is not a dtype; known: {', '.join(WEIGHT_DTYPES)}")
    return name


def word_unless(refusal: Callable[[str], str]) -> Callable[[str], str]:
    """A reader of an argument that tells why a word is refused, before it is looked for among the choices."""

    def read(text: str) -> str:
        if reason := refusal(text):
            from argparse import ArgumentTypeError

            raise ArgumentTypeError(reason)
        return text

    return read
