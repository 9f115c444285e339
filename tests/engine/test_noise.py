"""Noise on step times: seeded, a function of the step's number, the same however the steps are run."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.engine.noise import StepNoise
from servesim.engine.simulation import Simulation
from servesim.results.records import RunLog
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Workload
from tests.engine.small_engine import LinearTimes, requests, small_loop
from tests.engine.test_properties import engines, everything, workloads

fewer = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run_noisy(workload: Workload, sigma: float | None, seed: int = 1, cap: int = 0, **how: Any) -> RunLog:
    loop = small_loop(workload, noise=None if sigma is None else StepNoise(sigma, (seed,)), **how)
    return Simulation([loop], workload, RuntimeOptions(max_concurrency=cap)).run()


@settings(max_examples=60)
@given(st.floats(0, 0.5), st.integers(0, 9), st.lists(st.integers(0, 10**17), min_size=1, max_size=40))
def test_many_steps_at_once_are_the_same_steps(sigma: float, first: int, durations: list[int]) -> None:
    noise, twin = StepNoise(sigma, (3, 1)), StepNoise(sigma, (3, 1))
    together = noise.run_ns(first, np.array(durations, dtype=np.int64)).tolist()
    alone = [twin.step_ns(first + i, duration) for i, duration in reversed(list(enumerate(durations)))]
    assert together == alone[::-1]


def test_the_factors_have_mean_1_and_the_deviation_asked_for() -> None:
    factors = StepNoise(0.05, (7,)).factors(0, 40_000) / 2**20
    assert abs(factors.mean() - 1) < 4 * 0.05 / 200
    assert abs(factors.std() - 0.05) < 0.002
    assert not np.array_equal(factors, StepNoise(0.05, (8,)).factors(0, 40_000) / 2**20)


@fewer
@given(workloads(), engines, st.floats(0.001, 0.5), st.integers(0, 3))
def test_jumping_changes_nothing_under_noise_either(
    workload: Workload, engine: dict[str, Any], sigma: float, per_kv: int
) -> None:
    how = {**engine, "times": LinearTimes(per_kv=per_kv)}
    cap = how.pop("max_concurrency")
    stepped = run_noisy(workload, sigma, cap=cap, jump=False, **how)
    jumped = run_noisy(workload, sigma, cap=cap, jump=True, **how)
    assert everything(stepped) == everything(jumped)


@fewer
@given(workloads(), engines)
def test_noise_of_size_0_is_no_noise(workload: Workload, engine: dict[str, Any]) -> None:
    cap = engine["max_concurrency"]
    how = {name: value for name, value in engine.items() if name != "max_concurrency"}
    plain = run_noisy(workload, None, cap=cap, jump=True, **how)
    assert everything(plain) == everything(run_noisy(workload, 0.0, cap=cap, jump=True, **how))


def test_the_same_seed_repeats_and_another_does_not() -> None:
    workload = requests((8, 50, 0), (8, 40, 500))
    first, again, other = (everything(run_noisy(workload, 0.05, seed)) for seed in (1, 1, 2))
    assert first == again != other
