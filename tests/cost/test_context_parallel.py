"""Attention over KV that ranks share by tokens, worked out by hand from two tables."""

from __future__ import annotations

from contextlib import chdir
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from servesim.cost.attention import FullAttention
from servesim.cost.batch_shape import Shape
from servesim.cost.context_parallel import ContextExchange, Passes, shared_latent_tables, shared_tables
from servesim.cost.skew import SkewTable
from servesim.cost.tables import Curve
from servesim.network.topology import Dimension
from servesim.specs.hardware import EngineSpec
from servesim.specs.layers import Attention, LatentAttention
from tests.cost.bundles import Toy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servesim.cost.bundle import RankTables

LINK = Dimension("tp", "ring", 1.0, 1000.0)
GROUPED = Attention("full", 4, 1, 4, 4)
LATENT = LatentAttention(4, 8, 2, 4, 4, None)


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[RankTables]:
    """Decodes take 5 + n + n kv / 64 us; chunks 8 + n + n kv / 32 + c / 4 + c h / 64; nothing below KV 16."""
    with chdir(tmp_path):
        yield Toy().bundle(tmp_path).tables(1)


def us(tables: RankTables, chunks: Any, n: int, kv: int) -> float:
    term = FullAttention(tables, 1, EngineSpec(cudagraph=False))
    return term.ns(Shape(chunks, n, n * kv, kv, kv), 0) / 1000.0


@pytest.mark.parametrize(
    ("chunks", "n", "kv", "expected"),
    [
        # 13 over 64 of 128 tokens; 10 over the new ones, in the smallest KV there is
        ((), 4, 128, 13 + 10),
        # nothing is shared yet
        (((16, 0),), 0, 0, 12),
        # 16 * 32 / 64 over half of the history; 12 among themselves
        (((16, 64),), 0, 0, 8 + 12),
        # decodes, history, and new tokens of both in one launch: 8 + 4 + 4 * 16 / 32 + 4
        (((16, 64),), 4, 128, 13 + 8 + 18),
    ],
)
def test_shared_kv_by_hand(tables: RankTables, chunks: Any, n: int, kv: int, expected: float) -> None:
    assert us(shared_tables(tables, tables, 2, apart=True), chunks, n, kv) == pytest.approx(expected)


def test_without_a_kernel_for_new_tokens(tables: RankTables) -> None:
    shared = shared_tables(tables, tables, 2, apart=False)
    assert us(shared, (), 4, 128) == pytest.approx(13)
    assert us(shared, ((16, 64),), 4, 128) == pytest.approx(13 + 8 + 12)


@pytest.mark.parametrize(
    ("chunks", "n", "kv", "expected"),
    [
        # 10 with the shortest KV, and what 64 tokens add to that with all heads
        ((), 4, 128, 10 + 3),
        # a prompt attends to all of its history with its own heads
        (((16, 32),), 0, 0, 8 + 4 + 8),
        # 40 beside decodes over all of their KV, less the 17 of those, and the decodes as above
        (((16, 32),), 4, 128, 40 - 17 + 13),
    ],
)
def test_shared_vectors_by_hand(tables: RankTables, chunks: Any, n: int, kv: int, expected: float) -> None:
    assert us(shared_latent_tables(tables, tables, 2), chunks, n, kv) == pytest.approx(expected)


def test_lengths_of_the_skew_fit_stretch(tables: RankTables) -> None:
    import numpy as np

    skew = SkewTable(([], [2.0], [0.5], [100.0], [0.0, 30.0]), np.zeros((1, 2, 2, 2, 3)))
    own = replace(tables, skew=skew)
    assert shared_tables(own, own, 4, apart=True).skew.bounds[3:] == ([400.0], [0.0, 120.0])  # type: ignore[union-attr]
    assert shared_latent_tables(own, own, 4).skew.bounds[3:] == ([400.0], [0.0, 30.0])  # type: ignore[union-attr]


def exchange(attention: Any, tables: RankTables, backend: str = "ag_rs", workspace: int = 100) -> Any:
    """Two of four ranks, three blocks."""
    return ContextExchange(attention, 4, Passes(2, LINK, tables), 3, backend, workspace)


