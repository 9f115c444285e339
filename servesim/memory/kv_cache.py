"""The KV cache of one instance: which request holds which blocks, and what the prefix cache remembers.

Block identities come from :mod:`servesim.workload.hashes`: only a request's leading blocks whose content
occurs in another request can ever be hit by that other request; those are registered in the prefix index as
soon as they are full, exactly when vLLM does. Every later block is unique to its request, so only the request
itself can hit it again, after a preemption: it is registered then, which nothing can tell from registering it
earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from servesim.memory.block_pool import BlockPool

if TYPE_CHECKING:
    from collections.abc import Sequence


class AnyKvCache(Protocol):
    """What a scheduler needs of a cache: :class:`KvCache`, or one of several groups
    (:mod:`servesim.memory.group_cache`). A table and hits are the cache's own."""

    pool: BlockPool
    registrations: int
    block_size: int

    @property
    def several(self) -> bool: ...
    @property
    def clips(self) -> bool: ...
    @property
    def block_sizes(self) -> tuple[int, ...]: ...
    @property
    def period(self) -> int: ...

    def new_table(self, identities: Sequence[tuple[Sequence[int], int]], prompt_tokens: int) -> Any: ...
    def no_hits(self) -> Any: ...
    def hit_tokens(self, hits: Any) -> int: ...
    def blocks_for(self, tokens: int) -> int: ...
    def lookup(self, table: Any, tokens: int, seen_before: bool) -> Any: ...
    def missing_blocks(self, hits: Any, done: int, tokens: int, *, whole: bool = False) -> int: ...
    def admit(self, table: Any, hits: Any, done: int, tokens: int) -> None: ...
    def shortage(self, table: Any, tokens: int) -> int: ...
    def grow(self, table: Any, tokens: int) -> None: ...
    def register_shared(self, table: Any, tokens: int) -> None: ...
    def preempt(self, table: Any, tokens: int) -> None: ...
    def free(self, table: Any, tokens: int) -> None: ...


class BlockTable:
    """The blocks of one request, in order, and the identity of their content."""

    __slots__ = ("blocks", "chunks_written", "num_hashed", "shared_ids", "unique_base")

    def __init__(self, shared_ids: Sequence[int], unique_base: int) -> None:
        self.blocks: list[int] = []
        self.num_hashed = 0
        """Leading blocks that are registered in the prefix index."""
        self.chunks_written = 0
        """Leading chunks that have been written to the lower tier."""
        self.shared_ids = shared_ids
        self.unique_base = unique_base

    def content(self, position: int) -> int:
        """Identity of the content of the block at ``position`` once it is full."""
        if position < len(self.shared_ids):
            return self.shared_ids[position]
        return self.unique_base + position

    @property
    def awaits_hash(self) -> bool:
        """Whether blocks that other requests may hit are still to be registered."""
        return self.num_hashed < len(self.shared_ids)


class KvCache:
    """Allocates and frees the blocks of requests; looks prefixes up."""

    __slots__ = ("block_size", "caching", "pool", "registrations")

    def __init__(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.caching = caching
        self.registrations = 0
        """Counts up whenever a block becomes visible to other requests."""

    @property
    def several(self) -> bool:
        """Whether there are groups that do not keep every token."""
        return False

    @property
    def clips(self) -> bool:
        """Whether chunks of a prompt end at block boundaries."""
        return False

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of the groups."""
        return (self.block_size,)

    @property
    def period(self) -> int:
        """Tokens after which the table of a decoding request grows again."""
        return self.block_size

    def new_table(self, identities: Sequence[tuple[Sequence[int], int]], prompt_tokens: int) -> BlockTable:
        """An empty table; ``identities``: (shared ids, base of its own ids) of the request's blocks."""
        del prompt_tokens
        return BlockTable(*identities[0])

    def no_hits(self) -> list[int]:
        """What is found where nothing is looked up."""
        return []

    def hit_tokens(self, hits: Sequence[int]) -> int:
        """Tokens of a prefix that was found."""
        return len(hits) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def lookup(self, table: BlockTable, tokens: int, seen_before: bool) -> list[int]:
        """Cached blocks of the longest known prefix of the first ``tokens`` tokens, never all of them.

        The last token is always computed, since its logits are needed. ``seen_before``: the request held
        blocks once, so that its unique blocks may be cached too.
        """
        hits: list[int] = []
        if not self.caching:
            return hits
        limit = (tokens - 1) // self.block_size
        if not seen_before:
            limit = min(limit, len(table.shared_ids))
        for position in range(limit):
            block = self.pool.lookup(table.content(position))
            if block is None:
                break
            hits.append(block)
        return hits

    def missing_blocks(self, hits: Sequence[int], done: int, tokens: int, *, whole: bool = False) -> int:
        """Free blocks it takes to hold ``tokens`` tokens when ``hits`` are already cached.

        A hit that nobody holds counts as well: re-using it takes it out of the free blocks.
        """
        del done, whole  # every token is kept
        is_free = self.pool.is_free
        return self.blocks_for(tokens) - len(hits) + sum(1 for block in hits if is_free(block))

    def admit(self, table: BlockTable, hits: list[int], done: int, tokens: int) -> None:
        """Give an admitted request its ``hits`` and fresh blocks up to ``tokens`` tokens."""
        del done
        self.pool.share(hits)
        table.blocks = hits
        table.num_hashed = len(hits)
        self.grow(table, tokens)

    def shortage(self, table: BlockTable, tokens: int) -> int:
        """How many blocks are missing (<= 0: none) for ``table`` to reach ``tokens`` tokens."""
        return self.blocks_for(tokens) - len(table.blocks) - self.pool.num_free

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Add blocks so that ``table`` holds ``tokens`` tokens."""
        need = self.blocks_for(tokens) - len(table.blocks)
        if need > 0:
            table.blocks += self.pool.take(need)

    def register_shared(self, table: BlockTable, tokens: int) -> None:
        """Make full blocks among the first ``tokens`` tokens visible to the requests that share them."""
        if self.caching and table.awaits_hash:
            self._register(table, min(tokens // self.block_size, len(table.shared_ids)))

    def _register(self, table: BlockTable, full_blocks: int) -> None:
        register = self.pool.register
        for position in range(table.num_hashed, full_blocks):
            register(table.blocks[position], table.content(position))
        if full_blocks > table.num_hashed:
            table.num_hashed = full_blocks
            self.registrations += 1

    def preempt(self, table: BlockTable, tokens: int) -> None:
        """Take all blocks away; the full ones among the first ``tokens`` tokens stay cached until
        overwritten."""
        if self.caching:
            self._register(table, tokens // self.block_size)
        self.free(table, tokens)

    def free(self, table: BlockTable, tokens: int) -> None:
        """Give all blocks back; the first ``tokens`` tokens are computed and known."""
        blocks, num_hashed, num_full = self._detach(table, tokens)
        self.pool.free(blocks, num_hashed, num_full)

    def detach(self, table: BlockTable, tokens: int, *, preempted: bool) -> tuple[list[int], int, int]:
        """Take all blocks away as :meth:`preempt` or :meth:`free` does, without giving them back.

        Returns:
            What :meth:`BlockPool.free` is to be called with later; they can be hit until then, too.
        """
        if preempted and self.caching:
            self._register(table, tokens // self.block_size)
        return self._detach(table, tokens)

    def _detach(self, table: BlockTable, tokens: int) -> tuple[list[int], int, int]:
        blocks, num_hashed = table.blocks, table.num_hashed
        table.blocks = []
        table.num_hashed = 0
        return blocks, num_hashed, tokens // self.block_size if self.caching else 0
