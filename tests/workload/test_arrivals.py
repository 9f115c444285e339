"""Arrival processes and changed rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.workload.arrivals import ARRIVALS, arrivals_ns, change_rate
from servesim.workload.request import Request, Workload

SECOND = 1_000_000_000


def workload_at(*arrivals: int) -> Workload:
    return Workload([Request(index, 4, 4, arrival) for index, arrival in enumerate(arrivals)], source="x")


def times(workload: Workload) -> list[int]:
    return [request.arrival_ns for request in workload]


def test_uniform_arrivals_keep_one_distance() -> None:
    found = arrivals_ns("uniform", 4, 4.0, np.random.default_rng(0))
    assert found.tolist() == [0, SECOND // 4, SECOND // 2, 3 * SECOND // 4]


def test_a_burst_arrives_at_once() -> None:
    found = arrivals_ns("burst", 7, 6.0, np.random.default_rng(0), burst_size=3)
    assert found.tolist() == [0, 0, 0, SECOND // 2, SECOND // 2, SECOND // 2, SECOND]


@pytest.mark.parametrize("process", ARRIVALS)
def test_every_process_starts_at_zero_and_holds_its_rate(process: str) -> None:
    found = arrivals_ns(process, 40_000, 8.0, np.random.default_rng(1), cv=1.5)
    assert found[0] == 0
    assert (np.diff(found) >= 0).all()
    assert found[-1] / 1e9 == pytest.approx(5_000, rel=0.03)  # 40,000 gaps: deviation of the sum is under 1 %
    assert (found % 1000 == 0).all()


@pytest.mark.parametrize(("process", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 3.0)])
def test_gaps_vary_as_they_should(process: str, cv: float) -> None:
    gaps = np.diff(arrivals_ns(process, 100_000, 10.0, np.random.default_rng(2), cv=cv))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("process", ARRIVALS)
def test_an_infinite_rate_means_now(process: str) -> None:
    assert arrivals_ns(process, 3, math.inf, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_impossible_processes_are_refused() -> None:
    rng = np.random.default_rng(0)
    for options in ({"rate": 0.0}, {"rate": math.nan}, {"rate": 1e-12}, {"process": "fractal"}):
        with pytest.raises(InputError):
            arrivals_ns(**({"process": "poisson", "count": 9, "rate": 1.0, "rng": rng} | options))  # type: ignore[arg-type]
    for cv in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="cv"):
            arrivals_ns("gamma", 9, 1.0, rng, cv=cv)
    with pytest.raises(InputError, match="burst size"):
        arrivals_ns("burst", 9, 1.0, rng, burst_size=0)


def test_a_new_rate_stretches_the_pattern_of_the_file() -> None:
    workload = workload_at(0, 1 * SECOND, 4 * SECOND)  # two gaps in four seconds: half a request a second
    change_rate(workload, 1.0, seed=1)
    assert times(workload) == [0, SECOND // 2, 2 * SECOND]


def test_the_order_of_the_file_does_not_matter_for_the_rate() -> None:
    workload = workload_at(4 * SECOND, 0, 1 * SECOND)
    change_rate(workload, 0.25, seed=1)
    assert times(workload) == [8 * SECOND, 0, 2 * SECOND]


def test_arrivals_without_a_pattern_become_poisson() -> None:
    first, second, other = (workload_at(*[5] * 2000) for _ in range(3))
    change_rate(first, 20.0, seed=1)
    change_rate(second, 20.0, seed=1)
    change_rate(other, 20.0, seed=2)
    assert times(first) == times(second) != times(other)
    assert times(first) == sorted(times(first))
    assert times(first)[-1] / 1e9 == pytest.approx(100, rel=0.1)


def test_one_entry_arrives_at_zero() -> None:
    workload = workload_at(77)
    change_rate(workload, 3.0, seed=1)
    assert times(workload) == [0]


def test_a_session_is_one_arrival_and_keeps_its_tool_times() -> None:
    workload = workload_at(0, 0, 2 * SECOND)
    workload.requests[1].predecessor, workload.requests[1].tool_ns = 0, 123
    workload.requests[1].arrival_ns = 0
    change_rate(workload, 1.0, seed=1)  # one gap of two seconds becomes one second
    assert times(workload) == [0, 0, SECOND]
    assert workload.requests[1].tool_ns == 123
    change_rate(workload, math.inf, seed=1)
    assert times(workload) == [0, 0, 0]


def test_a_rate_so_low_that_time_ends_is_refused() -> None:
    with pytest.raises(InputError, match="raise the rate"):
        change_rate(workload_at(0, SECOND), 1e-9, seed=1)


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=30), st.floats(0.01, 1000))
def test_the_rate_asked_for_is_the_rate_found(arrivals: list[int], rate: float) -> None:
    workload = workload_at(*arrivals)
    distinct = len(set(arrivals)) > 1 and max(arrivals) - min(arrivals) > 10**6
    before = np.argsort(arrivals, kind="stable").tolist()
    if not distinct:
        return
    change_rate(workload, rate, seed=3)
    span_s = (max(times(workload)) - min(times(workload))) / 1e9
    assert (len(arrivals) - 1) / span_s == pytest.approx(rate, rel=1e-4)
    ordered = [times(workload)[index] for index in before]
    assert ordered == sorted(ordered)
