"""How many bytes the weights of a model take on an NPU, and the KV cache of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.memory.kv_layers import index_bytes
from servesim.specs import weights
from servesim.specs.kv_formats import head_bytes, latent_bytes
from servesim.specs.layers import Attention, LatentAttention
from servesim.specs.model import load_model
from servesim.specs.weights import stage_layers

if TYPE_CHECKING:
    from servesim.specs.layers import AnyAttention
    from servesim.specs.model import ModelSpec
    from servesim.specs.speculative import SpeculativeSpec

GIB = 1 << 30


def block_weight_bytes(model: ModelSpec, dtype: str, tp: int, ep: int) -> int:
    """Bytes of the last transformer block's weights on one rank: one with experts, where a model has them."""
    stored = model.stored_as(dtype)
    return weights.layer_bytes(stored.layers[-1], stored.formats, tp, ep)


def weight_bytes_per_npu(
    model: ModelSpec,
    dtype: str,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    tile: tuple[int, int] = weights.MXFP4_TILE,
) -> int:
    """Bytes of weights on the NPU that holds most of them, from the model's list of layers.

    Blocks are sharded by ``tp`` (experts by ``ep``) and split over ``pp`` stages; embedding and output head
    are vocabulary-sharded, counted once when tied, and stay in 16 bit when the rest is in 8.
    """
    return weights.rank_bytes(model.stored_as(dtype), tp, pp, ep, tile)


def kv_bytes_per_token(model: ModelSpec, kv_dtype: str, tp: int = 1, pp: int = 1) -> int:
    """KV-cache bytes of one token on one rank, over the layers of the pipeline stage that keeps most.

    Keys and values of every local KV head; for multi-head latent attention the one compressed vector, which
    is not sharded by ``tp``. Layers with a window count as if they kept the whole context.
    """
    sizes = [_kept_bytes(layer.attention, kv_dtype, tp) for layer in model.layers.layers]
    first, most = 0, 0
    for count in stage_layers(len(sizes), pp):
        most = max(most, sum(sizes[first : first + count]))
        first += count
    return most


EAGLE3_VOCABULARY = 32_000
"""Tokens that a published EAGLE-3 drafter chooses among (SafeAILab's and RedHatAI's)."""


def drafter_bytes(
    spec: SpeculativeSpec, model: ModelSpec, dtype: str, kv_dtype: str, tp: int = 1
) -> tuple[int, int]:
    """(weight bytes, KV bytes a token) on one rank of what drafts for ``model``; zeros for n-gram drafts.

    A draft model has its own. EAGLE, EAGLE-3 and MTP are the last block of the target, and the projection
    that merges what they are given: 2 or, EAGLE-3, 3 hidden states into one, in 16 bit. EAGLE-3 also has an
    output head over :data:`EAGLE3_VOCABULARY` tokens; the others use the target's.
    """
    if not spec.has_layers:
        return 0, 0
    if spec.method == "draft_model":
        assert spec.model is not None
        drafter = load_model(spec.model)
        ranks = spec.draft_tp or tp
        return weight_bytes_per_npu(drafter, dtype, ranks), kv_bytes_per_token(drafter, kv_dtype, ranks)
    block, layers = block_weight_bytes(model, dtype, tp, 1), model.num_hidden_layers
    merged = 2 * model.hidden_size**2 * (3 if spec.method == "eagle3" else 2)
    head = 0
    if spec.method == "eagle3":
        head = 2 * model.hidden_size * min(EAGLE3_VOCABULARY, model.vocab_size)
    return block + (merged + head) // tp, kv_bytes_per_token(model, kv_dtype, tp) // layers


def _kept_bytes(attention: AnyAttention | None, kv_dtype: str, tp: int) -> int:
    """Bytes that one layer keeps of a token on one rank."""
    if isinstance(attention, LatentAttention):
        own = latent_bytes(kv_dtype, attention.kv_rank + attention.rope_dim)
        return own + (index_bytes(attention.index_dim) if attention.index_dim else 0)
    if isinstance(attention, Attention) and not attention.shared:
        heads = max(attention.kv_heads // tp, 1)
        return heads * head_bytes(kv_dtype, attention.head_dim, attention.value_dim)
    return 0
