"""Tests of a simulated run against its recording, and what would explain a miss."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.bench.fit import compare_means, fit_text, kolmogorov_smirnov


def test_equal_samples_have_no_distance() -> None:
    values = np.arange(50)
    assert kolmogorov_smirnov(values, values) == (0.0, 1.0)


def test_distance_and_probability_are_those_of_the_textbook() -> None:
    one, two = np.arange(100), np.arange(100) + 25
    distance, probability = kolmogorov_smirnov(one, two)
    assert distance == pytest.approx(0.25)
    # Q((sqrt(50) + 0.12 + 0.11 / sqrt(50)) * 0.25), Stephens' form
    assert probability == pytest.approx(0.00307, abs=2e-4)


def test_samples_of_two_places_are_told_apart() -> None:
    distance, probability = kolmogorov_smirnov(np.arange(40), np.arange(40) + 1000)
    assert distance == 1.0
    assert probability < 1e-9


def test_means_are_equal_only_with_their_whole_interval() -> None:
    recorded = np.full(400, 1000)
    near = compare_means(recorded, recorded + np.tile([10, 30], 200), 5.0)
    assert near.difference == pytest.approx(2.0)
    assert near.low < 2.0 < near.high
    assert near.equal
    assert not compare_means(recorded, recorded + np.tile([-2000, 2040], 200), 5.0).equal
    assert not compare_means(recorded, recorded + 60, 5.0).equal


def test_the_lines_name_what_would_explain_a_miss() -> None:
    tests = {
        "TTFT": {
            "means_equal": False,
            "margin_percent": 5.0,
            "mean_interval_percent": [6.0, 8.0],
            "ks_statistic": 0.2,
            "ks_p_value": 0.01,
            "mean_difference_percent": 7.0,
        }
    }
    text = fit_text(tests, {"TTFT": {"decode steps": -3.5, "steps with prefill": None}})
    assert "not shown to be equal within 5 %" in text
    assert "one of: decode steps -3.5 %" in text
    assert "steps with prefill" not in text
