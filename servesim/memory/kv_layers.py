"""What each layer of a model keeps of the tokens it has seen, in pages of the KV cache.

A block is ``block_size`` tokens; a layer's page is what it keeps of them. States do not grow with tokens: the
attention layers' block is raised until its page covers a state's, and the states' pages are padded to it.
Layers that keep 16 bit beside narrower ones raise it likewise. Which layers share block tables is
:mod:`servesim.memory.kv_groups`'s.

Checked against the planner of vLLM 0.33.0 (tests/golden/kv_plans.json).
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Literal

from servesim.errors import NotSupportedError
from servesim.slotted import dataclass
from servesim.specs.kv_formats import head_bytes, latent_bytes
from servesim.specs.layers import Attention, CompressedAttention, LatentAttention, Recurrent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.specs.layers import AnyAttention, Layer, ModelLayers

Kind = Literal["full", "sliding", "chunked", "mla", "state"]
_INDEX_BYTES_PER_SCALE = 4
_INDEX_BLOCK = 128
"""An indexer keeps fp8 keys with one 32-bit scale for so many elements."""
_DELTA_CHUNK = 64
"""Tokens of a chunk of the delta-rule kernels; blocks of such models are a multiple of it."""
_LATENT_BLOCK = 128
"""Blocks of models with latent attention and states are a multiple of so many tokens."""
COMPRESSED_FORMATS = ("fp8", "fp8_ds_mla")
"""Of attention over compressed tokens (DeepSeek V4); both are the second."""
_COMPRESSED_SINCE = "0.33"
_USUAL_BLOCK, _COMPRESSED_BLOCK, _WINDOW_BLOCK = 16, 256, 64
"""Tokens of a block where nothing is asked for; of compressed tokens; of the window beside them."""
_INPUTS_BLOCK = (8, 4)
"""Tokens of a block of inputs to be compressed: keys and gates in 32 bit, of groups side by side and of
groups that overlap, which are twice as wide."""
_SLOT_BYTES = 584
"""Of one vector: 448 elements in 8 bit, 64 rotary ones in 16 bit, 8 bytes of scales."""
_PAGE_STEP = 576
"""Bytes that a page is a multiple of."""
_KERNEL, _LATENT_KERNEL = 16, 64
"""Tokens of the smallest blocks that kernels take; of latent attention in 8 bit (FlashMLA)."""
_FEW_BLOCKS = {"nvfp4": (16, 32, 64)}
"""Formats whose kernels take blocks of these sizes alone (FlashInfer before Blackwell)."""


@dataclass(frozen=True, slots=True)
class KvLayer:
    """What one layer keeps, in pages."""

    kind: Kind
    block_size: int
    token_bytes: int
    """Of one token; a ``state``: of a whole sequence."""
    reach: int | None = None
    """Window or chunk in tokens."""
    padded_bytes: int | None = None
    packed: bool = False
    """Whether pages of several sizes lie side by side in a block, so that none has to equal another."""

    @property
    def page_bytes(self) -> int:
        if self.padded_bytes is not None:
            return self.padded_bytes
        return self.token_bytes if self.kind == "state" else self.token_bytes * self.block_size


def state_bytes(r: Recurrent, tp: int, activation_bytes: int = 2) -> int:
    """Bytes of one sequence's state in one layer on one rank: the convolution's inputs and the memory.

    Groups of B and C are replicated where the ranks cannot share them evenly.
    """
    channels = r.channels
    if r.groups and r.groups % tp:
        channels += 2 * (tp - r.groups) * r.state_columns
    convolution = channels // tp * (r.kernel - 1) * activation_bytes
    return convolution + r.heads // tp * r.state_rows * r.state_columns * r.memory_itemsize


def kv_layers(
    model: ModelLayers,
    kv_format: str,
    tp: int = 1,
    block_size: int = 16,
    part: Sequence[Layer] | None = None,
) -> list[KvLayer]:
    """What every layer keeps, in the order of the stack; ``kv_format``: see :mod:`servesim.specs.kv_formats`.

    ``part``: layers of a pipeline stage; None: all.

    Raises:
        NotSupportedError: a layer keeps something that is not modelled here.
    """
    layers = model.layers if part is None else part
    found: list[KvLayer] = []
    for layer in layers:
        found += _kept(layer.attention, kv_format, tp, block_size)
    alike = not any(map(_own_format, layers))
    first = _first_token(layers, kv_format, tp, block_size)
    wide = _first_token(layers, "bfloat16", tp, block_size)
    found = _with_states(model, found, first.token_bytes if first else 0)
    if alike or first is None or wide is None:
        return found
    return _beside_wide(found, layers, first, wide, _FEW_BLOCKS.get(kv_format, ()))


def _own_format(layer: Layer) -> str | None:
    """The format of a layer's cache where that is not the instance's."""
    a = _attention(layer)
    return a.kv_format if isinstance(a, Attention | LatentAttention) else None


def _first_token(layers: Sequence[Layer], kv_format: str, tp: int, block_size: int) -> KvLayer | None:
    """A layer of attention in the instance's format, which blocks are aligned by: as many heads, as wide, as
    any has. None: there is no attention."""
    found = [_attention(layer) for layer in layers]
    latent = next((a for a in found if isinstance(a, LatentAttention)), None)
    if latent is not None:
        return _kept(replace(latent, kv_format=None), kv_format, tp, block_size)[0]
    some = [a for a in found if isinstance(a, Attention) and not a.shared]
    if not some:
        return None
    most = replace(
        some[0],
        kv_heads=max(a.kv_heads for a in some),
        head_dim=max(a.head_dim for a in some),
        value_dim=max(a.value_dim for a in some),
        kv_format=None,
    )
    return _kept(most, kv_format, tp, block_size)[0]


def _attention(layer: Layer) -> AnyAttention | None:
    return layer.attention.beside if isinstance(layer.attention, Recurrent) else layer.attention


def _kept(a: AnyAttention | None, kv_format: str, tp: int, block_size: int) -> list[KvLayer]:
    if isinstance(a, CompressedAttention):
        return _compressed(a, kv_format, block_size)
    if isinstance(a, LatentAttention):
        own = [KvLayer("mla", block_size, latent_bytes(a.kv_format or kv_format, a.kv_rank + a.rope_dim))]
        return own + _index(a.index_dim, block_size)
    if isinstance(a, Recurrent):
        beside = _kept(a.beside, kv_format, tp, block_size)
        return [*beside, KvLayer("state", block_size, state_bytes(a, tp))]
    if a is None or a.shared:
        return []
    heads = max(a.kv_heads // tp, 1)
    token_bytes = heads * head_bytes(a.kv_format or kv_format, a.head_dim, a.value_dim)
    own = [KvLayer(a.kind, block_size, token_bytes, a.reach)]
    return own + ([KvLayer("full", block_size, 2 * a.index_dim)] if a.index_dim else [])


def _beside_wide(
    layers: list[KvLayer],
    of: Sequence[Layer],
    first: KvLayer,
    in_16_bit: KvLayer,
    blocks: tuple[int, ...],
) -> list[KvLayer]:
    """Blocks raised until their page covers the page of a layer that keeps 16 bit.

    Where the first layer is such a one, its backend computes the page that has to be large enough, and takes
    every narrow element for a byte. Layers with a window get blocks of as many tokens as the page holds, and
    are padded to it; full ones are left as large as they come out. ``blocks``: tokens that a block of the
    narrow format may have; none: any multiple of its kernel's.
    """
    wide, token = in_16_bit.token_bytes, first.token_bytes
    kernel = _LATENT_KERNEL if first.kind == "mla" else _KERNEL
    if _own_format(next(layer for layer in of if _attention(layer) is not None)):
        kernel, token = _KERNEL, wide // 2
    if wide == token:
        return layers
    step = max(kernel, first.block_size)
    padded = max((layer.page_bytes for layer in layers if layer.kind == "state"), default=0)
    size = max(step * -(-max(wide * kernel, padded) // (step * token)), first.block_size)
    page = size * token
    raised = []
    for layer in layers:
        if layer.kind == "sliding":
            fits = max(page // layer.token_bytes // kernel, 1) * kernel
            if blocks and layer.token_bytes != wide:
                fits = max(size for size in blocks if size <= max(fits, blocks[0]))
            raised.append(replace(layer, block_size=fits, padded_bytes=page))
        elif layer.kind == "state":
            raised.append(replace(layer, block_size=size, padded_bytes=page))
        else:
            raised.append(replace(layer, block_size=size))
    return raised


def _compressed(a: CompressedAttention, kv_format: str, block_size: int) -> list[KvLayer]:
    """A window, and of a layer that compresses: its vectors, the indexer's keys, and the inputs of the groups
    of tokens that are still to be compressed, for both."""
    if kv_format not in COMPRESSED_FORMATS:
        raise NotSupportedError(
            f"kv_cache_dtype {kv_format}: attention over compressed tokens keeps fp8_ds_mla alone (vLLM "
            f"{_COMPRESSED_SINCE}); leave --kv-cache-dtype at auto"
        )
    if block_size not in (_USUAL_BLOCK, _COMPRESSED_BLOCK):
        raise NotSupportedError(
            f"block_size {block_size}: attention over compressed tokens has blocks of {_COMPRESSED_BLOCK} "
            "tokens; leave --block-size out"
        )
    found = [_packed("sliding", _WINDOW_BLOCK, _WINDOW_BLOCK, _SLOT_BYTES, a.window)]
    if not a.ratio:
        return found
    states, overlaps = _COMPRESSED_BLOCK // a.ratio, 2 if a.index_dim else 1
    inputs = _INPUTS_BLOCK[overlaps - 1]
    found.append(_packed("mla", _COMPRESSED_BLOCK, states, _SLOT_BYTES))
    found.append(_packed("sliding", inputs, inputs, 8 * overlaps * a.head_dim, overlaps * a.ratio))
    if a.index_dim:
        found.append(_packed("mla", _COMPRESSED_BLOCK, states, index_bytes(a.index_dim)))
        found.append(_packed("sliding", inputs, inputs, 8 * overlaps * a.index_dim, overlaps * a.ratio))
    return found


def _packed(kind: Kind, block_size: int, slots: int, slot_bytes: int, reach: int | None = None) -> KvLayer:
    """Pages of ``slots`` entries in a block of ``block_size`` tokens, padded to what the kernels load."""
    page = -(-slots * slot_bytes // _PAGE_STEP) * _PAGE_STEP
    return KvLayer(kind, block_size, -(-page // block_size), reach, page, packed=True)


def _index(dim: int, block_size: int) -> list[KvLayer]:
    """The keys of an indexer."""
    return [KvLayer("mla", block_size, index_bytes(dim))] if dim else []


def index_bytes(dim: int) -> int:
    """Bytes of one token's key of an indexer."""
    return dim + dim // _INDEX_BLOCK * _INDEX_BYTES_PER_SCALE


def _with_states(model: ModelLayers, layers: list[KvLayer], token: int) -> list[KvLayer]:
    """Blocks raised until a page of attention (``token`` bytes a token) covers a state, and states padded to
    it."""
    states = [layer for layer in layers if layer.kind == "state"]
    attention = [layer for layer in layers if layer.kind != "state"]
    if not states or not attention:
        return layers
    step = attention[0].block_size
    if any(layer.kind == "mla" for layer in attention):
        step = max(step, _LATENT_BLOCK)
    if any(
        isinstance(a := layer.attention, Recurrent) and a.kind == "gated_delta_net" for layer in model.layers
    ):
        step = lcm(step, _DELTA_CHUNK)
    need = max(layer.token_bytes for layer in states)
    size = max(step * -(-need // (step * token)), attention[0].block_size)
    return [
        replace(layer, block_size=size, padded_bytes=size * token if layer.kind == "state" else None)
        for layer in layers
    ]
