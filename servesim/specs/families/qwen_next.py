"""Gated delta nets with full attention in every fourth layer: Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError
from servesim.specs.families import blocks, vision
from servesim.specs.families.moe import qwen_experts
from servesim.specs.families.stack import start
from servesim.specs.layers import Mlp, Recurrent, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp

_DEFAULTS = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "head_dim": 256,
}


def _kinds(c: Fields, count: int) -> list[str]:
    if c.has("layer_types"):
        return [str(kind) for kind in c.per_layer("layer_types", count)]
    every = c.size("full_attention_interval")
    return ["linear_attention" if (index + 1) % every else "full_attention" for index in range(count)]


def _delta_net(c: Fields, stack: Stack) -> tuple[Recurrent, tuple[Tensor, ...]]:
    """Queries and keys of ``key_heads``, values, gate, decay and step size of ``value_heads``."""
    key_heads, value_heads = c.size("linear_num_key_heads"), c.size("linear_num_value_heads")
    key_dim, value_dim = c.size("linear_key_head_dim"), c.size("linear_value_head_dim")
    kernel = c.size("linear_conv_kernel_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    name = "linear_attn"
    tensors = (
        blocks.matrix(f"{name}.in_proj_qkv", channels, stack.hidden, "rows"),
        blocks.matrix(f"{name}.in_proj_z", values, stack.hidden, "rows"),
        blocks.matrix(f"{name}.in_proj_b", value_heads, stack.hidden, "rows"),
        blocks.matrix(f"{name}.in_proj_a", value_heads, stack.hidden, "rows"),
        Tensor(f"{name}.conv1d", channels, kernel, "rows"),
        Tensor(f"{name}.A_log", value_heads, split="rows", itemsize=4),
        Tensor(f"{name}.dt_bias", value_heads, split="rows", itemsize=4),
        Tensor(f"{name}.norm", value_dim),
        blocks.matrix(f"{name}.out_proj", stack.hidden, values, "columns"),
    )
    memory = 4 if c.text("mamba_ssm_dtype") == "float32" else 2
    return Recurrent(
        "gated_delta_net", channels, kernel, value_heads, value_dim, key_dim, memory_itemsize=memory
    ), tensors


def _stack(c: Fields) -> Stack:
    c = c.with_defaults(_DEFAULTS)
    stack = start(c)
    count = c.layer_count("num_hidden_layers")
    both = blocks.norms(stack.hidden, "input_layernorm", "post_attention_layernorm")
    full = blocks.grouped(c, "full")
    attend = blocks.attention(full, stack.hidden, qk_norm="head", gate=c.flag("attn_output_gate", True),
                              qkv_bias=c.flag("attention_bias"))  # fmt: skip

    def feed(index: int) -> tuple[AnyMlp, tuple[Tensor, ...]]:
        mlp = qwen_experts(c, index) if c.has("num_experts") else None
        if mlp is not None:
            return mlp, blocks.experts(mlp, stack.hidden, shared="shared_expert")
        dense = Mlp(c.size("intermediate_size"))
        return dense, blocks.dense_mlp(dense, stack.hidden)

    for index, kind in enumerate(_kinds(c, count)):
        mlp, tensors = feed(index)
        if kind == "full_attention":
            stack.add(full, mlp, both, attend, tensors)
        elif kind == "linear_attention":
            recurrent, own = _delta_net(c, stack)
            stack.add(recurrent, mlp, both, own, tensors)
        else:
            raise NotSupportedError(
                f"{c.source}: layer_types[{index}]: {kind!r} is not modelled; known: full_attention, "
                "linear_attention"
            )
    for _ in range(c.layer_count("mtp_num_hidden_layers", "num_nextn_predict_layers", default=0)):
        mlp, tensors = feed(count - 1)
        around = (
            *blocks.norms(stack.hidden, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
            blocks.matrix("fc", stack.hidden, 2 * stack.hidden),
        )
        stack.add_mtp(full, mlp, around, both, attend, tensors)
    if c.has("vision_config"):
        stack.vision += vision.qwen_vit(c.section("vision_config"))
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    "qwen3_next": _stack,
    "qwen3_5": _stack,
    "qwen3_5_text": _stack,
    "qwen3_5_moe": _stack,
    "qwen3_5_moe_text": _stack,
}
