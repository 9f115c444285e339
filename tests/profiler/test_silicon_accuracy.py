"""Shipped bf16 bundles, derived from public measurements, against layerwise profiles of the same GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import silicon_error
from long_contexts import errors as decode_errors

from servesim.profiler.inspection import open_bundle
from servesim.results.stated_errors import BEYOND_TABLES
from tests.profiler.silicon_data import needs_silicon
from tests.profiler.whole_steps import HARDWARE, MODELS, STEPS, errors_percent, step_timer
from tests.recorded import recorded_path

SHIPPED = Path(__file__).resolve().parents[2] / "profiler" / "perf"
DENSE = MODELS[:2]
MOE = MODELS[2]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_the_steps_of_a_served_workload_are_within_a_few_per_cent(model: str, tp: int) -> None:
    """The stated set of benchmarks/silicon_error.py: 2.5 % in the median, 10 % in 19 of 20 steps."""
    measured_root = recorded_path("perf")
    steps = silicon_error.served_steps(model, tp)
    ours, measured = (
        silicon_error.times_ns(
            silicon_error.timer(root, model, tp, silicon_error.WAITING, whole_experts=model == MOE), steps
        )
        for root in (SHIPPED, measured_root)
    )
    error = np.abs(ours / measured - 1.0)[silicon_error.stated(model, steps)] * 100
    assert np.median(error) < 2.5
    assert np.percentile(error, 95) < 10


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", DENSE)
@pytest.mark.parametrize(("kind", "median", "p95"), [("decode", 2, 6), ("prefill", 6, 8), ("mixed", 5, 9)])
def test_whole_steps_of_dense_models_match_a_measured_profile(
    model: str, tp: int, kind: str, median: float, p95: float
) -> None:
    measured = step_timer(recorded_path("perf"), model, tp)
    error = np.abs(errors_percent(step_timer(SHIPPED, model, tp), measured, STEPS[kind]))
    assert np.median(error) < median
    assert np.percentile(error, 95) < p95


@pytest.mark.parametrize(("kind", "median", "p95"), [("decode", 3, 10), ("prefill", 3, 6), ("mixed", 2, 6)])
def test_whole_steps_of_a_moe_model_match_a_measured_profile(kind: str, median: float, p95: float) -> None:
    """A single decode is left out: the profile read the same few experts again and again, from L2."""
    measured = step_timer(recorded_path("perf"), MOE, 1)
    steps = [step for step in STEPS[kind] if step[0] is not None or step[1] > 1]
    error = np.abs(errors_percent(step_timer(SHIPPED, MOE, 1), measured, steps))
    assert np.median(error) < median
    assert np.percentile(error, 95) < p95


@pytest.mark.parametrize(("tp", "sizes"), [(1, ("n<=64", "n<=128", "n<=256")), (2, ("n<=128", "n<=256"))])
def test_skew_of_large_batches_is_that_of_the_measured_fit(tp: int, sizes: tuple[str, ...]) -> None:
    """α of decodes alone in the buckets that serving visits: 64 to 256 decodes, mean near the shortest."""
    pairs = []
    for folder in (SHIPPED, recorded_path("perf")):
        path = folder / HARDWARE / MODELS[0] / "bf16" / f"tp{tp}" / "skew_fit.csv"
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        pairs.append({tuple(row[:5]): float(row[5]) for row in rows})
    ours, measured = pairs
    keys = [
        ("0", n, rate, kv, "kp=0")
        for n in sizes
        for rate in ("sr<=5%", "sr<=15%", "sr<=40%")
        for kv in ("kvB<=1k", "kvB<=4k", "kvB<=16k")
    ]
    difference = np.array([ours[key] - measured[key] for key in keys])
    assert np.abs(difference).max() < 0.04
    assert abs(difference.mean()) < 0.02


@pytest.mark.parametrize("model", MODELS)
def test_fp8_kv_pays_on_long_decodes_and_not_on_short_ones(model: str) -> None:
    wide, narrow = (
        open_bundle(str(SHIPPED / HARDWARE / model / variant)).tables(1).attention
        for variant in ("bf16", "bf16-kvfp8")
    )
    long = narrow.at(0, 128, 0, 32768) / wide.at(0, 128, 0, 32768)
    short = narrow.at(0, 1, 0, 16) / wide.at(0, 1, 0, 16)
    assert 0.45 < long < 0.6
    assert short > 0.85


@needs_silicon
def test_the_longest_rows_are_predicted_from_shorter_ones() -> None:
    found = np.array(list(decode_errors("H100", 2)))
    ours, in_proportion = np.median(abs(found), axis=0)
    assert len(found) > 100
    assert ours < 2.0
    assert in_proportion > 5.0
    assert np.percentile(abs(found[:, 0]), 80) < 100 * BEYOND_TABLES
