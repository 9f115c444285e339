"""When a run counts as near saturation."""

from __future__ import annotations

import pytest

from servesim.results.closing import closing
from servesim.results.records import RunLog
from servesim.results.result import Result
from servesim.results.saturation import Saturation, saturation
from servesim.workload.request import Request, Workload
from tests.hand_made import MS, add_step, capacity, instance, instance_options, record, two_requests


def ten_steps(waiting: list[int], running: list[int], kv: int = 10) -> Result:
    """Ten steps of 10 ms; a request arrives at 0 and one at 100 ms, so that the halves meet at 50 ms."""
    log = RunLog([instance(options=instance_options(max_num_seqs=4), capacity=capacity(101))])
    for step, (queue, batch) in enumerate(zip(waiting, running, strict=True)):
        add_step(log.instances[0], 10 * step, 10 * step + 10, waiting=queue, running=batch, kv_blocks_used=kv)
    log.requests = [record(0, 0, [(0, 0, 4)], log), record(1, 100, [(0, 9, 9)], log)]
    log.end_ns = 100 * MS
    return Result(log, Workload([Request(0, 10, 5, 0), Request(1, 10, 1, 100 * MS)], "by hand"))


def test_a_run_with_room_to_spare_is_not_near_saturation() -> None:
    result = ten_steps([0] * 10, [1] * 10)
    assert saturation(result) == [Saturation(0, 0.0, 0.0, 0.0, 0.1, 0)]
    assert result.summary["saturation"]["near"] is False
    assert "saturation" not in closing(result)


def test_full_slots_count_by_time() -> None:
    result = ten_steps([0] * 10, [4, 4] + [3] * 8)
    assert saturation(result)[0].full_share == 0.2
    assert saturation(result)[0].reasons() == ["max_num_seqs requests ran for 20 % of the busy time"]


def test_a_queue_that_grows_with_arrivals_is_saturation() -> None:
    result = ten_steps([0, 1, 1, 1, 2, 3, 4, 5, 6, 7], [1] * 10)
    (found,) = saturation(result)
    assert (found.queue_early, found.queue_late) == (1.0, 5.0)
    assert found.growing
    assert "the queue grew while requests arrived (mean 1.00, then 5.00 waiting)" in " ".join(
        closing(result).split()
    )


def test_a_huge_queue_over_a_long_time_is_no_overflow() -> None:
    log = RunLog([instance(options=instance_options(max_num_seqs=4))])
    half = 2**61 / MS
    for step in range(2):
        add_step(log.instances[0], step * half, (step + 1) * half, waiting=60_000, running=4)
    log.requests = [record(0, 0, [(0, 0, 1)], log), record(1, 2 * half, [(0, 1, 1)], log)]
    result = Result(log, Workload([Request(0, 9, 2, 0), Request(1, 9, 1, 2**62)], "by hand"))
    (found,) = saturation(result)
    assert (found.queue_early, found.queue_late, found.full_share) == (60_000, 60_000, 1.0)


def test_the_queue_of_a_decode_instance_counts() -> None:
    log = RunLog([instance(0), instance(1)])
    for step, queue in enumerate([0, 1, 1, 1, 2, 3, 4, 5, 6, 7]):
        add_step(log.instances[0], 10 * step, 10 * step + 10, running=1)
        add_step(log.instances[1], 10 * step, 10 * step + 10, running=1, waiting=queue)
    log.requests = [
        record(n, 0, [(1, 9 * n, 9 * n)], log, instance=0, handed_over_ns=100 * n * MS) for n in range(2)
    ]
    result = Result(log, Workload([Request(n, 10, 1, 0) for n in range(2)], "by hand"))
    prefill, decode = saturation(result)
    assert not prefill.reasons()
    assert (decode.queue_early, decode.queue_late) == (1.0, 5.0)
    assert "instance 1: the queue grew" in closing(result)


@pytest.mark.parametrize(
    "waiting", [[6, 6, 5, 5, 5, 4, 4, 4, 3, 3], [0, 0, 0, 0, 0, 0, 1, 0, 0, 0], [5] * 5 + [6] * 5]
)
def test_a_queue_that_shrinks_or_flickers_or_stays_is_not(waiting: list[int]) -> None:
    assert not saturation(ten_steps(waiting, [1] * 10))[0].growing


def test_a_full_kv_cache_and_preemptions_are_saturation() -> None:
    assert "99.0 % full" in saturation(ten_steps([0] * 10, [1] * 10, kv=99))[0].reasons()[0]
    (found,) = saturation(two_requests())
    assert (found.preemptions, found.reasons()) == (1, ["1 preemption"])
