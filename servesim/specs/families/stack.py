"""What the function of a family hands back, and how the layers of the standard block are made."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError
from servesim.slotted import dataclass
from servesim.specs.families import blocks
from servesim.specs.layers import AnyAttention, AnyMlp, Experts, Layer, Mlp, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from servesim.specs.families.reading import Fields
    from servesim.specs.formats import WeightFormats
    from servesim.specs.layers import Attention


EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts."""


@dataclass(slots=True)
class Stack:
    """A model in the making."""

    hidden: int
    vocab: int
    context: int
    tied: bool
    embedding: tuple[Tensor, ...] = ()
    head: tuple[Tensor, ...] = ()
    layers: list[Layer] = field(default_factory=list)
    mtp: list[Layer] = field(default_factory=list)
    vision: list[Tensor] = field(default_factory=list)
    formats: Callable[[WeightFormats], WeightFormats] | None = None
    """What the family makes of the config's weight formats, where it reads them in its own way."""
    kv_format: str | None = None
    """Format of the KV cache that the engine gives the family whatever is asked for."""

    def add(self, attention: AnyAttention | None, mlp: AnyMlp | None, *tensors: tuple[Tensor, ...]) -> None:
        """One more layer."""
        flat = tuple(tensor for group in tensors for tensor in group)
        self.layers.append(Layer(attention, mlp, flat, f"layers.{len(self.layers)}."))

    def add_mtp(
        self, attention: AnyAttention | None, mlp: AnyMlp | None, *tensors: tuple[Tensor, ...]
    ) -> None:
        """One more layer that drafts tokens."""
        flat = tuple(tensor for group in tensors for tensor in group)
        self.mtp.append(Layer(attention, mlp, flat, f"layers.{len(self.layers) + len(self.mtp)}."))


def start(c: Fields, *, tied: bool = False, norm_bias: bool = False, head_bias: bool = False) -> Stack:
    """Embedding and head from the usual fields; ``tied``: the default of ``tie_word_embeddings``."""
    hidden, vocab = c.size("hidden_size", "n_embd"), c.size("vocab_size")
    tied = c.flag("tie_word_embeddings", tied)
    return Stack(
        hidden,
        vocab,
        c.size("max_position_embeddings", "n_positions", "max_sequence_length", default=4096),
        tied,
        blocks.embedding(vocab, hidden),
        blocks.head(vocab, hidden, tied=tied, norm_bias=norm_bias, bias=head_bias),
    )


@dataclass(frozen=True, slots=True)
class Style:
    """What tells one family of standard blocks from another: attention, then an MLP, each with its norms."""

    qkv_bias: bool | str = False
    """Or the field that says so."""
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: blocks.Norm = "none"
    qk_norm_flag: str | None = None
    """The field without which there is no such norm."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    gated: bool = True
    tied: bool = False
    head_bias: bool | str = False
    sinks: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Of the library, where configs leave a field out."""
    experts: Callable[[Fields, int], Experts | None] | None = None
    """The experts of a layer; None: its MLP is dense."""
    router: Callable[[Experts, int], tuple[Tensor, ...]] | None = None
    """Parameters of such a layer's experts, where they are not the usual ones."""


def standard(c: Fields, style: Style) -> Stack:
    """A stack of standard blocks."""
    c = c.with_defaults(style.defaults)
    if style.experts is None and c.truthy(*EXPERT_COUNT):
        raise NotSupportedError(
            f"{c.source}: num_experts: is not modelled for model_type {c.text('model_type')!r}, whose blocks "
            "have a dense MLP; name the family that the checkpoint really is of"
        )
    stack = start(c, tied=style.tied, norm_bias=style.norm_bias, head_bias=_flag(c, style.head_bias))
    count = c.layer_count("num_hidden_layers", "n_layer", "num_layers")
    kinds = blocks.attention_kinds(c, count)
    for index in range(count):
        attention = blocks.grouped(c, kinds[index], index=index)
        mlp: AnyMlp | None = style.experts(c, index) if style.experts else None
        mlp = mlp or Mlp(c.size("intermediate_size", "ffn_hidden_size", "n_inner"), style.gated)
        stack.add(
            attention,
            mlp,
            blocks.norms(stack.hidden, *style.norms, bias=style.norm_bias),
            attention_tensors(c, attention, style, stack.hidden),
            mlp_tensors(c, mlp, style, stack.hidden),
        )
    return stack


def attention_tensors(c: Fields, attention: Attention, style: Style, hidden: int) -> tuple[Tensor, ...]:
    normed = style.qk_norm_flag is None or c.flag(style.qk_norm_flag)
    return blocks.attention(
        attention,
        hidden,
        qkv_bias=_flag(c, style.qkv_bias),
        o_bias=_flag(c, style.o_bias),
        qk_norm=style.qk_norm if normed else "none",
        sinks=style.sinks,
    )


def mlp_tensors(c: Fields, mlp: AnyMlp, style: Style, hidden: int) -> tuple[Tensor, ...]:
    if isinstance(mlp, Mlp):
        return blocks.dense_mlp(mlp, hidden, bias=_flag(c, style.mlp_bias))
    if style.router is not None:
        return style.router(mlp, hidden)
    return blocks.experts(mlp, hidden)


def _flag(c: Fields, said: bool | str) -> bool:
    return said if isinstance(said, bool) else c.flag(said)
