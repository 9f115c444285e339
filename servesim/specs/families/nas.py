"""Llama-Nemotron: Llama's block, layer by layer with attention or without and an MLP of its own width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, NotSupportedError
from servesim.specs.families import blocks
from servesim.specs.families.stack import start
from servesim.specs.layers import Attention, Mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import Tensor

_ROUNDING = 256
"""Widths given as a factor are rounded up to a multiple of this."""


def _stack(c: Fields) -> Stack:
    stack = start(c)
    hidden, heads = stack.hidden, c.size("num_attention_heads")
    for index, block in enumerate(c.per_layer("block_configs", c.layer_count("num_hidden_layers"))):
        attention, feed = _part(c, block, "attention", index), _part(c, block, "ffn", index)
        tensors: list[Tensor] = []
        mixer = mlp = None
        if not attention.get("no_op"):
            dim = blocks.head_dim(c)
            mixer = Attention("full", heads, heads // int(attention["n_heads_in_group"]), dim, dim)
            tensors += blocks.norms(hidden, "input_layernorm")
            tensors += blocks.attention(
                mixer, hidden, qkv_bias=c.flag("attention_bias"), o_bias=c.flag("attention_bias")
            )
        if not feed.get("no_op"):
            width = feed.get("intermediate_size") or _width(float(feed["ffn_mult"]), hidden)
            mlp = Mlp(int(width))
            tensors += blocks.norms(hidden, "post_attention_layernorm")
            tensors += blocks.dense_mlp(mlp, hidden, bias=c.flag("mlp_bias"))
        stack.add(mixer, mlp, tuple(tensors))
    return stack


def _width(factor: float, hidden: int) -> int:
    """Llama's rule: two thirds of four times the hidden size times the factor, rounded up."""
    return -(-int(2 * factor * hidden / 3) // _ROUNDING) * _ROUNDING


def _part(c: Fields, block: Any, name: str, index: int) -> dict[str, Any]:
    part = block.get(name) if isinstance(block, dict) else None
    if not isinstance(part, dict):
        raise InputError(f"{c.source}: block_configs[{index}].{name}: is missing; it is required")
    for kind in ("replace_with_linear", "sparsify", "window_length"):
        if part.get(kind):
            raise NotSupportedError(f"{c.source}: block_configs[{index}].{name}.{kind}: is not modelled")
    return part


FAMILIES: dict[str, Callable[[Fields], Stack]] = {"nemotron-nas": _stack, "deci": _stack}
