"""What one rank of a tensor-parallel model computes: the sizes that a profile's layers depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.specs.model import ModelSpec


GEMM_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Dense layers whose GEMMs run over all tokens of a step."""


@dataclass(frozen=True, slots=True)
class RankShapes:
    """Sizes on one of ``tp`` ranks: heads, KV heads (at least one), MLP width and vocabulary are split."""

    tp: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    full_vocab: int

    def gemm(self, layer: str) -> tuple[int, int]:
        """Output and inner size (n, k) of a dense layer's GEMM."""
        return {
            "qkv_proj": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o_proj": (self.hidden, self.heads * self.head_dim),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }[layer]


def rank_shapes(model: ModelSpec, tp: int) -> RankShapes:
    """Sizes on one rank; InputError when the heads cannot be split ``tp`` ways."""
    if tp < 1 or model.num_attention_heads % tp:
        raise InputError(
            f"{model.name}: {model.num_attention_heads} attention heads cannot be split over tp {tp}; "
            f"choose a divisor of {model.num_attention_heads}"
        )
    return RankShapes(
        tp=tp,
        hidden=model.hidden_size,
        heads=model.num_attention_heads // tp,
        kv_heads=max(1, model.num_key_value_heads // tp),
        head_dim=model.head_dim,
        intermediate=model.intermediate_size // tp,
        vocab=model.vocab_size // tp,
        full_vocab=model.vocab_size,
    )


def block_windows(model: ModelSpec) -> list[tuple[int | None, float]]:
    """Attention windows of a model's blocks (None: the whole context), each with its share of them."""
    sliding = model.num_sliding_layers / model.num_hidden_layers
    kinds = [(None, 1.0 - sliding), (model.sliding_window, sliding)]
    return [(window, share) for window, share in kinds if share]
