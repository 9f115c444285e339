"""Configurations that Optuna chooses: good ones, the same every time, and only where there are too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim import InputError
from servesim.__main__ import main
from servesim.explore.journal import Journal
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTER, WORKLOAD = "cluster.json", "workload.jsonl"
SPACE: dict[str, Any] = {
    "grid": {
        "max_num_seqs": {"range": {"min": 1, "max": 12}},
        "max_num_batched_tokens": {"range": {"min": 16, "max": 128, "step": 16}},
        "kv_cache_dtype": ["auto", "fp8"],
    }
}


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        lines = [{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": i * 10**5} for i in range(24)]
        Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


def sweep(space: dict[str, Any], **more: Any) -> servesim.Sweep:
    return servesim.sweep(space, cluster=CLUSTER, workload=WORKLOAD, **more)


def test_thirty_trials_come_near_the_best_of_all() -> None:
    pytest.importorskip("optuna")
    everything = sweep(SPACE)
    found = sweep(SPACE, optimizer="optuna:tpe", trials=30)
    assert len(everything.rows) == 12 * 8 * 2
    assert len(found.rows) <= 30
    assert found.best is not None
    assert everything.best is not None
    key = "output_throughput_per_gpu"
    assert found.best[key] >= 0.97 * everything.best[key]
    assert "of 192 configurations in 30 trials; no other was run" in found.text()


def test_rows_that_miss_the_slo_are_not_looked_for() -> None:
    pytest.importorskip("optuna")
    slo = "tpot:1.2"  # kept with up to 6 or so running
    everything = sweep(SPACE, slo=slo).best
    found = sweep(SPACE, optimizer="optuna:tpe", trials=30, slo=slo).best
    assert everything is not None
    assert found is not None
    assert found["slo_met"]
    assert found["output_throughput_per_gpu"] >= 0.9 * everything["output_throughput_per_gpu"]


def test_two_goals_give_rows_that_trade_them() -> None:
    pytest.importorskip("optuna")
    goals = "output_throughput_per_gpu:max p99_tpot_ms:min"
    found = sweep(SPACE, optimizer="optuna:nsga2", trials=24, goals=goals)
    fastest = max(row["output_throughput_per_gpu"] for row in found.rows)
    quickest = min(row["p99_tpot_ms"] for row in found.rows)
    assert not any(
        row["output_throughput_per_gpu"] == fastest and row["p99_tpot_ms"] == quickest for row in found.rows
    )


def test_the_choice_is_the_same_on_one_process_and_two() -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("joblib")
    one = sweep(SPACE, optimizer="optuna:tpe", trials=24, journal="j.jsonl")
    two = sweep(SPACE, optimizer="optuna:tpe", trials=24, jobs=2)
    assert one.csv_text() == two.csv_text()
    lines = len(Path("j.jsonl").read_bytes().splitlines())
    again = sweep(SPACE, optimizer="optuna:tpe", trials=32, journal="j.jsonl")
    assert again.rows[: len(one.rows)] == one.rows  # taken from the journal: the same choices again
    assert len(Journal("j.jsonl").rows()) == len(again.rows) > lines


def test_constraints_hold_for_what_is_chosen() -> None:
    pytest.importorskip("optuna")
    found = sweep(
        {**SPACE, "constraints": ["max_num_seqs * 8 <= max_num_batched_tokens"]},
        optimizer="optuna:tpe",
        trials=24,
    )
    assert all(row["max_num_seqs"] * 8 <= row["max_num_batched_tokens"] for row in found.rows)
    assert found.ruled_out > 0


def test_a_small_space_is_run_whole() -> None:
    pytest.importorskip("optuna")
    found = sweep({"grid": {"max_num_seqs": [2, 4]}}, optimizer="optuna:tpe")
    assert [row["max_num_seqs"] for row in found.rows] == [2, 4]
    assert "all of them were run, and nothing was optimised" in found.text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": "optuna:cma"}, "--optimizer: 'optuna:cma' is not allowed"),
        ({"optimizer": "optuna:tpe", "trials": 0}, "--trials: 0 is not allowed"),
        ({"optimizer": "optuna:tpe", "goals": "mean_ttft_ms"}, "must be a figure with :max or :min"),
        ({"optimizer": "optuna:tpe", "goals": "a:max b:min"}, "optuna:tpe has one goal"),
        ({"optimizer": "optuna:tpe", "trials": 9, "goals": "p99_tftt_ms:min"}, "did you mean 'p99_ttft_ms'"),
    ],
)
def test_what_the_optimizer_cannot_use_is_refused(more: dict[str, Any], message: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(InputError, match=message):
        sweep(SPACE, **more)


def test_its_flags_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "--cluster-config", CLUSTER, "--dataset", WORKLOAD, "--grid", "--max-num-seqs 2,4"]
    assert main([*words, "--trials", "5"]) == 2
    assert "--trials: has no effect without --optimizer" in capsys.readouterr().err