def names_and_bytes(lines: Any) -> list[tuple[str, int, int]]:
    return [(line.layer, line.calls, int(line.origin.split(" of ")[1].split(" bytes")[0])) for line in lines]


def test_bytes_of_grouped_heads(tables: RankTables) -> None:
    """Two heads of 4 elements in 16 bit for each of 3 tokens; log-sum-exps of two ranks in 32 bit."""
    shape = Shape((), 3, 300, 100, 100)
    assert names_and_bytes(exchange(GROUPED, tables).explain(shape, 3)) == [
        ("shared KV: queries", 3, 48),
        ("shared KV: log-sum-exps", 3, 48),
        ("shared KV: outputs", 3, 48),
    ]
    assert names_and_bytes(exchange(GROUPED, tables, "a2a").explain(shape, 3)) == [
        ("shared KV: queries", 3, 48),
        ("shared KV: outputs and log-sum-exps", 3, 72),
    ]


def test_whose_queries_travel(tables: RankTables) -> None:
    grouped, latent = exchange(GROUPED, tables), exchange(LATENT, tables)

    def queries(term: Any, chunks: Any, n: int, tokens: int) -> int:
        lines = names_and_bytes(term.explain(Shape(chunks, n, 9 * n, 9, 9), tokens))
        return sum(size for name, _, size in lines if name == "shared KV: queries")

    token, vector = 2 * 4 * 2, 2 * (8 + 2) * 2
    assert queries(grouped, ((7, 0),), 0, 8) == 0  # no KV yet
    assert queries(grouped, ((7, 5),), 0, 8) == 7 * token  # not padded: no graph holds chunks
    assert queries(grouped, ((7, 0),), 2, 16) == 9 * token
    assert queries(grouped, (), 3, 4) == 4 * token  # padded to a graph
    assert queries(latent, ((7, 5),), 0, 8) == 0
    assert queries(latent, ((7, 5),), 2, 16) == 2 * vector
    assert queries(latent, (), 3, 4) == 4 * vector


def test_histories_travel_in_parts(tables: RankTables) -> None:
    """Vectors of 10 elements, of 250 tokens: in three parts of at most 100 tokens."""
    (line,) = exchange(LATENT, tables).explain(Shape(((7, 50), (4, 200))), 11)
    assert (line.layer, line.calls) == ("shared KV: histories", 3 * 3)
    assert "of 1667 bytes over 2 ranks" in line.origin


def test_time_over_links(tables: RankTables) -> None:
    """Each of three passes: one hop with half of 48 / 1.75 bytes, at a byte a ns."""
    shape = Shape((), 3, 300, 100, 100)
    hop = 1000 + 48 / 1.75 / 2
    assert exchange(GROUPED, tables).ns(shape, 3) == pytest.approx(3 * 3 * hop)


def test_a_pass_is_half_of_what_grows(tables: RankTables) -> None:
    """The all-reduce takes 4 us with 10 bytes and 8 with 100: 5.689 with 48, of which 1.689 are halved."""
    import numpy as np

    reduce = Curve(np.array([10, 100]), np.array([4.0, 8.0]))
    known = replace(tables, collectives={("all_reduce", 2): reduce})
    shape = Shape((), 3, 300, 100, 100)
    term = exchange(GROUPED, known)
    assert term.ns(shape, 3) == pytest.approx(3 * 3 * 1000 * (4 + 4 * 38 / 90 / 2))
    assert "from all_reduce in tp1/comm.csv" in term.explain(shape, 3)[0].origin
    gather = Curve(np.array([1]), np.array([2.0]))
    known = replace(tables, collectives={("all_reduce", 2): reduce, ("all_gather", 2): gather})
    lines = exchange(GROUPED, known).explain(shape, 3)
    assert [line.us for line in lines] == pytest.approx([2, 2, 4 + 4 * 38 / 90 / 2])


def test_lines_add_up(tables: RankTables) -> None:
    for attention, backend in ((GROUPED, "ag_rs"), (LATENT, "a2a")):
        term = exchange(attention, tables, backend)
        for shape in (Shape((), 3, 300, 100, 100), Shape(((7, 250),), 2, 40, 20, 20)):
            total = sum(line.total_us for line in term.explain(shape, 4))
            assert total * 1000 == pytest.approx(term.ns(shape, 4))
