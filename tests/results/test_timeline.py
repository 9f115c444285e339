"""The Chrome trace: every step once, every request a closed span, and the rules that viewers go by."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim.results.timeline import TIER, save_timeline
from tests.engine.small_engine import requests, run_small

if TYPE_CHECKING:
    from pathlib import Path

CONFIGS = "configs/cluster"
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"num_reqs": 40},
    "tight": {"num_reqs": 120, "num_gpu_blocks": 2000, "request_rate": 40.0},
    "tier": {
        "dataset": "workloads/agentic_sessions.jsonl.gz",
        "num_reqs": 20,
        "prefix_storage": "CPU",
        "num_gpu_blocks": 3000,
    },
    "sides": {"cluster_config": f"{CONFIGS}/prefill_decode.json", "num_reqs": 40},
    "stages": {"cluster_config": f"{CONFIGS}/pipeline.json", "num_reqs": 40},
    "power": {"cluster_config": f"{CONFIGS}/single_node_power.json", "num_reqs": 40},
}


def events_of(folder: Path, name: str) -> tuple[servesim.Result, list[dict[str, Any]]]:
    result = servesim.simulate(**RUNS[name])
    result.save_timeline(folder / "t.json")
    return result, json.loads((folder / "t.json").read_text(encoding="utf-8"))["traceEvents"]


def test_every_step_and_every_request_is_in_the_trace(tmp_path: Path) -> None:
    log = run_small(requests((8, 3, 500), (8, 2, 600)))
    save_timeline(log, tmp_path / "t.json", None, {})
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert [event["ts"] * 1000 for event in steps] == list(log.instances[0].steps.start_ns)
    assert steps[0]["name"] == "prefill"
    assert steps[0]["dur"] == 1.08
    ends = {e["id"]: e["ts"] * 1000 for e in events if e["ph"] == "e" and e["name"].startswith("request")}
    assert ends == {record.request: record.end_ns for record in log.requests}


@pytest.mark.parametrize("name", RUNS)
def test_the_trace_keeps_the_rules_of_its_format(tmp_path: Path, name: str) -> None:
    """What Perfetto and Chromium ask of a file: integers that name lanes, closed spans that lie in each
    other, stretches of a lane that do not overlap, counters of numbers."""
    _, events = events_of(tmp_path, name)
    lanes: dict[tuple[int, int], float] = defaultdict(lambda: -1.0)
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = Counter(e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name")
    assert set(processes.values()) == {1}
    spans: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["pid"] in processes
        assert event["ph"] in "MXCbe"
        if event["ph"] == "X":
            lane = event["pid"], event["tid"]
            assert lane in named
            assert event["dur"] >= 0
            assert round(event["ts"] * 1000) >= round(lanes[lane] * 1000)
            lanes[lane] = event["ts"] + event["dur"]
        elif event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        elif event["ph"] in "be":
            spans[event["cat"], event["id"], event["pid"]].append(event)
    for group in spans.values():
        open_spans: list[dict[str, Any]] = []
        for event in group:
            if event["ph"] == "b":
                open_spans.append(event)
            else:
                begun = open_spans.pop()
                assert begun["name"] == event["name"]
                assert begun["ts"] <= event["ts"]
        assert open_spans == []


@pytest.mark.parametrize("name", ["tight", "sides", "stages"])
def test_the_parts_of_a_request_follow_each_other(tmp_path: Path, name: str) -> None:
    result, events = events_of(tmp_path, name)
    parts: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    begun: dict[tuple[int, str], float] = {}
    for event in events:
        if event.get("cat") == "request" and not event["name"].startswith("request "):
            if event["ph"] == "b":
                begun[event["id"], event["name"]] = event["ts"]
            else:
                start = begun[event["id"], event["name"]]
                parts[event["id"]].append((event["name"], start, event["ts"]))
    for record in result.records:
        stretches = parts[record.request]
        assert round(stretches[0][1] * 1000) == record.arrival_ns
        assert round(stretches[-1][2] * 1000) == record.end_ns
        assert all(one[2] == other[1] for one, other in itertools.pairwise(stretches))
    names = Counter(part for each in parts.values() for part, _, _ in each)
    assert bool(names["preempted"]) == (name == "tight")
    assert bool(names["KV transfer"]) == (name == "sides")


def test_stages_of_a_pipeline_have_lanes(tmp_path: Path) -> None:
    result, events = events_of(tmp_path, "stages")
    steps = len(result.instances[0].steps)
    stages = Counter(event["tid"] for event in events if event["ph"] == "X")
    assert stages == dict.fromkeys(range(result.instances[0].spec.pp_size), steps)
    last = [e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["tid"] == max(stages)]
    ends = result.instances[0].steps.end_ns
    assert [round(end * 1000) for end in last] <= list(ends)


def test_recalls_and_transfers_have_lanes(tmp_path: Path) -> None:
    result, events = events_of(tmp_path, "tier")
    recalls = [event for event in events if event["ph"] == "X" and event["tid"] == TIER]
    assert sum(event["args"]["bytes"] for event in recalls) == result.steps["recalled_bytes"].sum()
    assert sum(event["dur"] for event in recalls) > 0
    moved = [event for event in events if event["ph"] == "b" and event["cat"] != "request"]
    assert sum(event["args"]["bytes"] for event in moved) == result.steps["recalled_bytes"].sum()
    sides, events = events_of(tmp_path, "sides")
    links = {event["cat"] for event in events if event["ph"] == "b" and event["cat"] != "request"}
    assert {"out of instance 0", "into instance 1"} <= links
    under_way = [event["args"]["bytes"] for event in events if event["name"].endswith("under way")]
    assert min(under_way) == 0 < max(under_way)
    assert sides.log.moved
