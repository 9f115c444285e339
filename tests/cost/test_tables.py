from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.cost.bracket import bracket
from servesim.cost.tables import Curve, brackets, densify, describe_lookup, resample
from tests.cost.bundles import Rows, attention_rows, slow_lookup


def test_lookups_are_clamped_below_and_extrapolated_above() -> None:
    curve = Curve.from_rows(np.array([30.0, 10.0, 20.0]), np.array([9.0, 1.0, 3.0]))
    assert curve.at([0, 10, 15, 20, 25, 30, 40]).tolist() == [
        1,
        1,
        2,
        3,
        6,
        9,
        pytest.approx(9 + 10 * 0.4842105),
    ]


def test_all_points_tell_the_rate_beyond_the_last_one() -> None:
    points, us = np.array([8, 128, 256, 384, 496, 512]), np.array([99.0, 8, 16, 24, 31, 33])
    told = Curve.from_rows(points, us).at([1024])[0]
    assert told == pytest.approx(33 + 512 * np.polyfit(points, us, 1, w=points)[0])  # squares of weights
    assert told < 67  # the last interval, 2 us for 16, would say 97


def test_two_points_go_on_along_their_line() -> None:
    assert Curve.from_rows(np.array([0, 4]), np.array([1.0, 3.0])).at([8]).tolist() == [5]


def test_no_time_falls_beyond_the_last_point() -> None:
    curve = Curve.from_rows(np.array([10, 20]), np.array([5.0, 4.0]))
    assert curve.at([20, 30, 1000]).tolist() == [4, 4, 4]


def test_a_single_point_holds_everywhere() -> None:
    assert Curve.from_rows(np.array([7.0]), np.array([3.0])).at([0, 7, 99]).tolist() == [3, 3, 3]


def test_measured_points_come_back_bit_for_bit() -> None:
    points, values = np.array([1, 3, 10, 11]), np.array([0.1, 0.7, 1 / 3, 0.3])
    assert resample(points, values, points).tolist() == values.tolist()


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8, unique=True), st.integers(0, 400))
def test_scalar_and_vector_brackets_are_the_same_floats(points: list[int], query: int) -> None:
    grid = np.array(sorted(points))
    low, high, weight = brackets(grid, [query])
    s_low, s_high, s_weight = bracket(grid.tolist(), query)
    values = np.arange(len(grid)) ** 2 + 0.1
    assert weight[0] == s_weight
    assert (1 - weight[0]) * values[low[0]] + weight[0] * values[high[0]] == pytest.approx(
        (1 - s_weight) * values[s_low] + s_weight * values[s_high], abs=1e-12
    )


@st.composite
def ragged(draw: st.DrawFn, axes: int = 4) -> Rows:
    """Measurements whose points differ under every point of the axes before."""

    def grow(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(prefix) == axes:
            return [prefix]
        points = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True))
        return [key for point in points for key in grow((*prefix, point))]

    return {key: float(draw(st.integers(0, 1000))) for key in grow(())}


@settings(max_examples=40, deadline=None)
@given(ragged(), st.lists(st.tuples(*[st.integers(0, 16)] * 4), min_size=1, max_size=6))
def test_the_dense_tensor_equals_the_ragged_lookup(rows: Rows, queries: list[tuple[int, ...]]) -> None:
    surface = densify(np.array(list(rows)), np.array(list(rows.values())))
    scale = max(1.0, float(np.abs(surface.tensor).max()))
    for query in queries:
        inside = tuple(min(x, int(axis[-1])) for x, axis in zip(query, surface.axes, strict=True))
        expected = slow_lookup(rows, inside)
        assert surface.at(*([x] for x in inside))[0] == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale)


@settings(max_examples=40, deadline=None)
@given(ragged(), st.tuples(*[st.integers(0, 40)] * 4))
def test_beyond_the_ends_a_tensor_goes_on_as_its_own_rows(rows: Rows, query: tuple[int, ...]) -> None:
    surface = densify(np.array(list(rows)), np.array(list(rows.values())))
    whole = {key: float(surface.at(*([x] for x in key))[0]) for key in product(*map(list, surface.axes))}
    edge = tuple(min(x, int(axis[-1])) for x, axis in zip(query, surface.axes, strict=True))
    expected = max(slow_lookup(whole, query), slow_lookup(whole, edge))
    scale = max(1.0, float(np.abs(surface.tensor).max()))
    assert surface.at(*([x] for x in query))[0] == pytest.approx(expected, rel=1e-9, abs=1e-6 * scale)


def test_the_tensor_of_a_bundle_like_grid_equals_the_ragged_lookup() -> None:
    rows = attention_rows()
    surface = densify(np.array(list(rows)), np.array(list(rows.values())))
    assert [axis.tolist() for axis in surface.axes] == [
        [0, 16, 64],
        [0, 1, 4, 8],
        [0, 32, 128],
        [0, 16, 64, 256],
    ]
    for query in [(16, 0, 0, 0), (0, 8, 0, 300), (40, 6, 50, 100), (100, 9, 200, 1000), (5, 0, 0, 0)]:
        assert surface.at(*([x] for x in query))[0] == pytest.approx(slow_lookup(rows, query))


def test_cutting_a_surface_removes_the_axis() -> None:
    rows = attention_rows()
    cut = densify(np.array(list(rows)), np.array(list(rows.values()))).along(0, 0).along(1, 0)
    assert cut.at([4], [64])[0] == rows[0, 4, 0, 64]


def test_a_lookup_says_where_its_number_comes_from() -> None:
    points = np.array([96, 112])
    assert describe_lookup(points, 96, "tokens") == "profiled at 96 tokens"
    assert describe_lookup(points, 100, "tokens") == "interpolated between 96 and 112 tokens"
    assert describe_lookup(points, 200, "tokens") == "extrapolated to 200, measured up to 112 tokens"
    assert describe_lookup(points, 1, "tokens") == "held at 96 tokens, the smallest"
    assert describe_lookup(points[:1], 200, "tokens") == "held at 96 tokens, the only row"
