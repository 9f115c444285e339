"""Sweeps on Ray: the rows of joblib byte for byte, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim import InputError
from servesim.__main__ import main
from servesim.explore.executors import RayPool
from servesim.explore.journal import Journal
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world
from tests.explore.holding import ROWS, holding, let_go, wait_for_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, WORKLOAD = "cluster.json", "workload.jsonl"
GRID = {"grid": {"max_num_seqs": [2, 4, 8], "kv_cache_dtype": ["auto", "fp8", "int8"]}}


@pytest.fixture(scope="module")
def two_raylets() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, both on this machine."""
    ray = pytest.importorskip("ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        write(30, 9)
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


def write(count: int, tokens: int) -> None:
    lines = [
        {"input_toks": 40 + i % 30, "output_toks": tokens, "arrival_time_ns": i * 10**6} for i in range(count)
    ]
    Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def sweep(**more: Any) -> servesim.Sweep:
    return servesim.sweep(GRID, cluster=CLUSTER, workload=WORKLOAD, **more)


def test_rows_on_two_nodes_are_those_of_one_process(two_raylets: str) -> None:
    one, ray = sweep(), sweep(ray=two_raylets, journal="j.jsonl")
    assert ray.csv_text() == one.csv_text()
    assert [row["status"] for row in one.rows].count("failed") == 3  # no int8 tables
    assert len(Journal("j.jsonl").rows()) == 9
    assert "ray: 2 workers on 2 nodes with 2 CPUs" in ray.text()


def test_both_nodes_take_part(two_raylets: str) -> None:
    import ray

    pool = RayPool(two_raylets, 1, lambda _: None)
    try:
        nodes = set(pool.run(_where, {str(i): i for i in range(8)}, _lost))
    finally:
        pool.close()
    assert len(nodes) == 2
    assert not ray.is_initialized()


def _where() -> Callable[[int], str]:
    import ray

    def node(_: int) -> str:
        time.sleep(0.3)
        return str(ray.get_runtime_context().get_node_id())

    return node


def _lost(key: str, _: Any) -> str:
    return f"lost {key}"


def _killing() -> Callable[[str], str]:
    """Kills its process: at the first ``b``, and at every ``c``."""

    def work(part: str) -> str:
        mark = Path("killed")
        if part == "c" or (part == "b" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    return work


def test_lost_workers_are_replaced_and_their_items_tried_again(two_raylets: str) -> None:
    pool = RayPool(two_raylets, 1, lambda _: None)
    try:
        done = list(pool.run(_killing, {name: name for name in "abcde"}, _lost))
    finally:
        pool.close()
    assert sorted(done) == ["a", "b", "d", "e", "lost c"]


def test_a_driver_that_is_killed_goes_on_where_it_was(two_raylets: str) -> None:
    journal = Journal("killed.csv.journal.jsonl")
    Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance(), toy_instance()])), encoding="utf-8")
    words = ["sweep", "--cluster-config", CLUSTER, "--dataset", WORKLOAD, *holding(journal)]
    words += ["--grid", "--max-num-seqs 1,2,3,4,5,6,7,8,9,10,11,12"]
    running = subprocess.Popen(
        [sys.executable, "-m", "servesim", *words, "--ray", two_raylets, "--output", "killed.csv"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for_rows(journal, running)
    finally:
        running.kill()
        running.wait()
    let_go()
    finished = journal.rows()
    assert ROWS <= len(finished) < 12
    assert main([*words, "--ray", two_raylets, "--output", "killed.csv"]) == 0
    assert main([*words, "--output", "whole.csv"]) == 0
    assert Path("killed.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(journal.path.read_bytes().splitlines()) - 12 in (0, 1)  # none was run twice
    assert {key: journal.rows()[key] for key in finished} == finished


def test_an_address_without_a_cluster_is_told() -> None:
    pytest.importorskip("ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(InputError, match=f"--ray {address}: nothing answers there; start a cluster"):
            sweep(ray=address)


def test_without_a_cluster_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("servesim.explore.executors._running_here", lambda: "")
    found = servesim.sweep(
        {"grid": {"max_num_seqs": [2, 4]}}, cluster=CLUSTER, workload=WORKLOAD, ray="auto", jobs=2
    )
    assert [row["status"] for row in found.rows] == ["ok", "ok"]
    assert not ray.is_initialized()


def test_without_ray_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servesim.explore.executors.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"--ray: needs ray; install it with  pip install 'servesim\[ray\]'"):
        sweep(ray="local")
