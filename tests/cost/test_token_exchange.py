"""The exchange of expert layers against sums by hand: rings of 10 GB/s and 1000 ns unless said otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.cost.build import _own_exchange
from servesim.cost.bundle import Bundle
from servesim.cost.expert_stage import TokenExchange
from servesim.cost.tables import Curve
from servesim.errors import InputError
from servesim.network.topology import Dimension, RankGroup, Topology
from servesim.specs.model import load_model
from servesim.specs.vllm_versions import experts_by_chunk
from tests.cost.bundles import HARDWARE, MODEL, VARIANT, Toy

if TYPE_CHECKING:
    from pathlib import Path

QWEN = load_model("Qwen/Qwen3-30B-A3B-Instruct-2507")  # rows of 4096 bytes, 128 logits of 2 bytes
FASTER = 1.75
"""A pass against half an all-reduce, as fitted."""
NOTHING: Any = SimpleNamespace(collective=lambda *_: None)


def links(**other: Dimension) -> Topology:
    names = ("tp", "pp", "dp", "nodes")
    return Topology(**{name: other.get(name, Dimension(name, "ring", 10.0, 1000.0)) for name in names})


def exchange(topology: Topology, nodes: list[int], tp: int, tables: Any = NOTHING) -> TokenExchange:
    member = RankGroup(((topology.tp, tp),)) if tp > 1 else None
    return TokenExchange(QWEN, tp * len(nodes), topology.data_parallel(nodes, tp), tables, member)


def test_one_rank_a_member_gathers_and_scatters_whole_batches() -> None:
    # 2 members with 100 tokens: a rank sends half of 200 rows
    there = 1000 + 100 * (4096 + 256) / FASTER / 10
    back = 1000 + 100 * 4096 / FASTER / 10
    assert exchange(links(), [0, 0], 1).allgather_reducescatter_ns(100) == pytest.approx(there + back)


def test_chunks_travel_between_all_ranks_then_in_the_member() -> None:
    # 2 members of 2 ranks with 101 tokens: chunks of 51, so 204 rows of which the members pass 1/2, then 1/4
    rows = 4 * 51
    there = 2000 + rows * (4096 + 256) / FASTER / 10 * (1 / 2 + 1 / 4)
    back = 2000 + rows * 4096 / FASTER / 10 * (1 / 2 + 1 / 4)
    gather = 1000 + 2 * 51 * 4096 / FASTER / 10 / 2
    told = exchange(links(), [0, 0], 2).allgather_reducescatter_ns(101)
    assert told == pytest.approx(there + back + gather)


def test_nodes_carry_a_share_of_the_chunks() -> None:
    slow = links(nodes=Dimension("nodes", "ring", 1.0, 9000.0))
    inside, across = 4 * 4352 / FASTER / 2 / 10, 4 * 4352 / FASTER / 4 / 1
    back = 4 * 4096 / FASTER * (1 / 2 / 10 + 1 / 4 / 1)
    gather = 1000 + 2 * 4096 / FASTER / 2 / 10
    told = exchange(slow, [0, 1], 2).allgather_reducescatter_ns(1)
    assert told == pytest.approx(10_000 + inside + across + 10_000 + back + gather)


def test_all_to_all_sends_chunks_where_their_experts_are() -> None:
    # of 128 experts 32 are on a rank: a token of 8 has one there with 1 - C(96, 8) / C(128, 8)
    chance = 1.0
    for chosen in range(8):
        chance *= (96 - chosen) / (128 - chosen)
    payload = 4 * 50 * (1 - chance) * 4096 / FASTER
    gather = 1000 + 100 * 4096 / FASTER / 2 / 10
    told = exchange(links(), [0, 0], 2).all_to_all_ns(100)
    assert told == pytest.approx(2 * (2000 + payload / 2 / 10 * 2) + gather)


def test_collectives_are_those_of_the_ranks_that_exchange() -> None:
    asked: list[tuple[str, int]] = []

    def collective(name: str, ranks: int) -> Any:
        asked.append((name, ranks))
        return SimpleNamespace(at=lambda _: [7.0])

    tables: Any = SimpleNamespace(collective=collective)
    assert exchange(links(), [0, 0], 2, tables).allgather_reducescatter_ns(10) == 21_000
    assert asked == [("all_gather", 4), ("reduce_scatter", 4), ("all_gather", 2)]
    asked.clear()
    exchange(links(), [0, 1], 2, tables).allgather_reducescatter_ns(10)
    assert asked == [("all_gather", 2)]


def test_chunks_are_taken_where_members_have_several_ranks() -> None:
    assert experts_by_chunk("qwen3_moe", 2, 4)
    assert not experts_by_chunk("qwen3_moe", 1, 4)
    assert not experts_by_chunk("qwen3_moe", 2, 2)
    assert not experts_by_chunk("mixtral", 2, 4)


def test_kernels_of_their_own_go_by_the_tokens_of_a_rank() -> None:
    # 2 members of 2 ranks with 100 tokens: chunks of 50, between 10 us for 10 and 90 us for 90; then a gather
    measured = {"deepep_low_latency": Curve(np.array([10, 90]), np.array([10.0, 90.0]))}
    topology = links()
    member = RankGroup(((topology.tp, 2),))
    group = topology.data_parallel([0, 0], 2)
    own = TokenExchange(QWEN, 4, group, NOTHING, member, measured)
    gather = 1000 + 100 * 4096 / FASTER / 2 / 10
    assert own.deepep_low_latency_ns(100) == pytest.approx(50_000 + gather)


def test_an_exchange_that_nobody_measured_is_refused(tmp_path: Path) -> None:
    bundle = Toy().write(tmp_path)
    found = Bundle(bundle, HARDWARE, MODEL, VARIANT, {})
    with pytest.raises(InputError, match="no exchange among 2 ranks; it has no such times"):
        _own_exchange(found, "deepep_low_latency", 2)
    table = "backend,ranks,tokens,time_us\ndeepep_low_latency,8,1,20\ndeepep_low_latency,8,64,50\n"
    (bundle / "tp1/exchange.csv").write_text(table)
    with pytest.raises(InputError, match="among 2 ranks; there are times for 8 ranks"):
        _own_exchange(found, "deepep_low_latency", 2)
    [curve] = _own_exchange(found, "deepep_low_latency", 8).values()
    assert curve.at(64)[0] == 50.0
