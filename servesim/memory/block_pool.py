"""The pool of KV-cache blocks of one instance: free blocks in eviction order, and the prefix-cache index.

Behaves as the block pool of vLLM 0.24 does: block 0 is set aside as the null block, blocks are taken from the
front of a queue; a returned block with a content hash goes to its end and keeps the hash until it is taken
again, one without goes to the front; equal content may sit in several blocks (the oldest one is found first).

Three things keep it cheap. The queue is a plain list that is read by slices: a free block that is re-used in
place (a prefix hit) leaves a *stale* entry behind, which is skipped when it comes up. Reference counts exist
only for hashed blocks, since no other block can have two owners. And blocks that were never taken are not
listed but counted: a pool costs memory for the blocks it has used, not for those it has. The queue is then in
three parts: what is listed before those blocks, the blocks from ``_fresh`` on, and what was returned since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

_COMPACT_AT = 1 << 16
_LISTED_AT_ONCE: Final = 256
"""Blocks that are listed when the listed ones run out."""


class PoolWatcher(Protocol):
    """Who wants to know what the prefix cache holds."""

    def stored(self, content: int) -> None: ...

    def removed(self, content: int) -> None: ...


class BlockPool:
    """Free blocks, content hashes and reference counts of ``num_blocks`` blocks (one of them the null
    block)."""

    __slots__ = (
        "_end",
        "_fresh",
        "_hash_of",
        "_head",
        "_index",
        "_num_stale",
        "_queue",
        "_refs",
        "_returned",
        "_stale",
        "_watcher",
        "num_free",
        "usable",
    )

    def __init__(self, num_blocks: int) -> None:
        self.usable = num_blocks - 1
        self.num_free = self.usable
        self._queue: list[int] = []
        """Blocks to take next, from ``_head`` on."""
        self._head = 0
        self._fresh = 1
        """First of the blocks that were never listed; they come after ``_queue``."""
        self._end = num_blocks
        self._returned: list[int] = []
        """Blocks that come after all of those; the same list as ``_queue`` once every block was listed."""
        self._stale: dict[int, int] = {}
        """Block → number of its queue entries that no longer count (always its earliest ones)."""
        self._num_stale = 0
        """Sum of those."""
        self._hash_of: dict[int, int] = {}
        self._refs: dict[int, int] = {}
        """Owners of a hashed block; 0 while it is free."""
        self._index: dict[int, dict[int, None]] = {}
        """Content hash → the blocks that hold it, oldest first."""
        self._watcher: PoolWatcher | None = None

    def watch(self, watcher: PoolWatcher) -> None:
        """Tell somebody which contents blocks get and lose."""
        self._watcher = watcher

    @property
    def num_used(self) -> int:
        """Blocks that a request holds."""
        return self.usable - self.num_free

    def take(self, count: int) -> list[int]:
        """The ``count`` blocks that have been free for longest; their old content is forgotten.

        The caller makes sure that ``count <= num_free``.
        """
        if self._head + count > len(self._queue):
            self._list_more(count)
        if self._stale and self._queue is self._returned:
            taken = self._take_past_stale(count)
        else:
            head = self._head
            taken = self._queue[head : head + count]
            self._head = head + count
        self.num_free -= count
        if self._hash_of:
            for block in taken:
                if block in self._hash_of:
                    self._forget(block)
        if self._head > _COMPACT_AT and self._head * 2 > len(self._queue):
            del self._queue[: self._head]
            self._head = 0
        return taken

    def _list_more(self, count: int) -> None:
        """See to it that ``count`` entries can be read from the queue, stale ones not counted."""
        queue, fresh = self._queue, self._fresh
        if queue is self._returned:
            return
        least = fresh + count - (len(queue) - self._head)
        self._fresh = min(max(fresh + _LISTED_AT_ONCE, least), self._end)
        queue.extend(range(fresh, self._fresh))
        if self._fresh == self._end:
            queue.extend(self._returned)
            self._returned = queue

    def _take_past_stale(self, count: int) -> list[int]:
        queue, stale, head = self._queue, self._stale, self._head
        taken: list[int] = []
        while len(taken) < count:
            block = queue[head]
            head += 1
            left = stale.get(block)
            if left is None:
                taken.append(block)
            else:
                self._num_stale -= 1
                if left == 1:
                    del stale[block]
                else:
                    stale[block] = left - 1
        self._head = head
        return taken

    def _drop_stale(self) -> None:
        """Take the stale entries out of the queue."""
        listed, left = self._returned, dict(self._stale)
        kept = []
        for block in listed[self._head if listed is self._queue else 0 :]:
            if left.get(block, 0):
                left[block] -= 1
            else:
                kept.append(block)
        if listed is self._queue:
            self._queue, self._head = kept, 0
        self._returned = kept
        self._stale.clear()
        self._num_stale = 0

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block)
        del self._refs[block]
        holders = self._index[content]
        del holders[block]
        if not holders:
            del self._index[content]
        if self._watcher:
            self._watcher.removed(content)

    def free(self, blocks: list[int], num_hashed: int, num_full: int) -> None:
        """Give back a request's blocks, last block first, so that the end of a prefix is evicted before its
        start.

        The first ``num_hashed`` carry a content hash here and may have other owners; the first ``num_full``
        hold content worth keeping (in vLLM those are the hashed ones). Blocks after those go to the front of
        the queue: nothing is lost by using them next.
        """
        rest = blocks[num_full:]
        if rest:
            rest.reverse()
            start = max(self._head - len(rest), 0)
            self._queue[start : self._head] = rest
            self._head = start
        queue = self._returned
        kept = blocks[num_hashed:num_full]
        kept.reverse()
        queue.extend(kept)
        self.num_free += len(rest) + len(kept)
        refs = self._refs
        for block in reversed(blocks[:num_hashed]):
            refs[block] -= 1
            if refs[block] == 0:
                queue.append(block)
                self.num_free += 1

    def give_back(self, blocks: Sequence[int], kept: Container[int]) -> None:
        """Give back blocks in this order, whichever of them carry a hash; those in ``kept`` hold content
        worth keeping although they carry none here."""
        refs = self._refs
        first: list[int] = []
        last: list[int] = []
        for block in blocks:
            if block in refs:
                refs[block] -= 1
                if refs[block]:
                    continue
                last.append(block)
            else:
                (last if block in kept else first).append(block)
        start = max(self._head - len(first), 0)
        self._queue[start : self._head] = first
        self._head = start
        self._returned.extend(last)
        self.num_free += len(first) + len(last)

    def is_hashed(self, block: int) -> bool:
        """Whether a block carries a content hash."""
        return block in self._hash_of

    def content_of(self, block: int) -> int:
        """The content of a hashed block."""
        return self._hash_of[block]

    def register(self, block: int, content: int) -> None:
        """Note that ``block``, held by one request, now holds ``content``."""
        self._hash_of[block] = content
        self._refs[block] = 1
        self._index.setdefault(content, {})[block] = None
        if self._watcher:
            self._watcher.stored(content)

    def lookup(self, content: int) -> int | None:
        """The oldest block that holds ``content``, free or in use."""
        holders = self._index.get(content)
        return next(iter(holders)) if holders else None

    def is_free(self, block: int) -> bool:
        """Whether a hashed block has no owner."""
        return self._refs[block] == 0

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of these hashed blocks, pulling free ones out of the queue."""
        for block in blocks:
            if self._refs[block] == 0:
                self._stale[block] = self._stale.get(block, 0) + 1
                self._num_stale += 1
                self.num_free -= 1
            self._refs[block] += 1
        if self._num_stale > _COMPACT_AT and self._num_stale * 2 > len(self._returned):
            self._drop_stale()

    @property
    def is_whole(self) -> bool:
        """Whether every block is free and listed once, as it must be when no request is left.

        Quick, and so not all that :meth:`check_integrity` looks at.
        """
        listed = len(self._queue) - self._head + self._end - self._fresh - self._num_stale
        if self._returned is not self._queue:
            listed += len(self._returned)
        return self.num_free == listed == self.usable and not any(self._refs.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless queue, counts and index agree (O(blocks used); for tests and debug
        runs)."""
        stale = dict(self._stale)
        assert self._num_stale == sum(stale.values()), "stale entries counted wrongly"
        free: list[int] = []
        listed = self._queue[self._head :]
        for block in listed if self._returned is self._queue else listed + self._returned:
            if stale.get(block, 0):
                stale[block] -= 1
            else:
                free.append(block)
        assert not any(stale.values()), "a stale entry that is not in the queue"
        never_taken = self._end - self._fresh
        assert len(free) == len(set(free)) == self.num_free - never_taken, "free blocks counted wrongly"
        assert not any(self._fresh <= block for block in free), "a block is free that was never listed"
        assert set(self._refs) == set(self._hash_of), "reference counts without a hash"
        assert all(count >= 0 for count in self._refs.values()), "negative reference count"
        idle = {block for block, count in self._refs.items() if count == 0}
        assert idle <= set(free), "a hashed block without owner that is not free"
        assert not {block for block in free if self._refs.get(block)}, "a free block with an owner"
        for content, holders in self._index.items():
            assert all(self._hash_of[block] == content for block in holders), "index and hashes disagree"
        assert sum(map(len, self._index.values())) == len(self._hash_of), (
            "a hashed block missing from the index"
        )
