from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.network.topology import Dimension, RankGroup, Topology, ring_all_reduce_ns
from servesim.specs.cluster import load_cluster
from tests.specs.clusters import cluster

if TYPE_CHECKING:
    from servesim.specs.cluster import Wiring

WIRINGS: tuple[Wiring, ...] = ("ring", "fully_connected", "switch")
COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")


def dimension(wiring: Wiring = "ring", bandwidth: float = 2.0, latency: float = 100.0) -> Dimension:
    return Dimension("tp", wiring, bandwidth, latency)


# 4 ranks, 8000 bytes, 2 bytes a ns, 100 ns a hop: a piece of 2000 bytes takes 1000 ns.
PASSES = {"ring": 3 * (100 + 1000), "fully_connected": 100 + 1000, "switch": 100 + 3 * 1000}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_collectives_of_one_dimension_worked_out_by_hand(wiring: Wiring) -> None:
    group = RankGroup(((dimension(wiring), 4),))
    one = PASSES[wiring]
    assert [getattr(group, f"{name}_ns")(8000) for name in COLLECTIVES] == [one, one, one, 2 * one]
    assert dimension(wiring).send_ns(8000) == 100 + 4000


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_single_rank_has_nothing_to_exchange(wiring: Wiring, collective: str) -> None:
    group = RankGroup(((dimension(wiring), 1), (dimension(wiring), 1)))
    assert getattr(group, f"{collective}_ns")(10**9) == 0


@pytest.mark.parametrize("outer", WIRINGS)
@pytest.mark.parametrize("inner", WIRINGS)
def test_collectives_over_two_dimensions_worked_out_by_hand(inner: Wiring, outer: Wiring) -> None:
    group = RankGroup(((dimension(inner), 4), (dimension(outer, 0.5, 700), 2)))
    # Inside: as above. Outside 2 ranks share the quarter of 2000 bytes: pieces of 1000 at 0.5 bytes a ns.
    outside = 700 + 2000
    assert group.all_gather_ns(8000) == group.reduce_scatter_ns(8000) == PASSES[inner] + outside
    assert group.all_reduce_ns(8000) == 2 * (PASSES[inner] + outside)
    # An all-to-all moves all 8000 bytes in each dimension: pieces of 4000.
    assert group.all_to_all_ns(8000) == PASSES[inner] + 700 + 8000
    assert group.ranks == 8


def test_a_ring_is_the_textbook_ring() -> None:
    assert RankGroup(((dimension(), 7),)).all_reduce_ns(12_345) == ring_all_reduce_ns(7, 12_345, 2.0, 100.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(WIRINGS), st.integers(1, 9), st.floats(0.1, 900), st.floats(0, 50_000)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 10**8),
)
def test_collectives_of_any_mix_of_dimensions(
    spans: list[tuple[Wiring, int, float, float]], payload: int
) -> None:
    group = RankGroup(tuple((Dimension("d", wiring, bw, lat), n) for wiring, n, bw, lat in spans))

    def one_pass(span: tuple[Wiring, int, float, float], share: float) -> float:
        wiring, n, bw, lat = span
        if n == 1:
            return 0.0
        hops, pieces = {"ring": (n - 1, n - 1), "fully_connected": (1, 1), "switch": (1, n - 1)}[wiring]
        return hops * lat + pieces * share / n / bw

    gather = sum(one_pass(span, payload / prod(s[1] for s in spans[:i])) for i, span in enumerate(spans))
    assert group.all_gather_ns(payload) == pytest.approx(gather)
    assert group.reduce_scatter_ns(payload) == pytest.approx(gather)
    assert group.all_reduce_ns(payload) == pytest.approx(2 * gather)
    assert group.all_to_all_ns(payload) == pytest.approx(sum(one_pass(span, payload) for span in spans))


def test_a_list_of_links_goes_on_with_its_last() -> None:
    one = Topology.of(load_cluster(cluster(link_bw=16, link_latency=20_000)))
    assert one.tp == Dimension("tp", "ring", 16, 20_000)
    assert one.nodes == Dimension("nodes", "ring", 16, 20_000)
    several = Topology.of(
        load_cluster(cluster(link_bw=[450, 50], link_latency=[1, 2, 3, 4], link_topology=["switch", "ring"]))
    )
    assert several.tp == Dimension("tp", "switch", 450, 1)
    assert several.pp == Dimension("pp", "ring", 50, 2)
    assert several.dp == Dimension("dp", "ring", 50, 3)
    assert several.nodes == Dimension("nodes", "ring", 50, 4)


def test_a_data_parallel_group_spans_the_nodes_its_members_are_on() -> None:
    topology = Topology.of(load_cluster(cluster()))
    assert [ranks for _, ranks in topology.data_parallel([0, 0, 0]).spans] == [3, 1]
    assert [ranks for _, ranks in topology.data_parallel([0, 0, 1, 1]).spans] == [2, 2]
    assert [ranks for _, ranks in topology.data_parallel([4, 1, 4, 4]).spans] == [3, 2]
    assert [d.name for d, _ in topology.data_parallel([0, 1]).spans] == ["dp", "nodes"]
    assert [ranks for _, ranks in topology.data_parallel([0, 0, 1, 1], 4).spans] == [4, 2, 2]
