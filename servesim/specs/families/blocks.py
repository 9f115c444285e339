"""Parameters of the blocks that most families are made of, named as in their checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from servesim.errors import InputError
from servesim.specs.layers import Attention, Experts, LatentAttention, Mlp, Tensor

if TYPE_CHECKING:
    from servesim.specs.families.reading import Fields

Norm = Literal["none", "head", "whole", "split"]
"""Norms of queries and keys: none, over each head, over all heads together on every rank, or split over
ranks."""


def matrix(
    name: str, rows: int, columns: int, split: str = "whole", unit: int = 1, copies: int = 1
) -> Tensor:
    return Tensor(name, rows, columns, split, unit, copies, matrix=True)  # type: ignore[arg-type]


def plain_matrix(name: str, rows: int, columns: int, split: str = "whole") -> Tensor:
    """A weight that no quantised checkpoint holds in another format: embeddings, routers, convolutions."""
    return Tensor(name, rows, columns, split)  # type: ignore[arg-type]


def norms(hidden: int, *names: str, bias: bool = False) -> tuple[Tensor, ...]:
    """Weights of layer norms, with their biases if they have them."""
    out = [Tensor(name, hidden) for name in names]
    out += [Tensor(f"{name}.bias", hidden) for name in names if bias]
    return tuple(out)


def attention(
    a: Attention,
    hidden: int,
    *,
    name: str = "self_attn",
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: Norm = "none",
    sinks: bool = False,
    gate: bool = False,
    value_is_key: bool = False,
    output: str = "o_proj",
) -> tuple[Tensor, ...]:
    """Projections of grouped-query attention; ``gate``: queries come with a gate of the output as wide."""
    q, k, v = a.heads * a.head_dim * (2 if gate else 1), a.kv_heads * a.head_dim, a.kv_heads * a.value_dim
    out = [matrix(f"{name}.q_proj", q, hidden, "rows")]
    if not a.shared:
        out.append(matrix(f"{name}.k_proj", k, hidden, "kv_heads", a.head_dim))
        own = not value_is_key  # else the engine keeps a second copy of the keys' matrix
        out.append(Tensor(f"{name}.v_proj", v, hidden, "kv_heads", a.value_dim, matrix=True, stored=own))
    out.append(matrix(f"{name}.{output}", hidden, a.heads * a.value_dim, "columns"))
    if qkv_bias:
        out.append(Tensor(f"{name}.q_proj.bias", q, split="rows"))
        out.append(Tensor(f"{name}.k_proj.bias", k, split="kv_heads", unit=a.head_dim))
        out.append(Tensor(f"{name}.v_proj.bias", v, split="kv_heads", unit=a.value_dim))
    if o_bias:
        out.append(Tensor(f"{name}.{output}.bias", hidden))
    if qk_norm == "head":
        out += [Tensor(f"{name}.q_norm", a.head_dim), Tensor(f"{name}.k_norm", a.head_dim)]
    elif qk_norm == "whole":
        out += [Tensor(f"{name}.q_norm", a.heads * a.head_dim), Tensor(f"{name}.k_norm", k)]
    elif qk_norm == "split":
        out.append(Tensor(f"{name}.q_norm", a.heads * a.head_dim, split="rows"))
        out.append(Tensor(f"{name}.k_norm", k, split="kv_heads", unit=a.head_dim))
    if sinks:
        out.append(Tensor(f"{name}.sinks", a.heads, split="rows"))
    return tuple(out)


def latent_attention(a: LatentAttention, hidden: int, name: str = "self_attn") -> tuple[Tensor, ...]:
    """Projections of multi-head latent attention and of its indexer."""
    queries = a.heads * (a.nope_dim + a.rope_dim)
    out = []
    if a.q_rank:
        out.append(matrix(f"{name}.q_a_proj", a.q_rank, hidden))
        out.append(Tensor(f"{name}.q_a_layernorm", a.q_rank))
        out.append(matrix(f"{name}.q_b_proj", queries, a.q_rank, "rows"))
    else:
        out.append(matrix(f"{name}.q_proj", queries, hidden, "rows"))
    out.append(matrix(f"{name}.kv_a_proj_with_mqa", a.kv_rank + a.rope_dim, hidden))
    out.append(Tensor(f"{name}.kv_a_layernorm", a.kv_rank))
    out.append(matrix(f"{name}.kv_b_proj", a.heads * (a.nope_dim + a.value_dim), a.kv_rank, "rows"))
    out.append(matrix(f"{name}.o_proj", hidden, a.heads * a.value_dim, "columns"))
    if a.index_dim:
        out.append(matrix(f"{name}.indexer.wq_b", a.index_heads * a.index_dim, a.q_rank or hidden))
        # Run as one with the next, which is in 16 bit.
        out.append(Tensor(f"{name}.indexer.wk", a.index_dim, hidden, matrix=True, upcast=True))
        out.append(Tensor(f"{name}.indexer.k_norm", a.index_dim, itemsize=4))
        out.append(Tensor(f"{name}.indexer.k_norm.bias", a.index_dim, itemsize=4))
        out.append(plain_matrix(f"{name}.indexer.weights_proj", a.index_heads, hidden))
    return tuple(out)


def dense_mlp(m: Mlp, hidden: int, *, name: str = "mlp", bias: bool = False) -> tuple[Tensor, ...]:
    """Gate, up and down projection, or up and down alone."""
    return network(name, hidden, m.width, gated=m.gated, bias=bias)


def network(
    name: str, hidden: int, width: int, *, gated: bool = True, bias: bool = False, copies: int = 1
) -> tuple[Tensor, ...]:
    """A feed-forward network, or the ``copies`` of it that experts are."""
    ups = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    out = [matrix(f"{name}.{up}", width, hidden, "rows", copies=copies) for up in ups]
    out.append(matrix(f"{name}.down_proj", hidden, width, "columns", copies=copies))
    if bias:
        out += [Tensor(f"{name}.{up}.bias", width, split="rows", copies=copies) for up in ups]
        out.append(Tensor(f"{name}.down_proj.bias", hidden, copies=copies))
    return tuple(out)


def experts(
    e: Experts,
    hidden: int,
    *,
    name: str = "mlp",
    bias: bool = False,
    router: str = "gate",
    router_bias: bool = False,
    router_itemsize: int | None = None,
    correction_itemsize: int = 0,
    shared: str = "shared_experts",
) -> tuple[Tensor, ...]:
    """Router, routed experts and shared ones; ``correction_itemsize``: bytes of an element of the router's
    load-balancing correction, 0: none."""
    out = [Tensor(f"{name}.{router}", e.count, hidden, itemsize=router_itemsize)]
    if router_bias:
        out.append(Tensor(f"{name}.{router}.bias", e.count))
    if correction_itemsize:
        out.append(Tensor(f"{name}.{router}.e_score_correction_bias", e.count, itemsize=correction_itemsize))
    inner = e.latent or hidden
    if e.latent:
        out.append(matrix(f"{name}.fc1_latent_proj", inner, hidden))
        out.append(matrix(f"{name}.fc2_latent_proj", hidden, inner))
    out += network(f"{name}.experts", inner, e.width, gated=e.gated, bias=bias, copies=e.count)
    if e.shared_width:
        out += network(f"{name}.{shared}", hidden, e.shared_width, gated=e.gated)
    if e.shared_gate:
        out.append(Tensor(f"{name}.shared_expert_gate", 1, hidden))
    return tuple(out)


def embedding(vocab: int, hidden: int, name: str = "embed_tokens") -> tuple[Tensor, ...]:
    return (Tensor(name, vocab, hidden, "vocabulary"),)


def head(
    vocab: int, hidden: int, *, tied: bool, norm_bias: bool = False, bias: bool = False
) -> tuple[Tensor, ...]:
    """Last norm and output matrix (none where that is the embedding)."""
    out = list(norms(hidden, "norm", bias=norm_bias))
    if not tied:
        out.append(Tensor("lm_head", vocab, hidden, "vocabulary", matrix=True))
    if bias:
        out.append(Tensor("lm_head.bias", vocab, split="vocabulary"))
    return tuple(out)


def head_dim(c: Fields) -> int:
    """Given, or the hidden size shared by the heads."""
    if c.has("head_dim", "kv_channels", "attention_head_dim"):
        return c.size("head_dim", "kv_channels", "attention_head_dim")
    hidden, heads = c.size("hidden_size", "n_embd"), c.size("num_attention_heads", "n_head")
    if hidden % heads:
        raise InputError(
            f"{c.source}: head_dim: is missing; required, as hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}"
        )
    return hidden // heads


_WORDS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "sliding_window": "sliding",
    "chunked_attention": "chunked",
}


def attention_kinds(c: Fields, count: int) -> list[str]:
    """``full``, ``sliding`` or ``chunked`` for each layer, however the config says it; another word of
    ``layer_types`` is given back as it stands.

    ``layer_types`` wins; then ``sliding_window_pattern`` n (every n-th layer sees everything); then Qwen2's
    ``use_sliding_window`` with ``max_window_layers`` (layers from there on slide); else all layers have the
    window if there is one.
    """
    if c.has("layer_types"):
        return [_WORDS.get(kind, kind) for kind in c.per_layer("layer_types", count)]
    if not c.has("sliding_window") or not c.whole("sliding_window"):
        return ["full"] * count
    if c.has("sliding_window_pattern", "_sliding_window_pattern"):
        every = c.size("sliding_window_pattern", "_sliding_window_pattern")
        return ["full" if (index + 1) % every == 0 else "sliding" for index in range(count)]
    if c.has("use_sliding_window"):
        if not c.flag("use_sliding_window"):
            return ["full"] * count
        first = c.whole("max_window_layers", default=0)
        return ["full" if index < first else "sliding" for index in range(count)]
    return ["sliding"] * count


def grouped(
    c: Fields, kind: str, *, dim: int | None = None, kv_heads: int | None = None, index: int = 0
) -> Attention:
    """Grouped-query attention of one layer from the usual fields."""
    if kind not in ("full", "sliding", "chunked"):
        raise InputError(
            f"{c.source}: layer_types[{index}]: {kind!r} is not supported yet; supported: full_attention, "
            "sliding_attention, chunked_attention"
        )
    width = dim or head_dim(c)
    heads = c.size("num_attention_heads", "n_head")
    kv = kv_heads or c.size("num_key_value_heads", default=heads)
    if heads % kv:
        raise InputError(
            f"{c.source}: num_key_value_heads: {kv} is not allowed; must divide num_attention_heads ({heads})"
        )
    reach = None
    if kind == "sliding":
        reach = c.size("sliding_window", "window_size")
    elif kind == "chunked":
        reach = c.size("attention_chunk_size")
    return Attention(kind, heads, kv, width, width, reach)  # type: ignore[arg-type]
