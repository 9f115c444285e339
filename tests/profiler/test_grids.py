"""Grids: linear interpolation between their points must stay true to a kernel's staircase."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from servesim.profiler.grids import attention_grid, chunk_grid, doubling, refined, token_grid
from servesim.profiler.silicon.gemm import tile_edge


def test_doubling_always_ends_with_its_last_value() -> None:
    assert doubling(16, 100) == [16, 32, 64, 100]
    assert doubling(1, 1) == [1]


@given(st.integers(18, 3000))
def test_the_token_grid_follows_tiles_up_to_2048(last: int) -> None:
    grid = token_grid(last)
    assert grid[0] == 1
    assert grid[-1] == last
    exact = min(grid[-2], 2048) if last > 256 else last  # beyond, the grid ends on a slope
    tokens = np.arange(129, exact + 1)
    assert np.array_equal(np.interp(tokens, grid, tile_edge(np.array(grid))), tile_edge(tokens))


def test_the_token_grid_ends_on_a_slope_and_not_on_a_tread() -> None:
    for last in (512, 1024, 2048, 4096, 8192):
        before, end = token_grid(last)[-2:]
        assert tile_edge(np.array([before]))[0] < tile_edge(np.array([end]))[0]


def test_chunks_have_a_point_between_powers_of_two_from_512() -> None:
    assert chunk_grid(2048) == [16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048]


def test_refining_puts_points_on_both_sides_of_a_step() -> None:
    def stairs(count: int) -> float:
        return 10.0 if count <= 96 else 20.0

    grid = refined([16, 256], stairs, 0.01, 10)
    assert {96, 97} <= set(grid)
    for count in range(16, 257):
        assert math.isclose(np.interp(count, grid, [stairs(c) for c in grid]), stairs(count))


def test_every_chunk_and_count_has_a_full_rectangle() -> None:
    grid = attention_grid(2048, 256, 131072)
    by_slice: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for chunk, history, decodes, kv in grid.rows():
        by_slice.setdefault((chunk, decodes), set()).add((history, kv))
    for (chunk, decodes), points in by_slice.items():
        histories, lengths = {p[0] for p in points}, {p[1] for p in points}
        assert len(points) == len(histories) * len(lengths)
        assert len(lengths) >= (0 if not decodes else 3 if chunk else 6)
    assert len(set(grid.rows())) == len(grid.rows())


def test_decodes_that_no_memory_holds_are_left_out() -> None:
    grid = attention_grid(2048, 256, 131072)
    assert grid.lengths_for(1)[-1] == 131072
    assert grid.lengths_for(256)[-1] == 32768
