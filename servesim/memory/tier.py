"""The lower tier of the prefix cache: CPU or CXL memory that keeps KV after the NPU's blocks are overwritten.

KV is kept in chunks of 256 tokens, named by the same identities as the NPU's blocks. The tier is inclusive:
what the NPU computes is written through at once, off the critical path. A chunk that is needed again is read
back whole. When the tier is full the chunk that was used least recently makes room.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servesim.memory.kv_cache import BlockTable

CHUNK_TOKENS = 256


class TierPool:
    """Chunks in one memory, least recently used first. Instances may share a pool."""

    __slots__ = ("_chunks", "capacity_bytes", "used_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._chunks: OrderedDict[tuple[int, int], int] = OrderedDict()
        """(namespace, identity) → bytes."""

    def __len__(self) -> int:
        return len(self._chunks)

    def use(self, key: tuple[int, int]) -> bool:
        """Whether the chunk is there; if so it is now the most recently used one."""
        if key not in self._chunks:
            return False
        self._chunks.move_to_end(key)
        return True

    def put(self, key: tuple[int, int], size: int) -> int:
        """Keep a chunk of ``size`` bytes; returns the bytes written, 0 if it was there or can never fit."""
        if self.use(key) or size > self.capacity_bytes:
            return 0
        while self.used_bytes + size > self.capacity_bytes:
            self.used_bytes -= self._chunks.popitem(last=False)[1]
        self._chunks[key] = size
        self.used_bytes += size
        return size

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes add up (O(chunks); for tests)."""
        assert self.used_bytes == sum(self._chunks.values()) <= self.capacity_bytes, (
            "tier bytes do not add up"
        )


class LowerTier:
    """One instance's view of a pool."""

    __slots__ = ("_chunk_blocks", "_namespace", "_pool", "chunk_bytes", "chunk_tokens", "written_bytes")

    def __init__(self, pool: TierPool, namespace: int, block_size: int, bytes_per_token: int) -> None:
        """
        Args:
            pool: where the chunks lie.
            namespace: the same for instances whose KV is interchangeable: equal model, KV dtype, block size.
            block_size: tokens of an NPU block; a chunk is a whole number of blocks of at most 256 tokens, or
            one
                larger block.
            bytes_per_token: KV of a token over all NPUs of the instance.
        """
        self._pool = pool
        self._namespace = namespace
        self._chunk_blocks = max(CHUNK_TOKENS // block_size, 1)
        self.chunk_tokens = self._chunk_blocks * block_size
        self.chunk_bytes = self.chunk_tokens * bytes_per_token
        self.written_bytes = 0
        """Bytes written through since :meth:`take_written_bytes` was last called."""

    def take_written_bytes(self) -> int:
        """Bytes written through since the last call."""
        written, self.written_bytes = self.written_bytes, 0
        return written

    def leading_chunks(self, table: BlockTable, tokens: int) -> int:
        """Chunks without a gap from the start of the first ``tokens`` tokens on, never all of the tokens."""
        for chunk in range((tokens - 1) // self.chunk_tokens):
            if not self._pool.use(self._key(table, chunk)):
                return chunk
        return (tokens - 1) // self.chunk_tokens

    def write_through(self, table: BlockTable, tokens: int) -> None:
        """Keep the full chunks among the first ``tokens`` tokens."""
        full = tokens // self.chunk_tokens
        for chunk in range(table.chunks_written, full):
            self.written_bytes += self._pool.put(self._key(table, chunk), self.chunk_bytes)
        table.chunks_written = max(table.chunks_written, full)

    def content(self, table: BlockTable, chunk: int) -> int:
        """Identity of the content of a chunk."""
        return table.content((chunk + 1) * self._chunk_blocks - 1)

    def check_integrity(self) -> None:
        """See :meth:`TierPool.check_integrity`."""
        self._pool.check_integrity()

    def _key(self, table: BlockTable, chunk: int) -> tuple[int, int]:
        return self._namespace, self.content(table, chunk)
