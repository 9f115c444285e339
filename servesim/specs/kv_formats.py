"""Formats of the KV cache that vLLM 0.33 knows, and the bytes that one head keeps of one token in each.

The figures are those of vLLM's cache specs: 8- and 4-bit formats per token and head carry a 32-bit scale for
the keys and one for the values; NVFP4 a byte for each 16 elements; the TurboQuant slots hold packed keys
(with a 16-bit norm, unless they are fp8) and packed values with a 16-bit scale and zero point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.specs.layers import Attention, LatentAttention

if TYPE_CHECKING:
    from servesim.specs.layers import AnyAttention

_BITS: dict[str, float] = {
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "fp8": 8,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "int8": 8,
    "fp8_per_token_head": 8,
    "int8_per_token_head": 8,
    "int4_per_token_head": 4,
    "nvfp4": 4.5,
}
_SCALED = ("fp8_per_token_head", "int8_per_token_head", "int4_per_token_head")
_SCALES_BYTES = 8
_TURBO: dict[str, tuple[int, int, int]] = {
    "turboquant_k8v4": (8, 4, 4),
    "turboquant_4bit_nc": (4, 4, 6),
    "turboquant_k3v4_nc": (3, 4, 6),
    "turboquant_3bit_nc": (3, 3, 6),
}
"""Bits of a key's and of a value's element, and bytes beside them."""
_DS_MLA_BYTES = 656
"""DeepSeek's own fp8 slot: 512 latent bytes, four scales of 32 bit, 64 rotary elements in 16 bit."""
KV_FORMATS: tuple[str, ...] = (*_BITS, *_TURBO, "fp8_ds_mla")


def head_bytes(kv_format: str, key_dim: int, value_dim: int) -> int:
    """Bytes of one token's key and value of one head.

    Raises:
        InputError: no such format, or one that has no place for values apart from keys.
    """
    if kv_format in _TURBO:
        key_bits, value_bits, beside = _TURBO[kv_format]
        return _even(-(-key_dim * key_bits // 8) + -(-value_dim * value_bits // 8) + beside)
    size = _elements(kv_format, key_dim + value_dim)
    return size + (_SCALES_BYTES if kv_format in _SCALED else 0)


def latent_bytes(kv_format: str, width: int) -> int:
    """Bytes of one token's latent vector (MLA).

    Raises:
        InputError: no such format for latent vectors.
    """
    if kv_format == "fp8_ds_mla":
        return _DS_MLA_BYTES
    if kv_format in _TURBO or kv_format == "nvfp4":
        raise InputError(f"kv_cache_dtype: {kv_format!r} is not allowed for latent attention (MLA)")
    return _elements(kv_format, width) + (_SCALES_BYTES if kv_format in _SCALED else 0)


def format_bytes(kv_format: str, attention: AnyAttention) -> float:
    """Bytes that one layer keeps of a token in a format; 0: it keeps none.

    Raises:
        InputError: there is no such format for this kind of attention.
    """
    if isinstance(attention, LatentAttention):
        return float(latent_bytes(kv_format, attention.kv_rank + attention.rope_dim))
    if isinstance(attention, Attention):
        return float(attention.kv_heads * head_bytes(kv_format, attention.head_dim, attention.value_dim))
    return 0.0


def _elements(kv_format: str, count: int) -> int:
    if kv_format not in _BITS:
        raise InputError(f"kv_cache_dtype: {kv_format!r} is not allowed; known: {', '.join(KV_FORMATS)}")
    return int(count * _BITS[kv_format]) // 8


def _even(size: int) -> int:
    return size + size % 2
