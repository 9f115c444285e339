"""How vLLM shares one pool of KV blocks among layers that keep different things.

Layers that keep the same (:mod:`servesim.memory.kv_layers`) form a bucket; buckets are cut into groups of
equally many layers, and each group has block tables of its own over one pool, so that a block of the pool
holds a page of every layer of whichever group owns it. All pages must be of one size: the blocks of a layer
with smaller pages hold more tokens where that comes out even, otherwise its pages are padded.

Attention over compressed tokens (DeepSeek V4) is the exception: pages of several sizes lie side by side.

Checked against the planner of vLLM 0.33.0 (tests/golden/kv_plans.json).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.memory.kv_layers import Kind, KvLayer

_MANY_MORE = 1.5
"""From this ratio of layers on, the larger bucket is cut into groups of the smaller's size."""


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

    def shared_by(self, ranks: int) -> KvPlan:
        """The plan where so many ranks share every block's tokens evenly: a rank's pages are what they were,
        and a block holds that many times the tokens (``resolve_dcp_kv_block_size`` of vLLM 0.33)."""
        if ranks == 1:
            return self
        groups = tuple(replace(group, block_size=group.block_size * ranks) for group in self.groups)
        return replace(self, groups=groups)

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
