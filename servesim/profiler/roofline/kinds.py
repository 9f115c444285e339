"""Attention of every kind from peak rates: over windows, latent vectors or chosen tokens, and with a state.

Latent attention is a module with its matrix products, as the public tables measure it: its decodes multiply
into the latent space and read one vector a token, its prompts expand the vectors to keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.profiler.roofline.formulas import (
    AttentionShape,
    decode_us,
    gemm_us,
    mean_keys,
    overlapped,
    prefill_us,
)
from servesim.profiler.silicon.states import computed_times
from servesim.specs.block_layers import is_module
from servesim.specs.kv_formats import latent_bytes
from servesim.specs.layers import Attention, CompressedAttention, LatentAttention, Recurrent
from servesim.specs.weights import rank_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.meter import AttentionBatch
    from servesim.profiler.roofline.formulas import Accelerator, Floats
    from servesim.specs.block_layers import AttentionGroup

INDEX_KEY_BYTES = 132
"""Of one token's key for an indexer: 128 elements in 8 bit and a scale of 32."""
MSA_TOKENS = 2048
"""Tokens that an indexer beside keys and values per head chooses, where its config is not read for it."""
SPARSE_SHARE = 0.5
"""Share of the dense kernels' rates that gathering chosen tokens reaches; that of the public tables is 0.4 to
0.7 for decodes on H100 and B200."""
SHARPNESS = 2.0


@dataclass(frozen=True, slots=True)
class Formats:
    """Arithmetic and bits of the weights of a module's products, and the format of the KV cache."""

    dtype: str
    weight_bits: float | None
    """None: those of the arithmetic."""
    kv_format: str
    kv_element_bytes: float
    """Of one element of keys and values a head, scales included."""


