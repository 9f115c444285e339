"""DeepSeek V4: latent attention over a window and over compressed tokens, hyper-connections, experts in
MXFP4."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from servesim.specs.families import blocks
from servesim.specs.families.moe import routed
from servesim.specs.families.stack import start
from servesim.specs.formats import MXFP4, Rule
from servesim.specs.layers import CompressedAttention, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.formats import WeightFormats

_INDEXED = 4
"""Layers that compress so many tokens to one have an indexer; those of 128 attend all of theirs."""


def _attention(c: Fields, ratio: int) -> CompressedAttention:
    indexed = ratio == _INDEXED
    return CompressedAttention(
        heads=c.size("num_attention_heads"),
        head_dim=c.size("head_dim"),
        rope_dim=c.size("qk_rope_head_dim"),
        window=c.size("sliding_window"),
        ratio=ratio,
        index_dim=c.size("index_head_dim") if indexed else 0,
        index_heads=c.size("index_n_heads") if indexed else 0,
        index_top_k=c.size("index_topk") if indexed else 0,
    )


def _compressor(name: str, width: int, ratio: int, hidden: int) -> tuple[Tensor, ...]:
    """Keys and gates of a group of tokens; groups of four overlap, so that they are twice as wide."""
    wide = width * (2 if ratio == _INDEXED else 1)
    return (
        Tensor(f"{name}.ape", ratio, wide, itemsize=4),
        blocks.plain_matrix(f"{name}.wkv", wide, hidden),
        blocks.plain_matrix(f"{name}.wgate", wide, hidden),
        Tensor(f"{name}.norm", width),
    )


def _attention_tensors(c: Fields, a: CompressedAttention, hidden: int) -> tuple[Tensor, ...]:
    q_rank, o_rank, groups = c.size("q_lora_rank"), c.size("o_lora_rank"), c.size("o_groups")
    width = a.heads * a.head_dim
    tensors = [
        Tensor("attn.attn_sink", a.heads, split="rows", itemsize=4),
        blocks.matrix("attn.wq_a", q_rank, hidden),
        blocks.matrix("attn.wkv", a.head_dim, hidden),
        Tensor("attn.q_norm", q_rank),
        Tensor("attn.kv_norm", a.head_dim),
        blocks.matrix("attn.wq_b", width, q_rank, "rows"),
        blocks.matrix("attn.wo_a", groups * o_rank, width // groups, "rows"),
        blocks.matrix("attn.wo_b", hidden, groups * o_rank, "columns"),
    ]
    if a.ratio:
        tensors += _compressor("attn.compressor", a.head_dim, a.ratio, hidden)
    if a.index_dim:
        tensors.append(blocks.matrix("attn.indexer.wq_b", a.index_heads * a.index_dim, q_rank))
        tensors.append(blocks.plain_matrix("attn.indexer.weights_proj", a.index_heads, hidden))
        tensors += _compressor("attn.indexer.compressor", a.index_dim, a.ratio, hidden)
    return tuple(tensors)


def _hyper(name: str, streams: int, hidden: int) -> tuple[Tensor, ...]:
    """Weights that mix the streams of the residual before and after a half of a block."""
    mixes = 2 * streams + streams * streams
    return (
        Tensor(f"hc_{name}_fn", mixes, streams * hidden, itemsize=4),
        Tensor(f"hc_{name}_base", mixes, itemsize=4),
        Tensor(f"hc_{name}_scale", 3, itemsize=4),
    )


def _stack(c: Fields) -> Stack:
    stack = start(c)
    hidden, streams, count = stack.hidden, c.size("hc_mult"), c.layer_count("num_hidden_layers")
    ratios = c.per_layer("compress_ratios", count)
    hashed = c.whole("num_hash_layers", default=0)
    top_k = c.size("num_experts_per_tok")
    for index in range(count):
        attention = _attention(c, int(ratios[index]))
        mlp = routed(c, shared_width=c.size("moe_intermediate_size") * c.whole("n_shared_experts", default=0))
        by_hash = index < hashed  # these layers choose experts by the token itself
        choice = Tensor("ffn.gate.tid2eid", stack.vocab, top_k, itemsize=4)
        stack.add(
            attention,
            mlp,
            _hyper("attn", streams, hidden),
            _hyper("ffn", streams, hidden),
            blocks.norms(hidden, "attn_norm", "ffn_norm"),
            _attention_tensors(c, attention, hidden),
            blocks.experts(mlp, hidden, name="ffn", correction_itemsize=0 if by_hash else 4),
            (choice,) if by_hash else (),
        )
    stack.kv_format = "fp8_ds_mla"
    stack.formats = partial(_formats, fp4=c.text("expert_dtype", "fp4") == "fp4")
    stack.head = (
        *stack.head,
        Tensor("hc_head_fn", streams, streams * hidden, itemsize=4),
        Tensor("hc_head_base", streams, itemsize=4),
        Tensor("hc_head_scale", 1, itemsize=4),
    )
    return stack


def _formats(formats: WeightFormats, *, fp4: bool) -> WeightFormats:
    """fp8 in blocks with scales of one byte, experts in MXFP4; experts that a list names have the format
    given there. What such a list ignores is left in fp8."""
    if formats.method is None:
        return formats
    *named, linear = formats.rules
    block = replace(linear.format, scale_bytes=1)
    experts = (Rule(("re:.*ffn\\.experts\\..*",), MXFP4),) if fp4 else ()
    rules = (*named, *experts, Rule(linear.patterns, block))
    return replace(
        formats, rules=rules, ignored=("lm_head",), label=formats.label + (", MXFP4 experts" if fp4 else "")
    )


FAMILIES: dict[str, Callable[[Fields], Stack]] = {"deepseek_v4": _stack, "deepseek_ref": _stack}
