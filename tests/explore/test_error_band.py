"""80 % intervals of figures by the errors of kernel times."""

from __future__ import annotations

import json

import pytest

import servesim
from servesim.__main__ import main
from servesim.engine.noise import StepShift
from servesim.explore.error_band import changes, error_bands, survival
from servesim.results.stated_errors import uncertainty

RUN = {"num_reqs": 20, "hardware": "H100", "model": "meta-llama/Llama-3.1-8B"}


@pytest.fixture(scope="module")
def run() -> servesim.Result:
    return servesim.simulate(**RUN)


def test_a_band_holds_its_figure_and_is_seeded(run: servesim.Result) -> None:
    one, two = error_bands(run), error_bands(run)
    assert one is not None
    assert two is not None
    assert one.to_dict() == two.to_dict()
    for key, value in one.nominal.items():
        low, high = one.of(key)
        assert low <= value <= high, key
    low, high = one.of("mean_tpot_ms")
    assert 0.05 < (high - low) / one.nominal["mean_tpot_ms"] < 0.4


def test_ttft_has_the_front_end_in_its_band(run: servesim.Result) -> None:
    bands = error_bands(run)
    assert bands is not None
    assert bands.front_end_ms == (3.0, 3.0)
    fast = min(bands.fast["mean_ttft_ms"], bands.nominal["mean_ttft_ms"])
    assert bands.of("mean_ttft_ms")[0] == pytest.approx(fast - 3.0)


def test_runs_with_the_same_tables_err_together(run: servesim.Result) -> None:
    small = servesim.simulate(**RUN, max_num_seqs=2)
    one, two = error_bands(run), error_bands(small)
    assert one is not None
    assert two is not None
    assert len(changes(one, two, "mean_tpot_ms")) == 3
    assert "shared by both" in survival(one, two, (1, 1))
    other = error_bands(servesim.simulate(**RUN, kv_cache_dtype="fp8"))
    assert other is not None
    assert len(changes(one, other, "mean_tpot_ms")) == 9


def test_equal_lengths_in_a_closed_loop_widen_ttft() -> None:
    from servesim.workload.generators import SynthSpec, synthesise

    def width(lengths: str) -> float:
        spec = SynthSpec(
            num_reqs=40, rate=float("inf"), input_len=lengths, output_len="uniform:32:32", ids=False, seed=1
        )
        result = servesim.simulate(
            None, synthesise(spec), hardware="H100", model="meta-llama/Llama-3.1-8B", max_concurrency=8
        )
        bands = error_bands(result)
        assert bands is not None
        assert any("lock step" in note for note in result.log.notes) == (lengths == "uniform:512:512")
        return bands.lock_step

    assert width("uniform:512:512") > 0
    assert width("uniform:128:512") == 0


def test_kinds_of_tables_have_their_own_uncertainty() -> None:
    silicon = {"source": "silicon", "vllm_version": "0.24.0"}
    served = uncertainty(silicon, "H100", calibrated=True)
    unknown = uncertainty(silicon, "L40S", calibrated=False)
    assert served.decode < unknown.decode
    assert unknown.front_end_ms == (0.0, 12.0)
    far = uncertainty(silicon, "H100", calibrated=True, version="0.33")
    assert served.decode < far.decode < served.decode + 0.03
    assert "9 minor versions" in far.reason
    assert served.beyond_range().decode == pytest.approx((served.decode**2 + 0.05**2) ** 0.5)
    assert served.beyond_range().prefill > 0.12
    assert uncertainty({"source": "vllm"}, "RTXPRO6000", calibrated=True).beyond_range().decode > 0.09
    assert "contexts beyond the measured ones" in served.beyond_range().reason
    assert uncertainty({"source": "vllm"}, "RTXPRO6000", calibrated=True).decode == 0.01


def test_a_shift_moves_steps_by_their_kind() -> None:
    import numpy as np

    shift = StepShift(1.1, 0.9)
    assert shift.step_ns(0, 1000, True) == 1100
    assert shift.step_ns(0, 1000) == 900
    assert shift.run_ns(0, np.array([1000, 2000])).tolist() == [900, 1800]


def test_compare_prints_bands_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["compare", "--num-reqs", "10", "--hardware", "H100", "--model", "meta-llama/Llama-3.1-8B"]
    assert main(flags) == 0
    told = capsys.readouterr().out
    assert "80 % bands of the figures" in told
    assert "Inside the" in told
    assert main([*flags, "--no-error-band", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error_bands"] == {}