def kind_us(
    acc: Accelerator, group: AttentionGroup, tp: int, formats: Formats, batches: Sequence[AttentionBatch]
) -> list[float]:
    """us of one layer of a group for each batch: its chunk, and beside it its decodes."""
    chunk, history, decodes, kv = np.array([batch.point for batch in batches], dtype=np.float64).T
    a = group.attention
    if isinstance(a, Recurrent):
        times = computed_times(acc.bytes_per_us * 1e6, 1.0 / acc.flop_per_us["bfloat16"], a, tp)
        return [times.mixed_us(*batch.point) for batch in batches]
    if is_module(a):
        return list(map(float, _module_us(acc, group, tp, formats, (chunk, history, decodes, kv))))
    assert isinstance(a, Attention)
    heads = -(-a.heads // tp), max(1, a.kv_heads // tp)
    shape = AttentionShape(*heads, a.head_dim, formats.kv_element_bytes, a.reach)
    prefill = prefill_us(acc, shape, np.maximum(chunk, 1), history)
    decode = decode_us(acc, shape, np.maximum(decodes, 1), kv)
    both = np.where(chunk > 0, prefill, 0.0) + np.where(decodes > 0, decode, 0.0)
    return list(map(float, both))


def _module_us(
    acc: Accelerator,
    group: AttentionGroup,
    tp: int,
    formats: Formats,
    points: tuple[Floats, Floats, Floats, Floats],
) -> Floats:
    """The products over all tokens at once, then attention of the chunk and of the decodes."""
    chunk, history, decodes, kv = points
    rows = np.maximum(chunk + decodes, 1.0)
    time = np.zeros(len(rows))
    for tensor in group.tensors:
        if tensor.matrix:
            _, n, k = rank_shape(tensor, tp)
            time = time + gemm_us(acc, rows, n, k, formats.dtype, formats.weight_bits)
    heads = -(-getattr(group.attention, "heads", 1) // tp)
    prefill = _prefill_us(acc, group, heads, formats, np.maximum(chunk, 1.0), history)
    decode = _decode_us(acc, group, heads, formats, np.maximum(decodes, 1.0), kv + 1.0)
    result: Floats = time + np.where(chunk > 0, prefill, 0.0) + np.where(decodes > 0, decode, 0.0)
    return result


def _decode_us(
    acc: Accelerator, group: AttentionGroup, heads: int, formats: Formats, count: Floats, kv: Floats
) -> Floats:
    a = group.attention
    bytes_us, flop_us = 1.0 / (0.85 * acc.bytes_per_us), 1.0 / (0.5 * acc.flop_per_us["bfloat16"])
    index_us = np.zeros(len(count))
    sparse = 1.0
    if isinstance(a, LatentAttention):
        width, value, seen = a.kv_rank + a.rope_dim, a.kv_rank, kv
        vector = float(latent_bytes(formats.kv_format, width))
        if a.index_top_k:
            index_us = count * kv * INDEX_KEY_BYTES * bytes_us
            seen, sparse = np.minimum(kv, a.index_top_k), SPARSE_SHARE
    elif isinstance(a, CompressedAttention):
        width = value = a.head_dim
        vector = float(a.head_dim) + 72.0  # fp8, rotary elements and scales beside
        seen = np.minimum(kv, a.window) + (kv / a.ratio if a.ratio else 0.0)
        if a.index_top_k:
            index_us = count * kv / a.ratio * INDEX_KEY_BYTES * bytes_us
            seen, sparse = np.minimum(kv, a.window) + np.minimum(kv / a.ratio, a.index_top_k), SPARSE_SHARE
    else:
        assert isinstance(a, Attention)
        index_us = count * kv * a.index_dim * 2 * bytes_us
        seen, sparse = np.minimum(kv, MSA_TOKENS), SPARSE_SHARE
        width = value = a.head_dim
        vector = 2.0 * max(a.kv_heads * heads // a.heads, 1) * a.head_dim * formats.kv_element_bytes
    streamed = count * seen * vector * bytes_us / sparse
    computed = count * seen * heads * 2.0 * (width + value) * flop_us / sparse
    time: Floats = acc.efficiency.decode_start_us + index_us + overlapped(streamed, computed, SHARPNESS)
    return time


def _prefill_us(
    acc: Accelerator, group: AttentionGroup, heads: int, formats: Formats, chunk: Floats, history: Floats
) -> Floats:
    a = group.attention
    flop_us = 1.0 / (0.6 * acc.flop_per_us["bfloat16"])
    all_keys = mean_keys(AttentionShape(1, 1, 1, 1), chunk, history)
    keys, index_us, sparse = all_keys, np.zeros(len(chunk)), 1.0
    expand_us: Floats = np.zeros(len(chunk))
    if isinstance(a, LatentAttention):
        pair = 2.0 * (a.nope_dim + a.rope_dim + a.value_dim)
        if a.index_top_k:
            pair = 2.0 * (2 * a.kv_rank + a.rope_dim)
            index_us = chunk * all_keys * a.index_heads * 2.0 * a.index_dim * flop_us / 2  # in 8 bit
            keys, sparse = np.minimum(all_keys, a.index_top_k), SPARSE_SHARE
        else:
            n = heads * (a.nope_dim + a.value_dim)
            again = gemm_us(acc, np.maximum(history, 1.0), n, a.kv_rank, formats.dtype, formats.weight_bits)
            expand_us = np.where(history > 0, again, 0.0)
    elif isinstance(a, CompressedAttention):
        pair, sparse = 4.0 * a.head_dim, SPARSE_SHARE
        far = all_keys / a.ratio if a.ratio else 0.0 * all_keys
        if a.index_top_k:
            index_us = chunk * far * a.index_heads * 2.0 * a.index_dim * flop_us / 2
            far = np.minimum(far, a.index_top_k)
        keys = np.minimum(all_keys, a.window) + far
    else:
        assert isinstance(a, Attention)
        pair, sparse = 4.0 * a.head_dim, SPARSE_SHARE
        index_us = chunk * all_keys * 2.0 * a.index_dim * flop_us
        keys = np.minimum(all_keys, MSA_TOKENS)
    computed = chunk * keys * heads * pair * flop_us / sparse
    time: Floats = acc.efficiency.prefill_start_us + index_us + expand_us + computed
    return time
