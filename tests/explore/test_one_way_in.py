"""The Python API loads as the command line does, and refuses what it could only pass over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.explore.show import comparison_text
from servesim.specs.options import RuntimeOptions
from servesim.workload.formats import load_workload
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKLOAD, CLUSTER = "requests.jsonl", "cluster.json"


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        lines = [{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": i * 10**6} for i in range(8)]
        Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


def options(**values: Any) -> RuntimeOptions:
    return RuntimeOptions(**values)


@pytest.mark.parametrize("values", [{"num_reqs": 3}, {"request_rate": 100.0}, {"lenient": True}])
def test_loading_options_are_refused_beside_a_loaded_workload(values: dict[str, Any]) -> None:
    workload = load_workload(WORKLOAD)
    (name,) = values
    with pytest.raises(InputError, match=f"{name}: has no effect on a workload that is loaded"):
        servesim.simulate(CLUSTER, workload, options(**values))
    with pytest.raises(InputError, match=f"{name}: has no effect on a workload that is loaded"):
        servesim.simulate(CLUSTER, workload, **values)
    with pytest.raises(InputError, match=f"option set 'b': {name}: has no effect on a workload"):
        servesim.compare(CLUSTER, workload, {"a": {}, "b": values})
    with pytest.raises(InputError, match=f"{name}: has no effect on a workload that is loaded"):
        servesim.ensemble(CLUSTER, workload, options(ensemble=2, **values))


def test_loading_options_act_on_a_path() -> None:
    assert len(servesim.simulate(CLUSTER, WORKLOAD, options(num_reqs=3)).requests) == 3
    comparison = servesim.compare(CLUSTER, WORKLOAD, {"a": {}, "b": {"num_reqs": 3}})
    assert [len(result.requests) for result in comparison.results] == [8, 3]
    spread = servesim.ensemble(CLUSTER, WORKLOAD, options(ensemble=2, num_reqs=3))
    assert len(spread.nominal.requests) == 3


def test_the_command_line_and_python_agree() -> None:
    assert (
        main(["--cluster-config", CLUSTER, "--dataset", WORKLOAD, "--num-reqs", "5", "--output", "a.csv"])
        == 0
    )
    servesim.simulate(CLUSTER, WORKLOAD, num_reqs=5).save("b.csv")
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        {"output": "x.csv"},
        {"summary": "x.json"},
        {"steps": "x.csv"},
        {"timeline": "x.json"},
        {"log_interval": 2.0},
        {"log_level": "INFO"},
        {"itl": False},
    ],
)
def test_options_of_files_and_screen_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InputError, match=f"{name}: simulate prints nothing and writes no file"):
        servesim.simulate(CLUSTER, WORKLOAD, options(**values))
    with pytest.raises(InputError, match=f"{name}: compare prints nothing"):
        servesim.compare(CLUSTER, WORKLOAD, {"a": {}, "b": {}}, options(**values))


@pytest.mark.parametrize("name", ["step_noise", "run_noise", "arrival_jitter"])
def test_noise_without_an_ensemble_is_refused_in_python(name: str) -> None:
    with pytest.raises(InputError, match="has no effect without --ensemble"):
        servesim.simulate(CLUSTER, WORKLOAD, **{name: 0.1})
    with pytest.raises(InputError, match="has no effect without --ensemble"):
        servesim.compare(CLUSTER, WORKLOAD, {"a": {}, "b": {}}, **{name: 0.1})


def test_two_clusters_or_two_workloads_are_refused() -> None:
    with pytest.raises(InputError, match="cluster_config: simulate was given a cluster beside it"):
        servesim.simulate(CLUSTER, WORKLOAD, options(cluster_config="other.json"))
    with pytest.raises(InputError, match="dataset: simulate was given a workload beside it"):
        servesim.simulate(CLUSTER, WORKLOAD, options(dataset="other.jsonl"))


def test_what_cannot_act_names_its_option_set() -> None:
    with pytest.raises(InputError, match=r"option set 'b': --router-refresh 1.0: has no effect here"):
        servesim.compare(CLUSTER, WORKLOAD, {"a": {}, "b": {"router_refresh": 1.0}})


def test_notes_are_in_the_summary_and_the_banner(capsys: pytest.CaptureFixture[str]) -> None:
    result = servesim.simulate(CLUSTER, WORKLOAD, seed=7)
    assert result.summary["notes"] == ["--seed 7 has no effect here: nothing in this run is random"]
    assert main(["--cluster-config", CLUSTER, "--dataset", WORKLOAD, "--enforce-eager"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "note --no-cudagraph: a step waits for the launch of every layer" in printed


def test_a_key_of_an_instance_that_cannot_act_is_noted_once() -> None:
    cluster = toy_cluster([toy_instance(enable_block_copy=False), toy_instance(enable_block_copy=False)])
    notes = servesim.simulate(cluster, WORKLOAD).summary["notes"]
    assert notes == ["enable_block_copy of instance 0, 1 has no effect here: no model has experts"]


def test_a_flag_is_noted_where_all_instances_say_the_same() -> None:
    cluster = toy_cluster([toy_instance(block_size=32), toy_instance(block_size=32)])
    (note,) = servesim.simulate(cluster, WORKLOAD, block_size=32).summary["notes"]
    assert note.startswith("--block-size 32 has no effect here: every instance of ")
    with pytest.raises(
        InputError, match=r"--block-size 8: has no effect here: every instance of .* sets block_size"
    ):
        servesim.simulate(cluster, WORKLOAD, block_size=8)


def test_a_comparison_prints_every_note_once() -> None:
    sets = {"a": {}, "b": {"enforce_eager": True}}
    text = comparison_text(servesim.compare(CLUSTER, WORKLOAD, sets, seed=7))
    flat = " ".join(text.split())
    assert flat.count("note: --seed 7 has no effect here: nothing in this run is random") == 1
    assert flat.count("note: b: --no-cudagraph: a step waits for the launch of every layer") == 1
