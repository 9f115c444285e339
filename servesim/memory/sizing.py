"""How many bytes the weights of a model take on an NPU, and the KV cache of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from servesim.specs.model import ModelSpec

GIB = 1 << 30
_HALF = 2  # bytes of a 16-bit float


def attention_params(model: ModelSpec, tp: int) -> int:
    """Parameters of one layer's attention projections on one rank; KV heads are replicated once tp exceeds
    them."""
    hidden, head = model.hidden_size, model.head_dim
    if model.is_mla:
        rank, rope = model.kv_lora_rank or 0, model.qk_rope_head_dim or 0
        return hidden * (rank + rope) + (hidden + rank) * model.num_attention_heads * head * 2 // tp
    heads = model.num_attention_heads // tp
    kv_heads = max(model.num_key_value_heads // tp, 1)
    return hidden * (heads + 2 * kv_heads) * head + heads * head * hidden


def block_weight_bytes(model: ModelSpec, dtype: str, tp: int, ep: int) -> int:
    """Bytes of one transformer block's weights on one rank. Norms and the MoE router stay in 16 bit or
    more."""
    size = dtype_bytes(dtype)
    plain = max(size, _HALF)
    hidden = model.hidden_size
    weights = attention_params(model, tp) * size + 2 * hidden * plain
    if model.is_moe:
        experts = 3 * hidden * model.moe_intermediate_size * model.num_experts
        return weights + experts * size // (ep if ep > 1 else tp) + hidden * model.num_experts * plain
    return weights + 3 * hidden * model.intermediate_size * size // tp


def stage_layers(num_layers: int, pp: int) -> list[int]:
    """Blocks of each pipeline stage: as even as possible, the remainder to the stages before the last."""
    layers = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        layers[pp - 2 - extra] += 1
    return layers


def weight_bytes_per_npu(model: ModelSpec, dtype: str, tp: int = 1, pp: int = 1, ep: int = 1) -> int:
    """Bytes of weights on the NPU that holds most of them.

    Blocks are sharded by ``tp`` (experts by ``ep``) and split over ``pp`` stages; embedding and output head
    are vocabulary-sharded, counted once when tied, and stay in 16 bit when the rest is in 8.
    """
    plain = max(dtype_bytes(dtype), _HALF)
    vocabulary = model.vocab_size * model.hidden_size * plain // tp
    block = block_weight_bytes(model, dtype, tp, ep)
    layers = stage_layers(model.num_hidden_layers, pp)
    stages = [count * block for count in layers]
    stages[0] += vocabulary
    stages[-1] += model.hidden_size * plain
    if not (model.tie_word_embeddings and pp == 1):
        stages[-1] += vocabulary
    return max(stages)


def kv_bytes_per_token(model: ModelSpec, kv_dtype: str, tp: int = 1, pp: int = 1) -> int:
    """KV-cache bytes of one token on one rank, over the layers of the longest pipeline stage.

    Keys and values of every local KV head; for multi-head latent attention the one compressed vector, which
    is not sharded by ``tp``.
    """
    layers = max(stage_layers(model.num_hidden_layers, pp))
    if model.is_mla:
        width = (model.kv_lora_rank or 0) + (model.qk_rope_head_dim or 0)
    else:
        width = 2 * max(model.num_key_value_heads // tp, 1) * model.head_dim
    return layers * width * dtype_bytes(kv_dtype)
