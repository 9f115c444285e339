"""A model whose family nobody has described: a stack of standard blocks, unless its config tells of more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError
from servesim.specs.families.moe import TOP_K, qwen_experts, routed
from servesim.specs.families.stack import EXPERT_COUNT, Style, standard
from servesim.specs.layers import Experts

if TYPE_CHECKING:
    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack

_TELLING = (
    *("kv_lora_rank", "index_topk", "compress_ratios", "attention_chunk_size", "num_kv_shared_layers"),
    *(
        "linear_attn_config",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "mamba_d_state",
        "mamba_num_heads",
    ),
    *("ssm_state_size", "state_size", "conv_kernel", "full_attention_interval", "attn_layer_period"),
    *("hybrid_override_pattern", "layers_block_type", "block_configs"),
    *("n_shared_experts", "num_shared_experts", "num_shared_expert", "shared_expert_intermediate_size"),
    *("shared_intermediate_size", "moe_latent_size", "sparse_attention_config"),
)
"""Fields that tell of layers which a standard block has not: latents, states, chunks, shared experts."""


def refuse_other_layers(c: Fields) -> None:
    """
    Raises:
        NotSupportedError: the config has a field that tells of another kind of layer.
    """
    for name in _TELLING:
        if c.truthy(name):
            raise NotSupportedError(
                f"{c.source}: model_type: {c.text('model_type')!r} is not modelled, and {name} tells of "
                "layers that a standard block has not; describe the family in servesim/specs/families, or "
                "use the model_type of one that is modelled"
            )


def standard_block(c: Fields) -> Stack:
    """A stack of standard blocks, dense or of experts, by the usual fields."""
    refuse_other_layers(c)
    experts = _experts if c.truthy(*EXPERT_COUNT) and c.has(*TOP_K) else None
    return standard(c, Style(qkv_bias="attention_bias", experts=experts))


def _experts(c: Fields, index: int) -> Experts | None:
    if index < c.whole("first_k_dense_replace", default=0):
        return None
    width = "moe_intermediate_size" if c.has("moe_intermediate_size") else "intermediate_size"
    return routed(c, width=width) if qwen_experts(c, index) else None
