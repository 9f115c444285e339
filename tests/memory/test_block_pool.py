"""The block pool against a slow, obvious twin, and its rules one by one."""

from __future__ import annotations

import tracemalloc
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from servesim.memory import block_pool
from servesim.memory.block_pool import BlockPool


class TwinPool:
    """Free blocks in a list, everything looked up by scanning."""

    def __init__(self, num_blocks: int) -> None:
        self.queue = list(range(1, num_blocks))
        self.hashes: list[tuple[int, int]] = []  # (content, block), oldest first
        self.owners = dict.fromkeys(range(1, num_blocks), 0)

    def take(self, count: int) -> list[int]:
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.hashes = [(content, block) for content, block in self.hashes if block not in taken]
        for block in taken:
            self.owners[block] = 1
        return taken

    def hashed(self, block: int) -> bool:
        return any(b == block for _, b in self.hashes)

    def free(self, blocks: list[int], num_full: int) -> None:
        idle = []
        for block in reversed(blocks):
            self.owners[block] -= 1
            if self.owners[block] == 0:
                idle.append(block)
        kept = [b for b in idle if b in blocks[:num_full]]
        self.queue = [b for b in idle if b not in kept] + self.queue + kept

    def lookup(self, content: int) -> int | None:
        return next((b for c, b in self.hashes if c == content), None)

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.owners[block] == 0:
                self.queue.remove(block)
            self.owners[block] += 1


class PoolMachine(RuleBasedStateMachine):
    """Random requests come and go; both pools must agree at every turn."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.twin = BlockPool(24), TwinPool(24)
        self.held: list[tuple[list[int], int]] = []  # (blocks, hashed ones in front)

    @rule(count=st.integers(1, 6), contents=st.lists(st.integers(0, 9), max_size=6, unique=True))
    def admit(self, count: int, contents: list[int]) -> None:
        hits = []
        for content in contents:
            block = self.pool.lookup(content)
            assert block == self.twin.lookup(content)
            if block is None or block in hits:
                break
            hits.append(block)
        free_hits = sum(1 for block in hits if self.pool.is_free(block))
        if count + free_hits > self.pool.num_free:
            return
        self.pool.share(hits)
        self.twin.share(hits)
        taken = self.pool.take(count)
        assert taken == self.twin.take(count)
        self.held.append((hits + taken, len(hits)))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), content=st.integers(0, 9))
    def register(self, which: int, content: int) -> None:
        which %= len(self.held)
        blocks, hashed = self.held[which]
        if hashed < len(blocks):
            self.pool.register(blocks[hashed], content)
            self.twin.hashes.append((content, blocks[hashed]))
            self.held[which] = (blocks, hashed + 1)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), unique=st.integers(0, 2))
    def leave(self, which: int, unique: int) -> None:
        blocks, hashed = self.held.pop(which % len(self.held))
        num_full = min(hashed + unique, len(blocks))
        self.pool.free(blocks, hashed, num_full)
        self.twin.free(blocks, num_full)

    @precondition(lambda self: not self.held)
    @rule()
    def idle(self) -> None:
        assert self.pool.is_whole

    @invariant()
    def both_agree(self) -> None:
        assert self.pool.num_free == len(self.twin.queue)
        assert self.pool.num_used + self.pool.num_free == 23
        self.pool.check_integrity()
        assert all(self.pool.lookup(c) == self.twin.lookup(c) for c in range(10))


class CrampedPoolMachine(PoolMachine):
    """The same with a pool that lists its blocks in small lots and tidies up at every turn."""

    def __init__(self) -> None:
        self.patches = [
            patch.object(block_pool, "_LISTED_AT_ONCE", 3),
            patch.object(block_pool, "_COMPACT_AT", 1),
        ]
        for each in self.patches:
            each.start()
        super().__init__()

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCrampedPoolMachine = CrampedPoolMachine.TestCase
TestCrampedPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_pool_costs_by_use_not_by_size() -> None:
    tracemalloc.start()
    pool = BlockPool(2**31 - 1)
    blocks = pool.take(1000)
    pool.free(blocks, 0, 1000)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (pool.usable, pool.num_free) == (2**31 - 2, 2**31 - 2)
    assert pool.take(2) == [1001, 1002]
    assert size < 200_000


def test_hits_without_end_leave_no_trace() -> None:
    pool = BlockPool(1 << 20)
    blocks = pool.take(64)
    for content, block in enumerate(blocks):
        pool.register(block, content)
    pool.free(blocks, 64, 64)
    for _ in range(5000):
        pool.share(blocks)
        pool.free(blocks, 64, 64)
    assert len(pool._returned) < 200_000
    pool.check_integrity()


def test_tidying_up_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_COMPACT_AT", 2)
    pool = BlockPool(7)
    blocks = pool.take(4)
    for content, block in enumerate(blocks):
        pool.register(block, content)
    pool.free(blocks, 4, 4)
    assert pool.take(1) == [5]
    for _ in range(9):
        pool.share(blocks[:2])
        pool.free(blocks[:2], 2, 2)
    assert len(pool._returned) < 14
    pool.check_integrity()
    assert pool.take(5) == [6, 4, 3, 2, 1]


@pytest.mark.parametrize("hashed", [0, 1])
def test_a_block_given_back_twice_is_noticed(hashed: int) -> None:
    pool = BlockPool(9)
    blocks = pool.take(2)
    for block in blocks[:hashed]:
        pool.register(block, 5)
    pool.free(blocks, hashed, 2)
    assert pool.is_whole
    pool.free(blocks, hashed, 2)
    assert not pool.is_whole


def test_one_block_is_set_aside() -> None:
    pool = BlockPool(5)
    assert (pool.usable, pool.num_free) == (4, 4)
    assert pool.take(4) == [1, 2, 3, 4]


def test_the_end_of_a_freed_prefix_is_overwritten_before_its_start() -> None:
    pool = BlockPool(5)
    blocks = pool.take(3)
    for content, block in enumerate(blocks):
        pool.register(block, content)
    pool.free(blocks, 3, 3)
    assert pool.take(2) == [4, 3]
    assert (pool.lookup(0), pool.lookup(1), pool.lookup(2)) == (1, 2, None)


def test_blocks_without_content_are_used_first() -> None:
    pool = BlockPool(6)
    blocks = pool.take(3)
    pool.free(blocks, 0, 2)
    assert pool.take(5) == [3, 4, 5, 2, 1]


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(3)
    blocks = pool.take(1)
    pool.register(blocks[0], 7)
    pool.share(blocks)
    pool.free(blocks, 1, 1)
    assert (pool.num_free, pool.is_free(1)) == (1, False)
    pool.free(blocks, 1, 1)
    assert (pool.num_free, pool.is_free(1)) == (2, True)
