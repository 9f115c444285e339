"""MiniMax M3: grouped-query attention whose indexer picks blocks of tokens, dense layers before layers of
experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.specs.families import blocks, vision
from servesim.specs.families.moe import routed
from servesim.specs.families.stack import start
from servesim.specs.layers import Attention, Mlp, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp


def _stack(c: Fields) -> Stack:
    stack = start(c)
    hidden, count = stack.hidden, c.layer_count("num_hidden_layers")
    sparse = c.section("sparse_attention_config")
    indexed = (
        sparse.per_layer("sparse_attention_freq", count)
        if sparse.flag("use_sparse_attention")
        else [0] * count
    )
    routes = c.per_layer("moe_layer_freq", count)
    full = blocks.grouped(c, "full")
    for index in range(count):
        attention = full
        extra: tuple[Tensor, ...] = ()
        if indexed[index]:
            heads, dim = sparse.size("sparse_num_index_heads"), sparse.size("sparse_index_dim")
            attention = Attention(
                "full", full.heads, full.kv_heads, full.head_dim, full.value_dim, index_dim=dim
            )
            extra = (
                blocks.matrix("self_attn.index_q_proj", heads * dim, hidden, "kv_heads", dim),
                blocks.matrix("self_attn.index_k_proj", dim, hidden),
                Tensor("self_attn.index_q_norm", dim),
                Tensor("self_attn.index_k_norm", dim),
            )
        mlp: AnyMlp
        if routes[index]:
            shared = c.size("shared_intermediate_size") * c.whole("n_shared_experts", default=0)
            mlp = routed(c, width="intermediate_size", shared_width=shared)
            feed = blocks.experts(
                mlp, hidden, name="block_sparse_moe", router_itemsize=4, correction_itemsize=4
            )
        else:
            mlp = Mlp(c.size("dense_intermediate_size"))
            feed = blocks.dense_mlp(mlp, hidden)
        stack.add(
            attention,
            mlp,
            blocks.norms(hidden, "input_layernorm", "post_attention_layernorm"),
            blocks.attention(attention, hidden, qk_norm="head"),
            extra,
            feed,
        )
    if c.has("vision_config"):
        stack.vision += vision.minimax_vit(
            c.section("vision_config"), hidden, c.size("projector_hidden_size", default=hidden)
        )
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {"minimax_m3": _stack, "minimax_m3_vl": _stack}
