"""Data-parallel groups worked out by hand: a wave takes 1000 ns and 10 ns a token of its busiest member."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.results.records import RunLog
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Workload
from tests.engine.small_engine import ConstantStages, SlowestMember, requests, small_member
from tests.engine.test_properties import check_run, workloads


def run_group(workload: Workload, members: int = 2, depth: int = 1, pp: int = 1, **limits: Any) -> RunLog:
    tables = BlockTables(workload)
    tracks: list[Any] | None = [] if pp > 1 else None
    group = [
        small_member(workload, i, tables, tracks=tracks, instances=members, **limits) for i in range(members)
    ]
    if pp > 1:
        loop = LoopPlan(group, ConstantStages(pp), depth=pp, stages=pp)
    else:
        loop = LoopPlan(group, SlowestMember(), depth=depth)
    log = Simulation([loop], workload, RuntimeOptions(), pipeline_tracks=tracks).run()
    for member in group:
        member.scheduler.kv.pool.check_integrity()
        assert member.scheduler.kv.pool.num_used == 0
    return log


def test_members_start_together_and_wait_for_the_slowest() -> None:
    log = run_group(requests((40, 1, 0), (10, 1, 0)))
    assert [r.instance for r in log.requests] == [0, 1]
    assert [r.end_ns for r in log.requests] == [1400, 1400]


def test_an_idle_member_does_not_hold_the_others_up() -> None:
    log = run_group(requests((40, 3, 0)))
    assert log.requests[0].end_ns == 1400 + 1010 + 1010
    assert len(log.instances[1].steps) == 0
    dummies = log.instances[1].dummies
    assert list(zip(dummies.start_ns, dummies.end_ns, strict=True)) == [(0, 1400), (1400, 2410), (2410, 3420)]
    assert len(log.instances[0].dummies) == 0


def test_an_arrival_at_an_idle_member_waits_for_the_wave_to_end() -> None:
    log = run_group(requests((40, 2, 0), (8, 1, 5)))
    assert log.requests[1].instance == 1
    assert log.requests[1].queued_ns == 1400
    # the wave of its prefill (8 tokens) also carries the other member's decode
    assert log.requests[1].end_ns == log.requests[0].end_ns == 1400 + 1080


def test_a_group_of_pipelines_goes_on_when_a_member_falls_idle() -> None:
    log = run_group(requests((8, 2, 0), (8, 9, 0), (8, 1, 20_000)), pp=2)
    assert len(log.requests) == 3
    assert log.requests[0].end_ns < log.requests[1].end_ns


@settings(max_examples=120, deadline=None)
@given(workloads(), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(30, 130))
def test_nothing_is_lost_in_a_group(
    workload: Workload, members: int, depth: int, pp: int, blocks: int
) -> None:
    log = run_group(workload, members, depth, pp, blocks=blocks)
    check_run(log, workload, {})
