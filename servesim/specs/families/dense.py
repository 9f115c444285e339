"""Standard decoders with a dense MLP: Llama and what follows its plan."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from servesim.specs.families import blocks
from servesim.specs.families.stack import Style, standard

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack

_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_AROUND = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

LLAMA = Style(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")
QWEN2 = Style(qkv_bias=True)
QWEN3 = Style(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head")

_STYLES: dict[str, Style] = {
    "llama": LLAMA,
    "mistral": Style(),
    "ministral": Style(),
    "ministral3": Style(),
    "mistral3": Style(),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": Style(),
    "granite": Style(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "olmo2": Style(qk_norm="whole", norms=_AFTER, qkv_bias="attention_bias"),
    "olmo3": Style(qk_norm="whole", norms=_AFTER, qkv_bias="attention_bias"),
    "exaone4": Style(qk_norm="head", norms=_AFTER),
    "seed_oss": Style(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "internlm2": Style(qkv_bias="bias", o_bias="bias"),
    "internlm3": Style(qkv_bias="qkv_bias", o_bias="bias", mlp_bias="bias"),
    "ernie4_5": Style(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", tied=True),
    "glm": Style(qkv_bias="attention_bias"),
    "glm4": Style(qkv_bias="attention_bias", norms=_AROUND),
    "hunyuan_v1_dense": Style(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head",
                              qk_norm_flag="use_qk_norm"),
    "smollm3": LLAMA,
    "nemotron": Style(norm_bias=True, gated=False, qkv_bias="attention_bias", o_bias="attention_bias",
                      mlp_bias="mlp_bias"),
    "arcee": Style(gated=False, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "starcoder2": Style(norm_bias=True, gated=False, qkv_bias="use_bias", o_bias="use_bias",
                        mlp_bias="use_bias", tied=True, defaults={"use_bias": True}),
    "cohere": Style(norms=("input_layernorm",), qk_norm="split", qk_norm_flag="use_qk_norm", tied=True),
    "cohere2": Style(norms=("input_layernorm",), tied=True),
}  # fmt: skip


def _mimo(c: Fields) -> Stack:
    """Qwen2's block, and layers that draft: two norms and a projection of the last hidden state and the next
    token's embedding before a block of the same kind."""
    stack = standard(c, QWEN2)
    for _ in range(c.layer_count("num_nextn_predict_layers", default=0)):
        block = stack.layers[-1]
        hidden = stack.hidden
        stack.add_mtp(
            block.attention,
            block.mlp,
            blocks.norms(hidden, "token_layernorm", "hidden_layernorm", "final_layernorm"),
            (blocks.matrix("input_proj", hidden, 2 * hidden),),
            block.tensors,
        )
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    **{name: partial(standard, style=style) for name, style in _STYLES.items()},
    "mimo": _mimo,
}
