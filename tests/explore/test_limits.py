"""What held a run back, and what its steps were like."""

from __future__ import annotations

from servesim.explore.limits import limits, typical_steps
from servesim.results.records import RunLog
from servesim.results.result import Result
from servesim.workload.request import Request, Workload
from tests.hand_made import add_step, instance, instance_options, record, two_requests


def result_of(*steps: dict[str, int], max_num_seqs: int = 4) -> Result:
    """A run of steps of 10 ms each, and one request of 100 prompt tokens with a token at the end of each."""
    options = instance_options(max_num_seqs=max_num_seqs, max_num_batched_tokens=100)
    log = RunLog([instance(options=options)], end_ns=len(steps) * 10_000_000)
    for index, columns in enumerate(steps):
        add_step(log.instances[0], 10 * index, 10 * index + 10, **columns)
    log.requests = [record(0, 0, [(0, 0, len(steps) - 1)], log)]
    return Result(log, Workload([Request(0, 100, len(steps), 0)]))


def test_waiting_beside_free_slots_and_budget_is_for_kv_blocks() -> None:
    found = limits(
        result_of(
            {"waiting": 1, "running": 2, "decode_tokens": 2},  # blocks
            {"waiting": 1, "running": 4, "decode_tokens": 4},  # slots
            {"waiting": 1, "running": 2, "prefill_tokens": 100},  # budget
            {"waiting": 0, "running": 1, "decode_tokens": 1},  # nothing
        )
    )
    assert (found.blocks, found.slots, found.budget) == (0.25, 0.25, 0.25)
    assert found.kv_bound
    assert "--max-num-seqs" in found.other


def test_an_idle_queue_is_no_limit() -> None:
    found = limits(result_of({"running": 1, "decode_tokens": 1}))
    assert not found.kv_bound
    assert found.other == ""


def test_a_preemption_means_that_kv_blocks_were_short() -> None:
    assert limits(two_requests()).kv_bound


def test_typical_steps_are_weighted_by_time() -> None:
    # Decodes alone: 12 ms with 2 and 10 ms with 1; mixed: 8 ms of 100 prompt tokens, 8 of 18 beside one
    # decode, 18 of 52. Request 0 decodes with 100..103 tokens in the cache, request 1 with 50..52.
    typical = typical_steps(two_requests())
    assert typical.decodes == round((12 * 2 + 10 * 1) / 22)
    assert typical.prefill_tokens == round((8 * 100 + 8 * 18 + 18 * 52) / 34)
    assert typical.mixed_share == 34 / 56
    assert typical.kv_length == (100 + 101 + 102 + 103 + 50 + 51 + 52) // 7
    assert typical.history == (83 - 55) // 2  # a prompt token is in a prompt of (100² + 50²) / 150 tokens


def test_a_run_without_requests_has_no_typical_steps() -> None:
    result = two_requests()
    result.log.requests.clear()
    assert typical_steps(result).decodes == 0
