"""Means and percentiles of values that occur many times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.results import stats
from servesim.results.stats import describe, exact_sum, weighted_percentiles


def test_the_median_lies_between_the_middle_values() -> None:
    figures = describe(np.array([10, 20, 30, 40]))
    assert (figures.count, figures.mean, figures.median, figures.maximum) == (4, 25.0, 25.0, 40)
    assert figures.p90 == pytest.approx(37.0)  # rank 2.7 of 0..3
    assert figures.std == pytest.approx(125**0.5)


def test_a_value_counts_as_often_as_it_occurs() -> None:
    # 5 5 5 100: median 5, mean 28.75
    figures = describe(np.array([100, 5]), np.array([1, 3]))
    assert (figures.count, figures.mean, figures.median) == (4, 28.75, 5.0)


def test_values_that_never_occur_have_no_influence() -> None:
    assert describe(np.array([7, 10**12]), np.array([2, 0])) == describe(np.array([7, 7]))


def test_sums_over_63_bits_are_exact() -> None:
    long = 2**62 + 2**40
    values = np.array([long, long + 2, long + 4])
    figures = describe(values)
    assert (figures.mean, figures.median, figures.maximum) == (float(long + 2), float(long + 2), long + 4)
    assert describe(np.array([2**40]), np.array([2**30])).mean == float(2**40)
    assert exact_sum(values) == 3 * long + 6
    assert exact_sum(values, np.array([1, 2, 2**30])) == 3 * long + 4 + 2**30 * (long + 4)
    assert exact_sum(values[:0]) == 0


def test_an_empty_sample_is_all_zero() -> None:
    empty = describe(np.array([], dtype=np.int64))
    assert (empty.count, empty.mean, empty.p99, empty.maximum) == (0, 0.0, 0.0, 0)


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 5)), min_size=1).filter(
        lambda s: any(c for _, c in s)
    )
)
def test_weighted_percentiles_are_those_of_the_sample(sample: list[tuple[int, int]]) -> None:
    values = np.array([value for value, _ in sample], dtype=np.int64)
    counts = np.array([count for _, count in sample], dtype=np.int64)
    percents = (0, 12.5, 50, 90, 99, 100)
    expected = np.percentile(np.repeat(values, counts), percents)
    assert weighted_percentiles(values, counts, percents) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("spread", [3, 10**5, 10**12])
def test_long_samples_have_the_percentiles_of_numpy(spread: int) -> None:
    rng = np.random.default_rng(spread)
    values = rng.integers(0, spread, 20_000)
    values[7] = 10**15  # far from the rest
    counts = rng.integers(0, 4, len(values))
    written_out = np.repeat(values, counts)
    percents = (0, 0.01, 50, 90, 99, 99.99, 100)
    expected = np.percentile(written_out, percents)
    assert weighted_percentiles(values, counts, percents) == pytest.approx(expected.tolist())


def test_a_part_at_a_time_everything_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    values, counts = rng.integers(0, 10**9, 5000), rng.integers(1, 4, 5000)
    whole = describe(values, counts)
    monkeypatch.setattr(stats, "_PART", 64)
    in_parts = describe(values, counts)
    assert in_parts.std == pytest.approx(whole.std, rel=1e-14)
    assert replace(in_parts, std=whole.std) == whole
    assert exact_sum(values, counts) == sum(map(int, values * counts))
