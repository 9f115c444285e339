"""Two or three requests on one instance, with times worked out by hand (base 1000 ns, 10 ns a token)."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.errors import RunError
from tests.engine.small_engine import requests, run_small, small_loop


def test_a_lone_request_prefills_once_and_decodes_one_token_a_step() -> None:
    log = run_small(requests((8, 3, 500)))
    record = log.requests[0]
    assert (record.queued_ns, record.scheduled_ns) == (500, 500)
    assert record.first_token_ns == 500 + 1080
    assert record.end_ns == 500 + 1080 + 1010 + 1010
    assert record.token_steps == [(0, 0, 2)]


def test_a_request_that_arrives_during_a_step_is_seen_at_its_end() -> None:
    log = run_small(requests((8, 2, 0), (8, 1, 100)))
    second = log.requests[1]
    assert (second.arrival_ns, second.queued_ns, second.scheduled_ns) == (100, 1080, 1080)
    assert second.first_token_ns == second.end_ns == 1080 + 1000 + 10 * 9


def test_asynchronous_scheduling_decides_a_step_ahead() -> None:
    # Steps: prefill of 0 ends at 1080, its one decode at 2090. The arrival at 100 is seen at 1080, when the
    # step up to 2090 is already on its way, so its prefill runs from 2090.
    log = run_small(requests((8, 2, 0), (8, 1, 100)), depth=2)
    first, second = log.requests
    assert first.end_ns == 2090
    assert (second.queued_ns, second.first_token_ns) == (1080, 2090 + 1080)


def test_a_prompt_over_the_budget_is_computed_in_chunks() -> None:
    log = run_small(requests((150, 1, 0)), budget=64)
    assert list(log.instances[0].steps.prefill_tokens) == [64, 64, 22]


def test_the_queuing_delay_ends_with_the_first_chunk_and_stays() -> None:
    log = run_small(requests((150, 4, 0)), budget=64)
    assert log.requests[0].scheduled_ns == 0


def test_the_threshold_caps_a_chunk_and_leaves_budget_to_others() -> None:
    log = run_small(requests((100, 1, 0), (20, 1, 0)), budget=64, long_prefill_token_threshold=40)
    # 40 + 20, then 40, then 20
    assert list(log.instances[0].steps.prefill_tokens) == [60, 40, 20]
    assert log.requests[1].end_ns == 1600


def test_without_chunking_a_prompt_waits_for_a_step_with_room() -> None:
    log = run_small(requests((40, 1, 0), (40, 1, 0)), budget=64, chunked_prefill=False)
    assert list(log.instances[0].steps.prefill_tokens) == [40, 40]


def test_without_chunks_a_prompt_over_the_budget_is_rejected() -> None:
    log = run_small(requests((65, 1, 0), (64, 1, 0)), budget=64, chunked_prefill=False)
    assert [r.request for r in log.rejected] == [0]
    assert "max_num_batched_tokens 64" in log.rejected[0].reason
    assert [r.request for r in log.requests] == [1]


def test_a_request_that_can_never_fit_is_rejected_with_its_reason() -> None:
    log = run_small(requests((30, 11, 0), (30, 12, 0)), blocks=11)
    assert [r.request for r in log.rejected] == [1]  # 41 tokens need 11 blocks of 4, 10 are usable
    assert "11 blocks" in log.rejected[0].reason


def test_the_last_running_request_is_preempted_and_resumes() -> None:
    # 6 usable blocks of 4; both prompts of 8 take 2 each. Each needs a third block at its first decode, which
    # leaves none free; at length 12 request 0 needs a fourth, and request 1 has to go.
    log = run_small(requests((8, 8, 0), (8, 8, 0)), blocks=7)
    first, second = log.requests
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert first.end_ns < second.end_ns
    steps = log.instances[0].steps
    assert sum(steps.preempted) == 1
    computed = sum(steps.prefill_tokens) + sum(steps.decode_tokens)
    assert computed == 2 * (8 + 8 - 1) + second.recomputed_tokens
    assert second.recomputed_tokens >= 0


def test_a_full_prompt_gate_waits_until_the_prompt_fits() -> None:
    long_and_short = requests((16, 4, 0), (12, 1, 0))
    waited = run_small(long_and_short, blocks=7, budget=16)
    admitted = run_small(long_and_short, blocks=7, budget=24, reserve_full_isl=False)
    assert waited.requests[1].scheduled_ns > waited.requests[0].first_token_ns
    assert admitted.requests[1].scheduled_ns == 0


def test_skip_prefill_computes_no_prompt() -> None:
    log = run_small(requests((40, 3, 0)), skip_prefill=True)
    steps = log.instances[0].steps
    assert sum(steps.prefill_tokens) == 0
    assert list(steps.decode_tokens) == [1, 1, 1]
    assert log.requests[0].first_token_ns == 1010


def test_a_shared_prefix_is_computed_once() -> None:
    prompt = list(range(16))
    log = run_small(requests((16, 1, 0), (16, 1, 5000), ids=[prompt, prompt]), block_size=4)
    # the last token is always computed, so three of the four blocks are hits
    assert [r.npu_hit for r in log.requests] == [0, 12]
    assert sum(log.instances[0].steps.prefill_tokens) == 16 + 4


def test_without_prefix_caching_nothing_is_found() -> None:
    prompt = list(range(16))
    log = run_small(requests((16, 1, 0), (16, 1, 5000), ids=[prompt, prompt]), caching=False)
    assert [r.npu_hit for r in log.requests] == [0, 0]


def test_a_session_goes_on_after_its_tool_time() -> None:
    workload = requests((8, 1, 0), (8, 1, -1))
    workload.requests[1].predecessor = 0
    workload.requests[1].tool_ns = 7000
    log = run_small(workload)
    assert log.requests[1].arrival_ns == log.requests[0].end_ns + 7000


def test_the_rest_of_a_session_is_rejected_with_its_first_request() -> None:
    workload = requests((65, 1, 0), (8, 1, -1), (8, 1, 0))
    workload.requests[1].predecessor = 0
    log = run_small(workload, chunked_prefill=False)
    assert [r.request for r in log.rejected] == [0, 1]
    assert "request 0" in log.rejected[1].reason


def test_a_closed_loop_lets_a_request_in_when_another_has_left() -> None:
    log = run_small(requests((8, 1, 0), (8, 1, 0), (8, 1, 0)), max_concurrency=1)
    ends = [r.end_ns for r in log.requests]
    assert [r.arrival_ns for r in log.requests] == [0, ends[0], ends[1]]
    assert max(log.instances[0].steps.running) == 1


def test_a_run_that_cannot_go_on_names_the_stuck_requests() -> None:
    # Without chunking, a preempted request that has outgrown the budget can never be resumed.
    workload = requests((8, 16, 0), (8, 16, 0))
    with pytest.raises(RunError, match=r"instance 0 cannot go on: requests 1 wait"):
        run_small(workload, blocks=8, budget=9, chunked_prefill=False, caching=False)


def test_who_waits_longest_outside_is_let_in_first() -> None:
    # request 1 follows request 0 at once, when all the others have been waiting since 0 ns
    workload = requests(*[(8, 2, 0)] * 6)
    workload.requests[1].predecessor = 0
    log = run_small(workload, max_concurrency=1)
    ended = sorted(log.requests, key=lambda record: record.end_ns)
    assert [record.request for record in ended] == [0, 2, 3, 4, 5, 1]
    assert ended[-1].arrival_ns == ended[-2].end_ns


def test_a_place_that_becomes_free_is_not_given_away_twice() -> None:
    workload = requests(*[(8, 2, 0)] * 4, (8, 2, 2090))
    log = run_small(workload, max_concurrency=2)
    assert max(log.instances[0].steps.running) == 2


@pytest.mark.parametrize("blocks", [9, 12, 60])
def test_prompts_and_hits_count_once_whatever_is_preempted(blocks: int) -> None:
    workload = requests(*[(20, 12, 0)] * 6, ids=[range(20)] * 6)
    steps = run_small(workload, blocks=blocks, budget=15).instances[0].steps
    assert (sum(steps.preempted) > 0) == (blocks < 60)
    assert (sum(steps.recomputed_tokens) > 0) == (blocks < 60)
    assert sum(steps.lookup_tokens) == 120
    new = sum(steps.prefill_tokens) + sum(steps.decode_tokens) + sum(steps.hit_tokens)
    assert new - sum(steps.recomputed_tokens) == 120 + 6 * 11


@pytest.mark.parametrize("shared", [True, False])
def test_a_token_known_at_once_is_noted_before_a_preemption(shared: bool) -> None:
    """Three steps with nothing in flight fill two blocks with known tokens. The fourth, scheduled behind the
    third, finds no block and preempts the request itself: vLLM has cached both blocks by then."""
    workload = requests((6, 14, 0), (6, 14, 0), ids=[range(6), range(6) if shared else range(50, 56)])
    for request in workload:
        request.output_ids = np.arange(14) + (6 if shared or request.index == 0 else 56)
    member = small_loop(workload, blocks=3, depth=2).members[0]
    scheduler, pool = member.scheduler, member.scheduler.kv.pool
    state = member.new_state(workload.requests[0], 0)
    scheduler.enqueue(state, 0)
    for step in range(3):
        assert not scheduler.schedule(step, step, in_flight=False).is_empty
    content = [state.table.content(0), state.table.content(1)]
    assert scheduler.schedule(3, 3, in_flight=True).preempted == [state]
    assert pool.is_whole
    pool.check_integrity()
    assert [pool.lookup(each) for each in content] == [1, 2]
