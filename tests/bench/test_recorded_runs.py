"""What the simulator promises on recorded vLLM runs; benchmarks/accuracy.py shows all figures."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.bench.agreement import METRICS, Agreement
from servesim.bench.calibrate import Calibration, calibrate
from servesim.bench.recording import load_recording
from servesim.bench.validate import RecordedRun, recorded_run
from servesim.specs.hardware import NO_HOST_TIME, load_hardware
from servesim.specs.paths import bundles_from
from tests.recorded import recorded_path

LLAMA = ("Llama-3.1-8B", "sharegpt-llama-3.1-8b-300-sps10")
QWEN = ("Qwen3-32B", "sharegpt-qwen3-300-sps10")
MOE = ("Qwen3-30B-A3B-Instruct-2507", "sharegpt-qwen3-300-sps10")
PUBLISHED = {
    LLAMA: {"TTFT": 0.040, "TPOT": 0.010, "latency": 0.018},
    QWEN: {"TTFT": 0.013, "TPOT": 0.008, "latency": 0.010},
    MOE: {"TTFT": 0.136, "TPOT": 0.017, "latency": 0.022},
}
"""Errors of the means that LLMServingSim publishes for these recordings."""


def run_of(folder: str, workload: str) -> RecordedRun:
    """The recorded cluster files count link_bw in GiB/s."""
    return recorded_run(
        load_recording(recorded_path("runs", "RTXPRO6000", folder)),
        dataset=recorded_path("workloads", f"{workload}.jsonl.gz"),
        link_gib=folder != LLAMA[0],  # one GPU has no links
    )


@pytest.fixture(scope="module")
def fit() -> Calibration:
    """Host constants fitted on the Llama run alone."""
    with bundles_from(recorded_path("perf")):
        return calibrate(run_of(*LLAMA))


def check_calibrated(agreement: Agreement) -> None:
    for metric in METRICS:
        assert abs(agreement.error(metric)) < 0.01
        assert abs(agreement.error(metric, "p99")) < 0.02
    assert float(np.median(np.abs(agreement.request_errors("latency")[0]))) < 0.01


def test_the_fitted_run_is_within_one_percent(fit: Calibration) -> None:
    check_calibrated(fit.after)
    assert 5000 < fit.engine.prefill_step_overhead_us < 7000
    assert fit.engine.decode_step_overhead_us < 300


def test_the_other_run_is_predicted_within_one_percent(fit: Calibration) -> None:
    with bundles_from(recorded_path("perf")):
        check_calibrated(run_of(*QWEN).simulate("queued", fit.engine))


@pytest.mark.parametrize("run", [LLAMA, MOE])
def test_other_runs_are_as_close_as_published(run: tuple[str, str]) -> None:
    with bundles_from(recorded_path("perf")):
        agreement = run_of(*run).simulate("queued")
    for metric, error in PUBLISHED[run].items():
        assert abs(agreement.error(metric)) <= error


def test_the_fitted_run_is_as_close_with_another_time(fit: Calibration) -> None:
    with bundles_from(recorded_path("perf")):
        agreement = run_of(*QWEN).simulate("queued", fit.engine)
    for metric, error in PUBLISHED[QWEN].items():
        assert abs(agreement.error(metric)) <= error


def test_the_shipped_host_time_is_what_a_calibration_finds() -> None:
    with bundles_from(recorded_path("perf")):
        engine = calibrate(run_of(*QWEN)).engine
    shipped = load_hardware("RTXPRO6000").engine
    assert engine.prefill_step_overhead_us == pytest.approx(shipped.prefill_step_overhead_us, rel=0.05)
    assert engine.decode_step_overhead_us == pytest.approx(shipped.decode_step_overhead_us, abs=100)


def test_shipped_bundles_come_within_five_percent_of_qwen() -> None:
    agreement = run_of(*QWEN).simulate("queued", NO_HOST_TIME)
    assert abs(agreement.error("TPOT")) < 0.05
    assert abs(agreement.error("latency")) < 0.05
