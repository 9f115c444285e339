"""α from shots of unequal decodes."""

from __future__ import annotations

import csv

import pytest

from servesim.profiler.measure.bundle import SKEW_HEADER, SkewSample, bucket_of, fit_skew, sample_of
from servesim.specs.reading import read_yaml_object
from tests.recorded import recorded_path

BUCKET = bucket_of(0, 8, 0.5, 2048, 0)


def test_a_value_on_a_bound_belongs_to_the_bucket_below_it() -> None:
    assert bucket_of(16, 8, 0.05, 1024, 0) == (16, "n<=8", "sr<=5%", "kvB<=1k", "kp=0")
    assert bucket_of(16, 9, 0.051, 1025, 1) == (16, "n<=16", "sr<=15%", "kvB<=4k", "kp<=512")
    assert bucket_of(0, 300, 0.9, 20000, 9000) == (0, "n>256", "sr>70%", "kvB>16k", "kp>8k")


def test_alpha_is_the_share_of_the_way_from_mean_to_longest() -> None:
    fit = fit_skew([SkewSample(BUCKET, 10.0, 20.0, 13.0)])
    assert fit is not None
    assert fit.rows == [(*BUCKET, 0.3, 1)]
    assert fit.summary["alpha_default"] == 0.3
    assert fit.summary["rel_err_p99"] == 0.0


def test_shots_with_more_room_weigh_more() -> None:
    fit = fit_skew([SkewSample(BUCKET, 1.0, 2.0, 2.0), SkewSample(BUCKET, 1.0, 4.0, 1.0)])
    assert fit is not None
    assert fit.rows[0][5] == 0.1  # (1*1 + 3*0) / (1 + 9)


def test_a_shot_whose_longest_is_no_slower_says_nothing() -> None:
    assert fit_skew([SkewSample(BUCKET, 10.0, 10.0, 12.0)]) is None


def test_recorded_shots_give_the_recorded_fit() -> None:
    shots = recorded_path("perf", "RTXPRO6000", "meta-llama", "Llama-3.1-8B", "bf16", "tp1", "skew.csv")
    folder = shots.parent.parent
    with shots.open() as handle:
        fit = fit_skew(sample_of([row[name] for name in SKEW_HEADER]) for row in csv.DictReader(handle))
    assert fit is not None
    summary = read_yaml_object(folder / "meta.yaml")["skew_fit"]["per_tp"][1]
    assert fit.summary["n_samples"] == summary["n_samples"]
    assert fit.summary["alpha_default"] == pytest.approx(summary["alpha_default"], abs=1e-4)
    with (folder / "tp1" / "skew_fit.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    recorded = {tuple(row.values())[:5]: (float(row["alpha"]), int(row["n_samples"])) for row in rows}
    ours = {tuple(map(str, row[:5])): (row[5], row[6]) for row in fit.rows}
    assert ours.keys() == recorded.keys()
    assert all(ours[bucket][1] == count for bucket, (_, count) in recorded.items())
    # The times were rounded before they were written down, so that a last digit may differ.
    assert max(abs(ours[bucket][0] - alpha) for bucket, (alpha, _) in recorded.items()) < 2.5e-4
