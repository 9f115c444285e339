"""Gemma 1 to 4: norms around both halves of a block, sliding windows, tied embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError
from servesim.specs.families import blocks, vision
from servesim.specs.families.moe import routed
from servesim.specs.families.stack import Style, standard, start
from servesim.specs.layers import Attention, Mlp, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _first(c: Fields) -> Stack:
    return standard(c, Style(tied=True, defaults={"head_dim": 256}))


def _second(c: Fields) -> Stack:
    """Every second layer slides."""
    defaults = {"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2}
    return standard(c, Style(tied=True, norms=_NORMS, defaults=defaults, qkv_bias="attention_bias"))


_GEMMA3 = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
}
"""The library's defaults, which multimodal configs leave out."""


def _third(c: Fields) -> Stack:
    style = Style(
        tied=True,
        norms=_NORMS,
        defaults=_GEMMA3,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
    )
    stack = standard(c, style)
    if c.has("vision_config"):
        stack.vision += vision.siglip(c.section("vision_config"), stack.hidden)
    return stack


def _fourth(c: Fields) -> Stack:
    """Full layers have wider heads, fewer of them for keys, and values that are the keys; some have experts
    beside the dense network."""
    if c.whole("hidden_size_per_layer_input", default=0):
        raise NotSupportedError(
            f"{c.source}: hidden_size_per_layer_input: embeddings of every layer are not modelled"
        )
    stack = start(c, tied=True)
    count = c.layer_count("num_hidden_layers")
    kinds = blocks.attention_kinds(c, count)
    shared_from = count - c.whole("num_kv_shared_layers", default=0)
    for index, kind in enumerate(kinds):
        wide = kind == "full"
        attention = blocks.grouped(
            c,
            kind,
            index=index,
            dim=c.size("global_head_dim", "head_dim") if wide else c.size("head_dim"),
            kv_heads=c.size("num_global_key_value_heads", "num_key_value_heads") if wide else None,
        )
        if index >= shared_from:
            attention = Attention(attention.kind, attention.heads, attention.kv_heads, attention.head_dim,
                                  attention.value_dim, attention.reach, shared=True)  # fmt: skip
        stack.add(
            attention,
            *_fourth_feed(c, attention, stack.hidden, key_is_value=wide and c.flag("attention_k_eq_v")),
        )
    if c.has("vision_config"):
        stack.vision += vision.gemma4_vit(c.section("vision_config"), stack.hidden)
    return stack


def _fourth_feed(
    c: Fields, attention: Attention, hidden: int, *, key_is_value: bool
) -> tuple[AnyMlp, tuple[Tensor, ...]]:
    width = c.size("intermediate_size")
    mlp: AnyMlp = (dense := Mlp(width))
    tensors = [
        *blocks.norms(hidden, *_NORMS),
        # The engine keeps a matrix of values of its own, loaded with the keys'.
        *blocks.attention(
            attention, hidden, qk_norm="head", qkv_bias=c.flag("attention_bias"), value_is_key=key_is_value
        ),
        *blocks.dense_mlp(dense, hidden),
    ]
    if c.flag("enable_moe_block"):
        mlp = replace(routed(c), dense_width=width)
        tensors += blocks.norms(
            hidden,
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        )
        tensors += [
            Tensor("router.proj", mlp.count, hidden),
            Tensor("router.scale", hidden),
            Tensor("router.per_expert_scale", mlp.count),
        ]
        tensors += blocks.network("experts", hidden, mlp.width, copies=mlp.count)
    return mlp, tuple(tensors)


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    "gemma": _first,
    "gemma2": _second,
    "gemma3": _third,
    "gemma3_text": _third,
    "gemma4": _fourth,
    "gemma4_text": _fourth,
}
