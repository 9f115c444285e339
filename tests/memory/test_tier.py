"""The lower tier's pool, chunk by chunk."""

from __future__ import annotations

from servesim.memory.kv_cache import BlockTable
from servesim.memory.tier import LowerTier, TierPool


def test_the_least_recently_used_chunk_makes_room() -> None:
    pool = TierPool(300)
    for identity in (1, 2, 3):
        assert pool.put((0, identity), 100) == 100
    assert pool.use((0, 1))
    pool.put((0, 4), 100)
    assert [pool.use((0, identity)) for identity in (1, 2, 3, 4)] == [True, False, True, True]
    pool.check_integrity()


def test_what_is_there_is_not_written_again() -> None:
    pool = TierPool(300)
    pool.put((0, 1), 100)
    assert pool.put((0, 1), 100) == 0
    assert pool.used_bytes == 100


def test_a_chunk_larger_than_the_tier_is_left_out() -> None:
    pool = TierPool(50)
    assert pool.put((0, 1), 100) == 0
    assert len(pool) == 0


def test_a_prefix_is_recalled_in_whole_chunks() -> None:
    tier = LowerTier(TierPool(1 << 40), 0, block_size=16, bytes_per_token=10)
    table = BlockTable([], unique_base=0)
    tier.write_through(table, 1000)  # three full chunks of 256
    assert tier.written_bytes == 3 * 2560
    assert tier.leading_chunks(table, 1000) == 3
    assert tier.leading_chunks(table, 768) == 2
    assert tier.leading_chunks(table, 769) == 3
    assert tier.leading_chunks(table, 100) == 0


def test_a_gap_ends_the_prefix() -> None:
    pool = TierPool(2 * 2560)
    tier = LowerTier(pool, 0, block_size=16, bytes_per_token=10)
    table = BlockTable([], unique_base=0)
    tier.write_through(table, 768)  # the first chunk makes room for the third
    assert tier.leading_chunks(table, 769) == 0


def test_instances_of_another_kind_do_not_find_each_others_chunks() -> None:
    pool = TierPool(1 << 30)
    one, other = (LowerTier(pool, kind, block_size=16, bytes_per_token=1) for kind in (0, 1))
    table = BlockTable([], unique_base=0)
    one.write_through(table, 256)
    assert one.leading_chunks(table, 300) == 1
    assert other.leading_chunks(table, 300) == 0


def test_large_blocks_are_chunks_of_their_own() -> None:
    assert LowerTier(TierPool(1), 0, block_size=512, bytes_per_token=1).chunk_tokens == 512
    assert LowerTier(TierPool(1), 0, block_size=48, bytes_per_token=1).chunk_tokens == 240
