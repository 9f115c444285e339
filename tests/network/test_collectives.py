from __future__ import annotations

import pytest

from servesim.network.topology import (
    ring_all_gather_ns,
    ring_all_reduce_ns,
    ring_all_to_all_ns,
    ring_reduce_scatter_ns,
    send_ns,
)

HALVES = (ring_all_gather_ns, ring_reduce_scatter_ns, ring_all_to_all_ns)


def test_a_single_rank_has_nothing_to_exchange() -> None:
    assert [f(1, 10**6, 16, 20_000) for f in (*HALVES, ring_all_reduce_ns)] == [0, 0, 0, 0]


def test_two_ranks_swap_half_the_payload_twice() -> None:
    # 1 MB over 16 GB/s: each of 2 passes moves 500 kB, 31250 ns, and pays 20000 ns.
    assert ring_all_reduce_ns(2, 1_000_000, 16, 20_000) == 2 * (20_000 + 31_250)


def test_eight_ranks_make_seven_hops_of_an_eighth() -> None:
    for collective in HALVES:
        assert collective(8, 8_000, 1, 100) == 7 * (100 + 1_000)
    assert ring_all_reduce_ns(8, 8_000, 1, 100) == 14 * (100 + 1_000)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for ranks in (2, 3, 4, 7):
        halves = ring_reduce_scatter_ns(ranks, 12_345, 25, 700) + ring_all_gather_ns(ranks, 12_345, 25, 700)
        assert ring_all_reduce_ns(ranks, 12_345, 25, 700) == pytest.approx(halves)


def test_a_send_crosses_one_link_once() -> None:
    assert send_ns(32_000, 16, 20_000) == 22_000
