"""Pipelines worked out by hand: every stage takes 1000 ns."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings

from servesim.workload.request import Workload
from tests.engine.small_engine import ConstantStages, requests, run_small
from tests.engine.test_properties import check_run, engines, workloads


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


def test_a_request_is_in_one_batch_at_a_time_and_the_pipeline_drains() -> None:
    # Two prompts fill two batches; then each request decodes every second step until it has three tokens.
    log = run_small(requests((64, 3, 0), (64, 3, 0)), stages=ConstantStages(2))
    assert ends(log) == [2000, 3000, 4000, 5000, 6000, 7000]
    times = log.tracks()
    tokens = [
        [int(t) for track, a, b in r.token_steps for t in times[track][a : b + 1]] for r in log.requests
    ]
    assert tokens == [[2000, 4000, 6000], [3000, 5000, 7000]]


def test_chunks_of_one_prompt_follow_each_other_through_the_pipeline() -> None:
    log = run_small(requests((150, 1, 0)), stages=ConstantStages(2))
    assert list(log.instances[0].steps.prefill_tokens) == [64, 64, 22]
    assert ends(log) == [2000, 3000, 4000]


def test_requests_that_come_back_together_go_on_together() -> None:
    # The second request arrives while the first is in flight alone, and is admitted with it once it is back.
    log = run_small(requests((8, 4, 0), (8, 4, 3500)), stages=ConstantStages(2))
    assert list(log.instances[0].steps.decode_tokens)[:3] == [0, 1, 1]
    assert sum(log.instances[0].steps.decode_tokens) == 6


@settings(max_examples=150, deadline=None)
@given(workloads(), engines)
def test_nothing_is_lost_in_a_pipeline(workload: Workload, engine: dict[str, Any]) -> None:
    engine = {**engine, "stages": ConstantStages(3, hand_over=7)}
    del engine["depth"]
    check_run(run_small(workload, **engine), workload, engine)
