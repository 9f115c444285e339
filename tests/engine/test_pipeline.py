"""Pipelines worked out by hand: every stage takes 1000 ns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings

from servesim.api import simulate
from servesim.workload.request import Request, Workload
from tests.engine.small_engine import ConstantStages, requests, run_small
from tests.engine.test_properties import check_run, engines, workloads
from tests.engine.toy_world import DENSE, MOE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.results.result import Result


def ends(log: Any) -> list[int]:
    return list(log.instances[0].steps.end_ns)


def test_a_lone_request_passes_all_stages_for_every_token() -> None:
    log = run_small(requests((8, 3, 0)), stages=ConstantStages(4))
    assert ends(log) == [4000, 8000, 12000]
    assert log.requests[0].first_token_ns == 4000
    assert log.requests[0].end_ns == 12000


def test_handing_over_takes_its_time_between_stages_only() -> None:
    log = run_small(requests((8, 2, 0)), stages=ConstantStages(3, hand_over=50))
    assert ends(log) == [3100, 6200]


def test_batches_fill_the_pipeline_one_stage_behind_each_other() -> None:
    # Three prompts of the whole budget go into three batches; the fourth waits for the first to come out.
    log = run_small(requests(*[(64, 1, 0)] * 4), stages=ConstantStages(3))
    assert ends(log) == [3000, 4000, 5000, 6000]
    assert [r.end_ns for r in log.requests] == [3000, 4000, 5000, 6000]


def test_a_request_is_in_one_batch_and_the_pipeline_drains() -> None:
    # Two prompts fill two batches; then each request decodes every second step until it has three tokens.
    log = run_small(requests((64, 3, 0), (64, 3, 0)), stages=ConstantStages(2))
    assert ends(log) == [2000, 3000, 4000, 5000, 6000, 7000]
    times = log.tracks()
    tokens = [
        [int(t) for track, a, b in r.token_steps for t in times[track][a : b + 1]] for r in log.requests
    ]
    assert tokens == [[2000, 4000, 6000], [3000, 5000, 7000]]


def test_chunks_of_a_prompt_follow_through_the_stages() -> None:
    log = run_small(requests((150, 1, 0)), stages=ConstantStages(2))
    assert list(log.instances[0].steps.prefill_tokens) == [64, 64, 22]
    assert ends(log) == [2000, 3000, 4000]


def test_requests_that_come_back_together_go_on_together() -> None:
    # The second request arrives while the first is in flight alone, and is admitted with it once it is back.
    log = run_small(requests((8, 4, 0), (8, 4, 3500)), stages=ConstantStages(2))
    assert list(log.instances[0].steps.decode_tokens)[:3] == [0, 1, 1]
    assert sum(log.instances[0].steps.decode_tokens) == 6


def test_empty_schedules_take_a_place_in_flight() -> None:
    # When the first prompt is done, the second is in flight, and two schedules that came out empty. So only
    # one chunk of the third prompt is scheduled then; the next goes with the second request.
    log = run_small(requests((61, 9, 0), (61, 9, 0), (180, 1, 500)), stages=ConstantStages(4), budget=61)
    steps = log.instances[0].steps
    assert [steps.prefill_tokens[step] for step in range(5)] == [61, 61, 60, 60, 60]
    assert [steps.decode_tokens[step] for step in range(5)] == [0, 0, 1, 1, 0]
    assert list(steps.start_ns)[:5] == [0, 1000, 4000, 5000, 6000]


def test_a_ring_lets_a_request_wait_for_its_turn() -> None:
    # Scheduled ahead, the second token starts when the first one is known: the first stage waits for it.
    log = run_small(requests((8, 3, 0)), stages=ConstantStages(4), depth=2)
    assert list(log.instances[0].steps.start_ns) == [0, 4000, 8000]
    assert ends(log) == [4000, 8000, 12000]


def test_a_ring_keeps_requests_of_different_turns_apart() -> None:
    # Two prompts of the whole budget are in two batches of two stages, and so are their tokens for ever.
    log = run_small(requests((64, 3, 0), (64, 3, 0)), stages=ConstantStages(2), depth=2)
    assert ends(log) == [2000, 3000, 4000, 5000, 6000, 7000]
    assert list(log.instances[0].steps.decode_tokens) == [0, 0, 1, 1, 1, 1]


def test_a_ring_admits_a_step_ahead() -> None:
    # What arrives while a token is computed joins the batch after the one that is scheduled already.
    shapes = (8, 4, 0), (8, 4, 500)
    ahead = run_small(requests(*shapes), stages=ConstantStages(2), depth=2)
    behind = run_small(requests(*shapes), stages=ConstantStages(2))
    assert behind.requests[1].queued_ns == ahead.requests[1].queued_ns == 2000
    assert list(behind.instances[0].steps.decode_tokens)[:2] == [0, 1]
    assert list(ahead.instances[0].steps.decode_tokens)[:3] == [0, 1, 0]
    assert ahead.requests[1].first_token_ns == 5000, "its own turn, behind the first stage of the other's"


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=100, deadline=None)
@given(workload=workloads(), engine=engines)
def test_nothing_is_lost_in_a_pipeline(workload: Workload, engine: dict[str, Any], depth: int) -> None:
    engine = {**engine, "stages": ConstantStages(3, hand_over=7), "depth": depth}
    check_run(run_small(workload, **engine), workload, engine)


def run_version(model: str, version: str, **flags: Any) -> Result:
    work = Workload([Request(i, 300, 20, i * 1_000_000) for i in range(12)], "hand-made")
    return simulate(toy_cluster([toy_instance(model, pp_size=2)]), work, vllm_version=version, **flags)


def test_the_runner_of_a_version_schedules_a_pipeline(tmp_path: Path) -> None:
    with toy_world(tmp_path):
        newest, slow = run_version(MOE, "0.33"), run_version(MOE, "0.33", async_scheduling=False)
        first = run_version(MOE, "0.30")  # its first runner takes a model with experts
        old = run_version(DENSE, "0.24", async_scheduling=False)
    assert newest.steps.tobytes() != slow.steps.tobytes()
    assert first.steps["end_ns"].tolist() == slow.steps["end_ns"].tolist()
    assert [log.options.async_scheduling for run in (newest, first) for log in run.instances] == [True, False]
    off = [note for note in first.summary["notes"] if "async_scheduling of instance 0 is off" in note]
    assert len(off) == 1
    assert "first model runner" in off[0]
    assert not any("async_scheduling" in note for note in newest.summary.get("notes", []))
    assert any("may admit a preempted request again" in note for note in old.summary["notes"])
