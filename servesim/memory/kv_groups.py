"""How vLLM shares one pool of KV blocks among layers that keep different things.

A block is ``block_size`` tokens; a layer's page is what it keeps of them. Layers that keep the same form a
bucket; buckets are cut into groups of equally many layers, and each group has block tables of its own over
one pool, so that a block of the pool holds a page of every layer of whichever group owns it. All pages must
be of one size: the blocks of a layer with smaller pages hold more tokens where that comes out even, otherwise
its pages are padded. States do not grow with tokens: the attention layers' block is raised until its page
covers a state's, and the states' pages are padded to it.

Checked against the planner of vLLM 0.33.0 (tests/golden/kv_plans.json). Not modelled: attention over
compressed tokens (DeepSeek V4), whose pages of several sizes lie side by side in a block.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Literal

from servesim.errors import NotSupportedError
from servesim.slotted import dataclass
from servesim.specs.kv_formats import head_bytes, latent_bytes
from servesim.specs.layers import CompressedAttention, LatentAttention, Recurrent

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
    found: list[KvLayer] = []
    for layer in model.layers if part is None else part:
        found += _kept(layer.attention, kv_format, tp, block_size)
    return _with_states(model, found)


def _kept(a: AnyAttention | None, kv_format: str, tp: int, block_size: int) -> list[KvLayer]:
    if isinstance(a, CompressedAttention):
        raise NotSupportedError(
            "attention over compressed tokens: its pages of several sizes are not modelled"
        )
    if isinstance(a, LatentAttention):
        own = [KvLayer("mla", block_size, latent_bytes(kv_format, a.kv_rank + a.rope_dim))]
        return own + _index(a.index_dim, block_size)
    if isinstance(a, Recurrent):
        beside = _kept(a.beside, kv_format, tp, block_size)
        return [*beside, KvLayer("state", block_size, state_bytes(a, tp))]
    if a is None or a.shared:
        return []
    heads = max(a.kv_heads // tp, 1)
    own = [KvLayer(a.kind, block_size, heads * head_bytes(kv_format, a.head_dim, a.value_dim), a.reach)]
    return own + ([KvLayer("full", block_size, 2 * a.index_dim)] if a.index_dim else [])


def _index(dim: int, block_size: int) -> list[KvLayer]:
    """The keys of an indexer."""
    return [KvLayer("mla", block_size, index_bytes(dim))] if dim else []


def index_bytes(dim: int) -> int:
    """Bytes of one token's key of an indexer."""
    return dim + dim // _INDEX_BLOCK * _INDEX_BYTES_PER_SCALE


def _with_states(model: ModelLayers, layers: list[KvLayer]) -> list[KvLayer]:
    """Blocks raised until a page of attention covers a state, and states padded to it."""
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
    need, token = max(layer.token_bytes for layer in states), attention[0].token_bytes
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
        if len({layer.kind == "state" for layer in layers}) > 1:
            raise NotSupportedError(
                "states and KV caches have no manager in common; leave the hybrid manager on"
            )
        layers = [
            layer if layer.kind in ("mla", "state") else replace(layer, kind="full") for layer in layers
        ]
    if _alike(layers):
        first = layers[0]
        return KvPlan(
            (KvGroup(first.kind, first.block_size, tuple(x.page_bytes for x in layers), first.reach),)
        )
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
        elif most % layer.page_bytes == 0:
            equal.append(replace(layer, block_size=layer.block_size * (most // layer.page_bytes)))
        elif layer.kind == "mla":
            raise NotSupportedError(
                f"pages of latent attention ({layer.page_bytes} bytes) cannot be padded to {most} bytes"
            )
        else:
            equal.append(replace(layer, padded_bytes=most))
    return equal
