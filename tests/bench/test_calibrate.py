from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.__main__ import main
from servesim.bench.agreement import METRICS
from servesim.bench.calibrate import _least_squares
from servesim.cli.bench_validate import read_calibration
from tests.bench import recordings

HOST = {
    "prefill_step_overhead_us": 4000.0,
    "decode_step_overhead_us": 300.0,
    "skew_in_mixed_steps": False,
    "tail_in_mixed_steps": True,
}


@pytest.fixture(scope="module")
def slow_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of our own simulator on a host that takes 4 ms and 0.3 ms a step."""
    folder = tmp_path_factory.mktemp("slow") / "run"
    result = recordings.simulated(HOST, recordings.workload(60, gap_ms=60))
    return recordings.write(folder, recordings.rows(result))


def test_the_constants_of_a_host_are_found_again(
    slow_host: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "host.yaml"
    command = ["bench", "calibrate", str(slow_host), "-o", str(out), "--machine", "a slow host"]
    assert main(command) == 0
    assert "simulations" in capsys.readouterr().out
    hardware = read_calibration(str(out))
    assert hardware.name == "RTXPRO6000"
    assert hardware.engine.prefill_step_overhead_us == pytest.approx(4000, rel=0.1)
    assert hardware.engine.decode_step_overhead_us == pytest.approx(300, rel=0.1)
    assert not hardware.engine.skew_in_mixed_steps
    assert hardware.engine.tail_in_mixed_steps
    told = hardware.calibration
    assert told is not None
    assert told.machine == "a slow host"
    assert told.requests == 60
    for metric in METRICS:
        assert abs(told.error_percent[metric]) < 0.5
        assert told.uncalibrated_error_percent[metric] < -2
    first = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == first
    assert main(["bench", "validate", str(slow_host), "--calibration", str(out)]) == 0
    assert "TTFT mean" in capsys.readouterr().out


def test_a_host_that_takes_no_time_is_told_so(tmp_path: Path) -> None:
    run = recordings.write(
        tmp_path / "run",
        recordings.rows(
            recordings.simulated({**HOST, "prefill_step_overhead_us": 0, "decode_step_overhead_us": 0})
        ),
    )
    out = tmp_path / "host.yaml"
    assert main(["bench", "calibrate", str(run), "-o", str(out)]) == 0
    engine = read_calibration(str(out)).engine
    assert engine.prefill_step_overhead_us < 200
    assert engine.decode_step_overhead_us < 20


@given(
    st.tuples(st.floats(10, 9000), st.floats(1, 900)),
    st.lists(st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)), min_size=2, max_size=4),
)
def test_planes_through_one_zero_lead_to_it(
    zero: tuple[float, float], slopes: list[tuple[float, float]]
) -> None:
    points = np.array([(x, y) for x in (0.0, 4000.0, 8000.0) for y in (0.0, 400.0, 800.0)])
    errors = np.stack([(points - zero) @ np.array(slope) for slope in slopes], axis=1)
    found = _least_squares(points, errors)
    assert (found >= 0).all()
    reached = np.array([(found - zero) @ np.array(slope) for slope in slopes])
    assert np.abs(reached).max() < 1e-6 * np.abs(errors).max()


def test_a_constant_below_zero_is_set_to_zero() -> None:
    points = np.array([(x, y) for x in (0.0, 1.0, 2.0) for y in (0.0, 1.0, 2.0)])
    errors = np.stack([points[:, 0] - 1, points[:, 1] + 1], axis=1)  # zero at (1, -1)
    assert _least_squares(points, errors) == pytest.approx([1, 0])
    errors = np.stack([points[:, 0] + 1, points[:, 1] + 1], axis=1)
    assert _least_squares(points, errors) == pytest.approx([0, 0])
