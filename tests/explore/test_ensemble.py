"""How far the figures of a run spread under noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import servesim
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.explore.ensemble import Ensemble, Spread, ensemble_text, figures_of, jittered
from servesim.workload.request import Request, Workload

CLUSTER = "configs/cluster/single_node_single_instance.json"


def steady(count: int = 12) -> Workload:
    """A request of 500 prompt and 40 output tokens every 50 ms."""
    return Workload([Request(i, 500, 40, i * 50_000_000) for i in range(count)], "steady")


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**40), st.integers(2, 4))
def test_noise_of_size_0_reproduces_the_plain_run(seed: int, runs: int) -> None:
    plain = figures_of(servesim.simulate(CLUSTER, steady(), seed=seed))
    spread = servesim.ensemble(CLUSTER, steady(), ensemble=runs, step_noise=0, run_noise=0, seed=seed)
    for key, figure in plain.items():
        assert spread.spreads[key] == Spread(figure, pytest.approx(figure), 0.0, *[figure] * 4)
    assert spread.fragile == []


def test_the_same_seed_gives_the_same_bytes_stepped_or_jumped() -> None:
    def text(seed: int, stepped: bool = False) -> str:
        found = servesim.ensemble(
            CLUSTER, steady(), ensemble=4, arrival_jitter=0.01, seed=seed, stepped=stepped
        )
        return json.dumps(found.to_dict()) + ensemble_text(found)

    assert text(1) == text(1) == text(1, stepped=True)
    assert text(1) != text(2)


def test_the_first_runs_do_not_depend_on_how_many_follow() -> None:
    few = servesim.ensemble(CLUSTER, steady(), ensemble=2, step_noise=0.2)
    many = servesim.ensemble(CLUSTER, steady(), ensemble=6, step_noise=0.2)
    for key, spread in few.spreads.items():
        assert many.spreads[key].min <= spread.min <= spread.max <= many.spreads[key].max


def test_more_noise_spreads_more() -> None:
    def width(**noise: float) -> float:
        found = servesim.ensemble(CLUSTER, steady(), ensemble=8, **noise)
        return found.spreads["mean_e2el_ms"].relative

    assert 0 < width(step_noise=0.01, run_noise=0) < width(step_noise=0.2, run_noise=0)
    assert 0 < width(step_noise=0, run_noise=0.01) < width(step_noise=0, run_noise=0.1)
    assert width(step_noise=0, run_noise=0, arrival_jitter=0.05) > 0


def test_what_all_steps_have_in_common_does_not_average_out() -> None:
    own = servesim.ensemble(CLUSTER, steady(), ensemble=8, step_noise=0.02, run_noise=0)
    common = servesim.ensemble(CLUSTER, steady(), ensemble=8, step_noise=0, run_noise=0.02)
    assert common.spreads["mean_e2el_ms"].relative > 3 * own.spreads["mean_e2el_ms"].relative


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_jitter_moves_arrivals_no_further_than_it_may(arrivals: list[int], seed: int) -> None:
    workload = Workload([Request(i, 1, 1, time) for i, time in enumerate(arrivals)])
    moved = jittered(workload, 0.25, (seed, 0, 1))
    for before, after in zip(workload, moved, strict=True):
        assert after.arrival_ns >= 0
        assert abs(after.arrival_ns - before.arrival_ns) <= 250_000_000
    assert [request.arrival_ns for request in workload] == arrivals, "the workload itself is not touched"
    assert jittered(workload, 0.0, (seed,)) is workload


def test_a_figure_is_fragile_from_5_percent_on() -> None:
    assert Spread(100, 100, 2, 90, 97, 102, 110).relative == 0.05
    assert not Spread(100, 100, 2, 90, 97, 102, 110).fragile
    assert Spread(100, 100, 2, 90, 96.9, 102, 110).fragile
    assert not Spread(0, 0, 0, 0, 0, 0, 0).fragile


def overloaded() -> Ensemble:
    """Three slots, and requests that come faster than they go: waiting times hang on every step."""
    workload = Workload([Request(i, 200, 60, i * 30_000_000) for i in range(60)], "too much")
    return servesim.ensemble(CLUSTER, workload, ensemble=6, step_noise=0.3, max_num_seqs=3)


def test_a_saturated_run_names_its_fragile_figures() -> None:
    found = overloaded()
    entry = found.to_dict()
    assert entry["near_saturation"] is True
    assert entry["fragile"] == found.fragile != []
    worst = found.fragile[0]
    assert found.spreads[worst].relative == max(spread.relative for spread in found.spreads.values())
    shown = ensemble_text(found)
    assert f"fragile        {worst}" in shown
    assert "(the run is near saturation)" in shown
    for spread in found.spreads.values():
        assert spread.min <= spread.p5 <= spread.p95 <= spread.max
        assert np.isfinite([spread.mean, spread.std]).all()


def test_the_command_prints_and_saves_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--num-reqs", "20", "--ensemble", "3", "--output", "noisy.csv", "--summary"]
    assert main([*words, "a.json"]) == 0
    shown = capsys.readouterr().out
    assert "spread (P5–P95) over 3 runs, each step ±1 %, all steps of a run ±1 %; !" in shown
    assert main([*words, "b.json"]) == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert main(["--num-reqs", "20", "--output", "plain.csv", "--summary", "plain.json"]) == 0
    assert Path("noisy.csv").read_bytes() == Path("plain.csv").read_bytes(), "the run itself has no noise"
    saved, plain = (json.loads(Path(name).read_text()) for name in ("a.json", "plain.json"))
    spread = saved.pop("ensemble")
    assert saved == plain
    assert (spread["runs"], spread["step_noise"], spread["arrival_jitter_s"]) == (3, 0.01, 0.0)
    assert spread["figures"]["mean_ttft_ms"]["nominal"] == plain["mean_ttft_ms"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ensemble", "1"], "--ensemble: 1 is not allowed; must be 0 (off) or at least 2 runs"),
        (["--step-noise", "0.02"], "--step-noise: has no effect without --ensemble"),
        (["--run-noise", "0.02"], "--run-noise: has no effect without --ensemble"),
        (["--arrival-jitter", "1"], "--arrival-jitter: has no effect without --ensemble"),
        (["--ensemble", "4", "--step-noise", "0.9"], "--step-noise: 0.9 is not allowed"),
    ],
)
def test_noise_without_an_ensemble_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_simulate_is_a_single_run() -> None:
    with pytest.raises(InputError, match=r"servesim\.ensemble"):
        servesim.simulate(CLUSTER, steady(), ensemble=3)
    with pytest.raises(InputError, match="0 is no ensemble"):
        servesim.ensemble(CLUSTER, steady())
