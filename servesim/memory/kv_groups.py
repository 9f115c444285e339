"""How vLLM shares one pool of KV blocks among layers that keep different things.

A block is ``block_size`` tokens; a layer's page is what it keeps of them. Layers that keep the same form a
bucket; buckets are cut into groups of equally many layers, and each group has block tables of its own over
one pool, so that a block of the pool holds a page of every layer of whichever group owns it. All pages must
be of one size: the blocks of a layer with smaller pages hold more tokens where that comes out even, otherwise
its pages are padded. States do not grow with tokens: the attention layers' block is raised until its page
covers a state's, and the states' pages are padded to it.

Attention over compressed tokens (DeepSeek V4) is the exception: pages of several sizes lie side by side.

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
_MANY_MORE = 1.5
"""From this ratio of layers on, the larger bucket is cut into groups of the smaller's size."""


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


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share block tables."""

    kind: Kind
    block_size: int
    pages: tuple[int, ...]
    """Bytes of a page of each of its layers."""
    reach: int | None = None
    bucket: int = 0
    """Groups of the same number keep the same in every layer."""


@dataclass(frozen=True, slots=True)
class KvPlan:
    """The groups of a model on one rank."""

    groups: tuple[KvGroup, ...]
    states_held: int = 1
    """States of one sequence in each layer that has them: 2 where they are cached at block boundaries."""

    @property
    def is_plain(self) -> bool:
        """Whether all is one group that keeps every token."""
        return len(self.groups) == 1 and self.groups[0].kind in ("full", "mla")

    @property
    def block_size(self) -> int:
        """Tokens of a block of the layers that keep every token; without any, of the smallest block."""
        growing = [group.block_size for group in self.groups if group.kind in ("full", "mla")]
        return min(growing or [group.block_size for group in self.groups])

    @property
    def bytes_per_block(self) -> int:
        """Of the pool: what the widest group keeps in a block."""
        return max(sum(group.pages) for group in self.groups)

    def num_blocks(self, memory_bytes: int) -> int:
        """Blocks of the pool, the null block among them."""
        return memory_bytes // self.bytes_per_block

    @property
    def bytes_per_token(self) -> float:
        """What one more token of a long request costs: the blocks of layers that keep every token."""
        growing = [group for group in self.groups if group.kind in ("full", "mla")]
        return sum(self.bytes_per_block / group.block_size for group in growing)

    @property
    def words(self) -> str:
        """``2 groups: 18 layers full, 18 sliding 128``: what the layers keep."""
        layers: dict[str, int] = {}
        for group in self.groups:
            name = f"{group.kind} {group.reach}" if group.reach else group.kind
            layers[name] = layers.get(name, 0) + len(group.pages)
        parts = [
            f"{count}{'' if index else ' layers'} {name}"
            for index, (name, count) in enumerate(layers.items())
        ]
        return f"{len(self.groups)} group{'s' if len(self.groups) > 1 else ''}: {', '.join(parts)}"

    def request_blocks(self, tokens: int, step_tokens: int) -> int:
        """Blocks that vLLM counts for one request of ``tokens`` tokens, at most ``step_tokens`` of them
        computed in one step: windows and chunks hold what they reach and a step, a state one block."""
        return sum(
            self.states_held if group.kind == "state" else _held(group, tokens, step_tokens)
            for group in self.groups
        )

    def admitted_blocks(self, tokens: int, step_tokens: int) -> int:
        """Free blocks that it takes to admit a request with ``tokens`` tokens to compute: no more than those
        tokens fill."""
        return sum(
            min(-(-tokens // group.block_size), _held(group, tokens, step_tokens))
            if group.kind != "state"
            else 1
            for group in self.groups
        )

    def requests(self, num_blocks: int, tokens: int, step_tokens: int) -> int:
        """Requests of ``tokens`` tokens that ``num_blocks`` blocks hold at once, beside the null block."""
        return max(num_blocks - 1, 0) // self.request_blocks(tokens, step_tokens)

    def shared_tokens(self, num_blocks: int) -> int:
        """Tokens that every group could keep of all blocks shared evenly; what start-up logs call the size of
        the KV cache."""
        return num_blocks // len(self.groups) * min(group.block_size for group in self.groups)

    def longest(self, num_blocks: int, step_tokens: int) -> int:
        """Tokens of the longest request that the pool holds alone; 0: none, and without bound for a model
        that keeps states and windows only, which the caller bounds by the model's context."""
        low, high = 0, max(num_blocks, 1) * max(group.block_size for group in self.groups)
        while low < high:
            middle = (low + high + 1) // 2
            if self.request_blocks(middle, step_tokens) < num_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def _held(group: KvGroup, tokens: int, step_tokens: int) -> int:
    """Blocks of one group that a request holds."""
    size = group.block_size
    whole = -(-tokens // size)
    if group.reach is None or group.kind in ("full", "mla"):  # a single manager keeps windows whole
        return whole
    if group.kind == "chunked":
        return min(whole, -(-(group.reach + step_tokens) // size))
    return -(-min(group.reach - 1 + step_tokens, tokens) // size) + 1


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


def plan_groups(layers: list[KvLayer], *, hybrid: bool = True) -> KvPlan:
    """The groups that layers are cut into; ``hybrid`` false: windows and chunks are kept as if they were full
    (``--disable-hybrid-kv-cache-manager``).

    Raises:
        NotSupportedError: pages cannot be made equal, or states stand beside one manager.
    """
    if not hybrid:
        if any(layer.packed for layer in layers):
            raise NotSupportedError(
                "attention over compressed tokens has no manager in common (vLLM does not start so); leave "
                "the hybrid manager on"
            )
        if len({layer.kind == "state" for layer in layers}) > 1:
            raise NotSupportedError(
                "states and KV caches have no manager in common; leave the hybrid manager on"
            )
        layers = _promoted(layers)
    if _alike(layers):
        first = layers[0]
        return KvPlan(
            (KvGroup(first.kind, first.block_size, tuple(x.page_bytes for x in layers), first.reach),)
        )
    if any(layer.packed for layer in layers):
        return _side_by_side(layers)
    buckets: dict[tuple[object, ...], list[KvLayer]] = {}
    for layer in _equal_pages(layers):
        key = (layer.kind, layer.reach, layer.block_size, layer.token_bytes, layer.padded_bytes)
        buckets.setdefault(key, []).append(layer)
    sizes = [len(bucket) for bucket in buckets.values()]
    size = max(sizes) if max(sizes) < _MANY_MORE * min(sizes) else min(sizes)
    groups = []
    for number, bucket in enumerate(buckets.values()):
        count = -(-len(bucket) // size)
        for index in range(count):
            one = bucket[index::count]
            pages = tuple(layer.page_bytes for layer in one)
            groups.append(KvGroup(one[0].kind, one[0].block_size, pages, one[0].reach, number))
    return KvPlan(tuple(groups))


def _side_by_side(layers: list[KvLayer]) -> KvPlan:
    """Groups whose layers' pages of several sizes lie side by side in a block of the pool.

    Layers that need equally many blocks form a bucket. One that has as many layers of each of its sizes is a
    pattern that repeats; the largest such pattern says at least how many repeats a group has, and where
    least is left empty, how many. Other buckets are groups as they are.
    """
    buckets: dict[tuple[object, ...], dict[int, list[KvLayer]]] = {}
    for layer in layers:
        sizes = buckets.setdefault((layer.kind, layer.reach, layer.block_size), {})
        sizes.setdefault(layer.page_bytes, []).append(layer)
    repeats = [
        (len(sizes), len(next(iter(sizes.values()))))
        for sizes in buckets.values()
        if len({len(some) for some in sizes.values()}) == 1
    ]
    least = max((count for kinds, count in repeats if kinds > 1), default=0)
    size = _least_empty([count for _, count in repeats], least) if least else 0
    groups = []
    for number, sizes in enumerate(buckets.values()):
        counts = {len(some) for some in sizes.values()}
        parts = -(-max(counts) // size) if size and len(counts) == 1 else 1
        for index in range(parts):
            own = [layer for some in sizes.values() for layer in some[index::parts]]
            pages = tuple(layer.page_bytes for layer in own)
            groups.append(KvGroup(own[0].kind, own[0].block_size, pages, own[0].reach, number))
    return KvPlan(tuple(groups))


def _least_empty(counts: list[int], least: int) -> int:
    """The size of groups, ``least`` or more, at which buckets of ``counts`` layers leave least empty; of
    equal ones the largest."""
    sizes = range(least, max(*counts, least) + 1)
    return min(sizes, key=lambda size: (sum(-count % size for count in counts), -size))


def _promoted(layers: list[KvLayer]) -> list[KvLayer]:
    """Windows and chunks kept whole beside layers that are; without any such, they stay what they are."""
    whole = {layer.block_size for layer in layers if layer.kind in ("full", "mla")}
    if not whole:
        return layers
    size = min(whole) if len(whole) == 1 else None
    promoted = []
    for layer in layers:
        if layer.kind in ("sliding", "chunked"):
            own = size or layer.block_size
            padded = layer.padded_bytes and max(layer.padded_bytes, layer.token_bytes * own)
            layer = replace(layer, kind="full", block_size=own, padded_bytes=padded)
        promoted.append(layer)
    return promoted


def _alike(layers: list[KvLayer]) -> bool:
    """Whether all layers keep equally many tokens, in whatever width: one group takes them all."""
    if len({layer.block_size for layer in layers}) > 1:
        return False
    kinds = {"full" if layer.kind == "mla" else layer.kind for layer in layers}
    if kinds == {"full"}:
        return True
    if len(kinds) > 1:
        return False
    return len({(layer.reach, layer.page_bytes if layer.kind == "state" else 0) for layer in layers}) == 1


def _equal_pages(layers: list[KvLayer]) -> list[KvLayer]:
    """Pages of one size: blocks of more tokens where that comes out even, else padding."""
    most = max(layer.page_bytes for layer in layers)
    equal = []
    for layer in layers:
        if layer.page_bytes == most:
            equal.append(layer)
        elif layer.kind == "state":
            equal.append(replace(layer, padded_bytes=most))
        elif layer.padded_bytes is not None and most % layer.page_bytes == 0:
            raise NotSupportedError(
                f"padded pages of windows ({layer.page_bytes} bytes) beside pages of {most} bytes: vLLM does "
                "not start so; leave out of the format layers with a window alone, or all layers"
            )
        elif most % layer.page_bytes == 0:
            equal.append(replace(layer, block_size=layer.block_size * (most // layer.page_bytes)))
        elif layer.kind == "mla":
            raise NotSupportedError(
                f"pages of latent attention ({layer.page_bytes} bytes) cannot be padded to {most} bytes"
            )
        else:
            equal.append(replace(layer, padded_bytes=most))
    return equal
