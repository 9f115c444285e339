"""Mamba with some attention between: Nemotron-H (and Nemotron 3), Granite 4, Falcon-H1, Jamba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, NotSupportedError
from servesim.specs.families import blocks
from servesim.specs.families.moe import routed
from servesim.specs.families.stack import start
from servesim.specs.layers import Attention, Experts, Mlp, Recurrent, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack
    from servesim.specs.layers import AnyMlp


def mamba2(
    hidden: int,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    kernel: int,
    name: str,
    conv_bias: bool = True,
    proj_bias: bool = False,
    normed: bool = True,
    memory_itemsize: int = 2,
    beside: Attention | None = None,
) -> tuple[Recurrent, tuple[Tensor, ...]]:
    """A Mamba-2 mixer: gate, input, B and C of ``groups``, step sizes of ``heads``."""
    inner, shared = heads * head_dim, groups * state
    tensors = [
        blocks.matrix(f"{name}.in_proj", inner, hidden, "rows"),
        blocks.matrix(f"{name}.in_proj", inner, hidden, "rows"),
        blocks.matrix(f"{name}.in_proj", shared, hidden, "kv_heads", state),
        blocks.matrix(f"{name}.in_proj", shared, hidden, "kv_heads", state),
        blocks.matrix(f"{name}.in_proj", heads, hidden, "rows"),
        Tensor(f"{name}.conv1d", inner, kernel, "rows"),
        Tensor(f"{name}.conv1d", 2 * shared, kernel, "kv_heads", 2 * state),
        Tensor(f"{name}.A", heads, split="rows", itemsize=4),
        Tensor(f"{name}.D", heads, split="rows"),
        Tensor(f"{name}.dt_bias", heads, split="rows"),
        blocks.matrix(f"{name}.out_proj", hidden, inner, "columns"),
    ]
    if conv_bias:
        tensors.append(Tensor(f"{name}.conv1d.bias", inner, split="rows"))
        tensors.append(Tensor(f"{name}.conv1d.bias", 2 * shared, split="kv_heads", unit=2 * state))
    if proj_bias:
        tensors.append(Tensor(f"{name}.in_proj.bias", 2 * inner + 2 * shared + heads, split="rows"))
        tensors.append(Tensor(f"{name}.out_proj.bias", hidden))
    if normed:
        tensors.append(Tensor(f"{name}.norm", inner, split="rows"))
    recurrent = Recurrent(
        "mamba2", inner + 2 * shared, kernel, heads, head_dim, state, groups, memory_itemsize, beside
    )
    return recurrent, tuple(tensors)


def _memory(c: Fields) -> int:
    """Bytes of an element of the memory: 32 bit, unless the config asks for 16."""
    return 2 if c.text("mamba_ssm_cache_dtype") in ("bfloat16", "float16") else 4


_WORDS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def _pattern(c: Fields, letters: str, words: str) -> str:
    """Layers as letters (M Mamba, * attention, - dense network, E experts), however the config says them."""
    return c.text(letters) or "".join(_WORDS.get(str(word), "?") for word in c.items(words))


def _nemotron(c: Fields) -> Stack:
    """Mixers and networks are layers of their own."""
    stack = start(c)
    pattern = _pattern(c, "hybrid_override_pattern", "layers_block_type")
    count = c.layer_count("num_hidden_layers", default=len(pattern))
    if len(pattern) != count:
        raise InputError(
            f"{c.source}: hybrid_override_pattern: {len(pattern)} letters are not "
            f"allowed; must be one a layer ({count})"
        )
    for letter in pattern:
        stack.add(*_nemotron_layer(c, stack.hidden, letter))
    drafts = ""
    if c.layer_count("num_nextn_predict_layers", default=0):
        drafts = _pattern(c, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    for index, letter in enumerate(drafts):
        attention, mlp, norm, tensors = _nemotron_layer(c, stack.hidden, letter)
        around: tuple[Tensor, ...] = ()
        if index == 0:
            around = (
                *blocks.norms(stack.hidden, "enorm", "hnorm"),
                blocks.matrix("eh_proj", stack.hidden, 2 * stack.hidden),
            )
        if index == len(drafts) - 1:
            around += blocks.norms(stack.hidden, "final_layernorm")
        stack.add_mtp(attention, mlp, around, norm, tensors)
    return stack


def _nemotron_layer(
    c: Fields, hidden: int, letter: str
) -> tuple[Attention | Recurrent | None, AnyMlp | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
    norm = blocks.norms(hidden, "norm")
    if letter == "M":
        recurrent, tensors = mamba2(
            hidden,
            heads=c.size("mamba_num_heads"),
            head_dim=c.size("mamba_head_dim"),
            groups=c.size("n_groups"),
            state=c.size("ssm_state_size"),
            kernel=c.size("conv_kernel"),
            name="mixer",
            conv_bias=c.flag("use_conv_bias", True),
            proj_bias=c.flag("use_bias"),
            memory_itemsize=_memory(c),
        )
        return recurrent, None, norm, tensors
    if letter == "*":
        attention = blocks.grouped(c, "full")
        return (
            attention,
            None,
            norm,
            blocks.attention(attention, hidden, name="mixer", qkv_bias=c.flag("attention_bias")),
        )
    if letter == "-":
        mlp = Mlp(c.size("intermediate_size"), gated=False)
        return None, mlp, norm, blocks.dense_mlp(mlp, hidden, name="mixer", bias=c.flag("mlp_bias"))
    if letter == "E":
        shared = c.whole("moe_shared_expert_intermediate_size", default=0) * c.whole(
            "n_shared_experts", default=0
        )
        base = routed(c, shared_width=shared)
        experts = Experts(base.count, base.top_k, base.width, gated=False, shared_width=shared,
                          latent=c.whole("moe_latent_size", default=0))  # fmt: skip
        return None, experts, norm, blocks.experts(experts, hidden, name="mixer", correction_itemsize=4)
    raise NotSupportedError(
        f"{c.source}: hybrid_override_pattern: {letter!r} is not modelled; known: M, *, - and E"
    )


def _mamba2(c: Fields, hidden: int, inner: int, **more: Any) -> tuple[Recurrent, tuple[Tensor, ...]]:
    """A Mamba-2 mixer by the fields ``mamba_*``; ``inner``: width of all its heads, where none is given."""
    heads = c.size("mamba_n_heads")
    given = c.has("mamba_d_head") and c.text("mamba_d_head") != "auto"
    return mamba2(
        hidden,
        heads=heads,
        head_dim=c.size("mamba_d_head") if given else inner // heads,
        groups=c.size("mamba_n_groups", default=1),
        state=c.size("mamba_d_state", default=256),
        kernel=c.size("mamba_d_conv", default=4),
        name="mamba",
        conv_bias=c.flag("mamba_conv_bias", True),
        proj_bias=c.flag("mamba_proj_bias"),
        **more,
    )


def _granite(c: Fields) -> Stack:
    stack = start(c)
    count = c.layer_count("num_hidden_layers")
    kinds = [
        str(kind)
        for kind in c.per_layer("layer_types" if c.has("layer_types") else "layers_block_type", count)
    ]
    shared = c.whole("shared_intermediate_size", default=0)
    for index, kind in enumerate(kinds):
        mixer: Attention | Recurrent
        if kind == "mamba":
            wide = c.size("mamba_expand", default=2) * stack.hidden
            mixer, own = _mamba2(c, stack.hidden, wide)
        elif kind == "attention":
            mixer = blocks.grouped(c, "full")
            own = blocks.attention(
                mixer, stack.hidden, qkv_bias=c.flag("attention_bias"), o_bias=c.flag("attention_bias")
            )
        else:
            raise NotSupportedError(
                f"{c.source}: layer_types[{index}]: {kind!r} is not modelled; known: mamba, attention"
            )
        mlp: AnyMlp
        if c.whole("num_local_experts", default=0):
            mlp = routed(c, width="intermediate_size", shared_width=shared)
            feed = blocks.experts(mlp, stack.hidden, name="block_sparse_moe")
        else:
            mlp = Mlp(shared or c.size("intermediate_size"))
            feed = blocks.dense_mlp(mlp, stack.hidden, name="shared_mlp")
        stack.add(
            mixer, mlp, blocks.norms(stack.hidden, "input_layernorm", "post_attention_layernorm"), own, feed
        )
    return stack


def _falcon(c: Fields) -> Stack:
    """Attention and Mamba-2 side by side in every layer."""
    stack = start(c)
    attention = blocks.grouped(c, "full")
    inner = c.whole("mamba_d_ssm", default=0) or c.size("mamba_expand", default=2) * stack.hidden
    recurrent, own = _mamba2(
        c,
        stack.hidden,
        inner,
        normed=c.flag("mamba_rms_norm"),
        beside=attention,
    )
    mlp = Mlp(c.size("intermediate_size"))
    for _ in range(c.layer_count("num_hidden_layers")):
        stack.add(
            recurrent,
            mlp,
            blocks.norms(stack.hidden, "input_layernorm", "pre_ff_layernorm"),
            blocks.attention(attention, stack.hidden, qkv_bias=c.flag("attention_bias")),
            own,
            blocks.dense_mlp(mlp, stack.hidden, name="feed_forward", bias=c.flag("mlp_bias")),
        )
    return stack


_JAMBA = {
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}


def _jamba(c: Fields) -> Stack:
    """Mamba-1, one attention layer in eight, experts in every second."""
    c = c.with_defaults(_JAMBA)
    stack = start(c)
    hidden, state, kernel = stack.hidden, c.size("mamba_d_state"), c.size("mamba_d_conv")
    inner = c.size("mamba_expand") * hidden
    rank = c.whole("mamba_dt_rank", default=0) or -(-hidden // 16)
    recurrent = Recurrent("mamba1", inner, kernel, inner, 1, state, memory_itemsize=2)
    mamba = (
        blocks.matrix("mamba.in_proj", 2 * inner, hidden, "rows"),
        Tensor("mamba.conv1d", inner, kernel, "rows"),
        Tensor("mamba.conv1d.bias", inner, split="rows"),
        blocks.matrix("mamba.x_proj", rank + 2 * state, inner, "columns"),
        blocks.matrix("mamba.dt_proj", inner, rank, "rows"),
        Tensor("mamba.dt_proj.bias", inner, split="rows"),
        Tensor("mamba.A_log", inner, state, "rows", itemsize=4),
        Tensor("mamba.D", inner, split="rows"),
        blocks.matrix("mamba.out_proj", hidden, inner, "columns"),
        Tensor("mamba.dt_layernorm", rank),
        Tensor("mamba.b_layernorm", state),
        Tensor("mamba.c_layernorm", state),
    )
    for index in range(c.layer_count("num_hidden_layers")):
        attends = index % c.size("attn_layer_period") == c.whole("attn_layer_offset")
        routes = c.size("num_experts") > 1 and index % c.size("expert_layer_period") == c.whole(
            "expert_layer_offset"
        )
        mixer = blocks.grouped(c, "full") if attends else recurrent
        own = blocks.attention(mixer, hidden) if isinstance(mixer, Attention) else mamba
        mlp: AnyMlp = routed(c, width="intermediate_size") if routes else Mlp(c.size("intermediate_size"))
        feed = (
            blocks.experts(mlp, hidden, name="feed_forward", router="router")
            if isinstance(mlp, Experts)
            else blocks.dense_mlp(mlp, hidden, name="feed_forward")
        )
        stack.add(mixer, mlp, blocks.norms(hidden, "input_layernorm", "pre_ff_layernorm"), own, feed)
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    "nemotron_h": _nemotron,
    "granitemoehybrid": _granite,
    "falcon_h1": _falcon,
    "jamba": _jamba,
}
