"""Llama 4: local attention in chunks but for every fourth layer, experts in all layers or every second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.specs.families import blocks, vision
from servesim.specs.families.moe import routed
from servesim.specs.families.stack import start
from servesim.specs.layers import Experts, Mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp

_DEFAULTS = {
    "interleave_moe_layer_step": 1,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "attention_chunk_size": 8192,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
}


def _stack(c: Fields) -> Stack:
    c = c.with_defaults(_DEFAULTS)
    stack = start(c)
    count, step = c.layer_count("num_hidden_layers"), c.size("interleave_moe_layer_step")
    # A layer without rotary positions sees everything: every fourth, unless the config lists them.
    listed = c.items("no_rope_layers")
    for index in range(count):
        rotary = bool(listed[index]) if len(listed) == count else (index + 1) % 4 != 0
        attention = blocks.grouped(c, "chunked" if rotary else "full")
        mlp: AnyMlp
        if (index + 1) % step == 0:
            mlp = routed(c, width="intermediate_size", shared_width=c.size("intermediate_size"))
        else:
            mlp = Mlp(c.size("intermediate_size_mlp"))
        feed = (
            blocks.experts(mlp, stack.hidden, name="feed_forward", router="router", shared="shared_expert")
            if isinstance(mlp, Experts)
            else blocks.dense_mlp(mlp, stack.hidden, name="feed_forward")
        )
        stack.add(
            attention,
            mlp,
            blocks.norms(stack.hidden, "input_layernorm", "post_attention_layernorm"),
            blocks.attention(
                attention, stack.hidden, qkv_bias=c.flag("attention_bias"), o_bias=c.flag("attention_bias")
            ),
            feed,
        )
    if c.has("vision_config"):
        stack.vision += vision.llama4_vit(c.section("vision_config"), stack.hidden)
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {"llama4": _stack, "llama4_text": _stack}
