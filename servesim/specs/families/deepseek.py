"""Latent attention (MLA), with an indexer that picks the tokens to attend (DSA) or without: DeepSeek V2 to
V3.2, Kimi K2, GLM-5."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from servesim.specs.families import blocks, vision
from servesim.specs.families.moe import after_first
from servesim.specs.families.stack import start
from servesim.specs.layers import Experts, LatentAttention, Mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp, Tensor


def latent(c: Fields, *, indexed: bool) -> LatentAttention:
    """MLA of one layer; ``indexed``: it has an indexer of its own, not the choice of a layer before."""
    top_k = c.whole("index_topk", default=0)
    return LatentAttention(
        heads=c.size("num_attention_heads"),
        kv_rank=c.size("kv_lora_rank"),
        rope_dim=c.size("qk_rope_head_dim"),
        nope_dim=c.size("qk_nope_head_dim"),
        value_dim=c.size("v_head_dim"),
        q_rank=c.whole("q_lora_rank", default=0) or None,
        index_heads=c.size("index_n_heads") if top_k and indexed else 0,
        index_dim=c.size("index_head_dim") if top_k and indexed else 0,
        index_top_k=top_k,
    )


def _indexed(c: Fields, count: int) -> list[bool]:
    """Which layers run the indexer: all, or those that ``indexer_types`` calls full."""
    if not c.has("indexer_types"):
        return [True] * count
    return [kind == "full" for kind in c.per_layer("indexer_types", count)]


def _stack(c: Fields, *, correction: bool) -> Stack:
    """``correction``: the router has a load-balancing term, as those of sigmoid scores do."""
    stack = start(c)
    count = c.layer_count("num_hidden_layers")
    indexed = _indexed(c, count)
    correction = correction or c.text("topk_method") == "noaux_tc"

    def block(index: int) -> tuple[LatentAttention, AnyMlp, tuple[Tensor, ...]]:
        attention = latent(c, indexed=index >= count or indexed[index])
        mlp: AnyMlp = after_first(c, min(index, count - 1)) or Mlp(c.size("intermediate_size"))
        feed = (
            blocks.experts(mlp, stack.hidden, correction_itemsize=4 if correction else 0)
            if isinstance(mlp, Experts)
            else blocks.dense_mlp(mlp, stack.hidden)
        )
        both = blocks.norms(stack.hidden, "input_layernorm", "post_attention_layernorm")
        return attention, mlp, (*both, *blocks.latent_attention(attention, stack.hidden), *feed)

    for index in range(count):
        stack.add(*block(index))
    for index in range(c.layer_count("num_nextn_predict_layers", default=0)):
        attention, mlp, tensors = block(count + index)
        around = (
            *blocks.norms(stack.hidden, "enorm", "hnorm", "shared_head.norm"),
            blocks.matrix("eh_proj", stack.hidden, 2 * stack.hidden),
        )
        stack.add_mtp(attention, mlp, around, tensors)
    return stack


def _kimi_vl(c: Fields, *, correction: bool) -> Stack:
    stack = _stack(c, correction=correction)
    if c.has("vision_config"):
        stack.vision += vision.moon_vit(c.section("vision_config"), stack.hidden)
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    "deepseek_v2": partial(_stack, correction=False),
    "deepseek_v3": partial(_kimi_vl, correction=True),
    "deepseek_v32": partial(_stack, correction=True),
    "kimi_k2": partial(_kimi_vl, correction=True),
    "glm_moe_dsa": partial(_stack, correction=True),
    "glm4_moe_lite": partial(_stack, correction=True),
}
