"""Standard decoders whose MLP is a mixture of experts, in every layer or in some."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.specs.families import blocks
from servesim.specs.families.stack import EXPERT_COUNT, Style, standard
from servesim.specs.layers import Experts

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import Tensor

TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)


def routed(
    c: Fields, *, width: str = "moe_intermediate_size", shared_width: int = 0, shared_gate: bool = False
) -> Experts:
    """Experts from the usual fields.

    Raises:
        InputError: a field is missing, or more experts are chosen than there are.
    """
    count, top_k = c.size(*EXPERT_COUNT), c.whole(*TOP_K)
    if not 1 <= top_k <= count:
        raise InputError(
            f"{c.source}: num_experts_per_tok: {top_k} is not allowed; must be 1 to num_experts ({count})"
        )
    return Experts(
        count,
        top_k,
        c.size(width, "moe_intermediate_size", "intermediate_size"),
        shared_width=shared_width,
        shared_gate=shared_gate,
    )


def _every(c: Fields, _index: int) -> Experts | None:
    """Mixtral's: every layer, as wide as ``intermediate_size``."""
    return routed(c, width="intermediate_size")


def qwen_experts(c: Fields, index: int) -> Experts | None:
    """Qwen's: every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``."""
    if index in c.items("mlp_only_layers") or (index + 1) % c.size("decoder_sparse_step", default=1):
        return None
    shared = c.whole("shared_expert_intermediate_size", default=0)
    return routed(c, shared_width=shared, shared_gate=shared > 0)


def after_first(c: Fields, index: int) -> Experts | None:
    """DeepSeek's: all but the first ``first_k_dense_replace`` layers, and of these every
    ``moe_layer_freq``-th; ``mlp_layer_types`` says it layer by layer."""
    kinds = c.items("mlp_layer_types")
    if kinds:
        if kinds[index] != "sparse":
            return None
    elif index < c.whole("first_k_dense_replace", default=0) or index % c.size("moe_layer_freq", default=1):
        return None
    width = c.size("moe_intermediate_size")
    return routed(c, shared_width=width * c.whole("n_shared_experts", "num_shared_experts", default=0))


def _ernie(c: Fields, index: int) -> Experts | None:
    step, first = c.size("moe_layer_interval", default=1), c.whole("moe_layer_start_index", default=0)
    last = c.whole("moe_layer_end_index", default=10**9)
    if not first <= index <= last or (index + 1) % step:
        return None
    width = c.size("moe_intermediate_size")
    return routed(c, shared_width=width * c.whole("moe_num_shared_experts", default=0))


def _hunyuan(c: Fields, _index: int) -> Experts | None:
    width = c.size("moe_intermediate_size", "intermediate_size")
    shared = c.whole("num_shared_expert", default=1) if c.flag("use_mixed_mlp_moe") else 0
    return routed(c, shared_width=c.size("intermediate_size") * shared if shared else 0) if width else None


def _granite(c: Fields, _index: int) -> Experts | None:
    return routed(c, width="intermediate_size", shared_width=c.whole("shared_intermediate_size", default=0))


def _named(name: str, **kinds: object) -> Callable[[Experts, int], tuple[Tensor, ...]]:
    def tensors(e: Experts, hidden: int) -> tuple[Tensor, ...]:
        return blocks.experts(e, hidden, name=name, **kinds)  # type: ignore[arg-type]

    return tensors


_QWEN_ROUTER = _named("mlp", shared="shared_expert")

QWEN3_MOE = Style(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm="head",
    experts=qwen_experts,
    router=_QWEN_ROUTER,
)

_STYLES: dict[str, Style] = {
    "mixtral": Style(experts=_every, router=_named("block_sparse_moe")),
    "phimoe": Style(qkv_bias="attention_bias", o_bias="attention_bias", norm_bias=True,
                    head_bias="lm_head_bias", experts=_every, router=_named("block_sparse_moe")),
    "qwen2_moe": Style(qkv_bias=True, experts=qwen_experts, router=_QWEN_ROUTER),
    "qwen3_moe": QWEN3_MOE,
    "olmoe": Style(qk_norm="whole", experts=_every),
    "minimax_m2": Style(qk_norm="split", experts=_every,
                        router=_named("block_sparse_moe", router_itemsize=4, correction_itemsize=4)),
    "glm4_moe": Style(qkv_bias="attention_bias", qk_norm="head", qk_norm_flag="use_qk_norm",
                      experts=after_first,
                      router=_named("mlp", router_itemsize=4, correction_itemsize=4)),
    "dots1": Style(qkv_bias="attention_bias", qk_norm="head", experts=after_first,
                   router=_named("mlp", correction_itemsize=4)),
    "ernie4_5_moe": Style(qkv_bias="use_bias", o_bias="use_bias", tied=True, experts=_ernie,
                          router=_named("mlp", router_itemsize=4, correction_itemsize=4)),
    "granitemoe": Style(qkv_bias="attention_bias", o_bias="attention_bias", experts=_granite,
                        router=_named("block_sparse_moe")),
    "granitemoeshared": Style(qkv_bias="attention_bias", o_bias="attention_bias", experts=_granite,
                              router=_named("block_sparse_moe")),
    "hunyuan_v1_moe": Style(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head",
                            qk_norm_flag="use_qk_norm", experts=_hunyuan,
                            router=_named("mlp", router_itemsize=4, shared="shared_mlp")),
    "gpt_oss": Style(qkv_bias=True, o_bias=True, sinks=True, experts=_every,
                     router=_named("mlp", router="router", router_bias=True, bias=True)),
}  # fmt: skip

FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    name: partial(standard, style=style) for name, style in _STYLES.items()
}
