"""What holds for every workload, however odd: nothing is lost, nothing depends on how the clock is
advanced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.simulation import Simulation
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.small_engine import LinearTimes, run_small, small_loop

if TYPE_CHECKING:
    from servesim.results.records import RunLog


@st.composite
def workloads(
    draw: st.DrawFn, most: int = 14, longest: int = 300, prompts: tuple[int, int] = (1, 60)
) -> Workload:
    """Flat requests and sessions, some with ids that share prefixes, which are longer than the shortest of
    ``prompts``.

    ``longest``: output of a request; ``prompts``: shortest and longest prompt.
    """
    made: list[Request] = []
    for index in range(draw(st.integers(1, most))):
        prompt = draw(st.integers(*prompts))
        output = draw(st.integers(1, draw(st.sampled_from([3, 40, longest]))))
        request = Request(index, prompt, output, draw(st.integers(0, 40_000)))
        if draw(st.booleans()):
            group = draw(st.integers(0, 2))
            shared = draw(st.integers(prompts[0] - 1, prompt))
            ids = [group] * shared + [1000 + index] * (prompt - shared)
            request.input_ids = np.array(ids, dtype=np.int64)
            if draw(st.booleans()):
                request.output_ids = np.full(output, group, dtype=np.int64)
        if made and made[-1].predecessor < 0 and draw(st.integers(0, 4)) == 0:
            request.predecessor, request.tool_ns = made[-1].index, draw(st.integers(0, 5000))
        made.append(request)
    return Workload(made, "drawn")


engines = st.fixed_dictionaries(
    {
        "blocks": st.integers(30, 130),
        "block_size": st.sampled_from([1, 3, 4, 16]),
        "max_num_seqs": st.integers(1, 10),
        "budget": st.sampled_from([5, 16, 64, 500]),
        "depth": st.sampled_from([1, 2]),
        "caching": st.booleans(),
        "long_prefill_token_threshold": st.sampled_from([0, 7, 30]),
        "reserve_full_isl": st.booleans(),
        "skip_prefill": st.booleans(),
        "max_concurrency": st.sampled_from([0, 0, 2]),
    }
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def everything(log: RunLog) -> Any:
    """All a run leaves behind, in a form that can be compared."""
    steps = [[list(getattr(i.steps, name)) for name in i.steps.COLUMNS] for i in log.instances]
    return steps, log.requests, log.rejected, log.end_ns


@relaxed
@given(workloads(), engines, st.integers(0, 3))
def test_jumping_over_quiet_steps_changes_nothing(
    workload: Workload, engine: dict[str, Any], per_kv: int
) -> None:
    times = LinearTimes(per_kv=per_kv)
    stepped = run_small(workload, jump=False, times=times, **engine)
    jumped = run_small(workload, jump=True, times=times, **engine)
    assert everything(stepped) == everything(jumped)


class Watcher:
    """Looks at the logs every so often, and keeps what had ended by then."""

    def __init__(self, interval_ns: int) -> None:
        self.interval_ns = self.next_ns = interval_ns
        self.seen: list[list[tuple[int, ...]]] = []

    def advance(self, now_ns: int, log: RunLog) -> None:
        while self.next_ns < now_ns:
            steps = [instance.steps for instance in log.instances]
            self.seen += [
                [
                    row
                    for row in zip(s.start_ns, s.end_ns, s.running, s.waiting, s.kv_blocks_used, strict=True)
                    if row[1] <= self.next_ns
                ]
                for s in steps
            ]
            self.next_ns += self.interval_ns


@relaxed
@given(
    workloads(),
    engines,
    st.integers(2, 5),
    st.sampled_from(["LOAD", "RR", "RAND", "PREFIX"]),
    st.sampled_from([0.0, 3e-6]),
    st.booleans(),
)
def test_instances_that_run_ahead_change_nothing(
    workload: Workload, engine: dict[str, Any], count: int, policy: str, refresh_s: float, watched: bool
) -> None:
    """A quiet stretch is cut back when a request is routed to its instance, and looks the same to others."""
    outcomes = []
    for jump in (False, True):
        tables = BlockTables(workload)
        limits = {name: value for name, value in engine.items() if name != "max_concurrency"}
        loops = [small_loop(workload, index=i, tables=tables, jump=jump, **limits) for i in range(count)]
        options = RuntimeOptions(
            request_routing_policy=policy, router_refresh=refresh_s, max_concurrency=engine["max_concurrency"]
        )
        watcher = Watcher(2500)
        log = Simulation(loops, workload, options).run(watcher if watched else None)
        outcomes.append((everything(log), watcher.seen))
    assert outcomes[0] == outcomes[1]


TIGHT = {"depth": 1, "max_num_seqs": 1, "block_size": 1, "budget": 5, "blocks": 30}


def two_instances(workload: Workload, options: RuntimeOptions, **limits: Any) -> list[Any]:
    """Everything of a run on two instances, step by step and looking ahead."""
    outcomes = []
    for jump in (False, True):
        tables = BlockTables(workload)
        loops = [small_loop(workload, index=i, tables=tables, jump=jump, **limits) for i in (0, 1)]
        outcomes.append(everything(Simulation(loops, workload, options).run()))
    return outcomes


def test_a_request_misses_the_turn_of_its_instance() -> None:
    """One ends on the second instance at the very time at which the first, by then, has begun a step."""
    arrivals = [(2022, -1), (1, -1), (0, 1), (0, -1), (1, -1), (0, 4), (2021, -1)]
    arrivals += [(2021, -1), (0, 7), (0, -1), (0, 9), (0, -1), (0, 11), (0, -1)]
    outputs = {6: 2, 12: 4}
    workload = Workload(
        [
            Request(index, 1, outputs.get(index, 1), arrival, predecessor=before)
            for index, (arrival, before) in enumerate(arrivals)
        ],
        "mine",
    )
    options = RuntimeOptions(request_routing_policy="RAND", max_concurrency=2)
    stepped, ahead = two_instances(workload, options, **TIGHT)
    assert stepped == ahead


def test_mail_is_taken_in_though_another_acts_then() -> None:
    """The first instance, which had looked ahead, and the second have a step that ends at the same time."""
    arrivals = [(1, -1), (2021, -1), (0, 1), (0, -1), (1, -1), (0, 4), (0, -1), (0, 6), (0, -1)]
    workload = Workload(
        [
            Request(index, 1, 3 if index == 8 else 1, arrival, predecessor=before)
            for index, (arrival, before) in enumerate(arrivals)
        ],
        "mine",
    )
    options = RuntimeOptions(request_routing_policy="LOAD", router_refresh=3e-6)
    stepped, ahead = two_instances(workload, options, **TIGHT)
    assert stepped == ahead


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tool_ns", [12_500, 13_500, 24_500])
def test_mail_is_taken_in_before_a_jump(tool_ns: int, depth: int) -> None:
    """A follow-up comes in the last step that an instance has laid out, and nothing else will happen."""
    shapes = [(1, 200, -1), (1, 1, -1), (1, 1, 1)]
    workload = Workload(
        [
            Request(index, prompt, output, 0, predecessor=before, tool_ns=tool_ns)
            for index, (prompt, output, before) in enumerate(shapes)
        ],
        "mine",
    )
    options = RuntimeOptions(request_routing_policy="RR")
    limits = {"depth": depth, "max_num_seqs": 1, "block_size": 4, "blocks": 80}
    stepped, ahead = two_instances(workload, options, **limits)
    assert stepped == ahead


def check_run(log: RunLog, workload: Workload, engine: dict[str, Any]) -> None:
    """Every request ended once with all its tokens, and the steps computed what that takes and no more."""
    ended = [r.request for r in log.requests] + [r.request for r in log.rejected]
    assert sorted(ended) == list(range(len(workload)))
    assert all(rejected.reason for rejected in log.rejected)
    tracks = log.tracks()
    expected = 0
    for record in log.requests:
        request = workload.requests[record.request]
        times = [int(t) for track, a, b in record.token_steps for t in tracks[track][a : b + 1]]
        assert len(times) == request.output_tokens
        assert times == sorted(set(times))
        assert (record.first_token_ns, record.end_ns) == (times[0], times[-1])
        assert record.arrival_ns <= record.queued_ns <= record.scheduled_ns < record.first_token_ns
        prompt = 1 if engine.get("skip_prefill") else request.input_tokens - record.npu_hit
        expected += prompt + request.output_tokens - 1 + record.recomputed_tokens
    steps = [instance.steps for instance in log.instances]
    assert sum(sum(s.prefill_tokens) + sum(s.decode_tokens) for s in steps) == expected


@relaxed
@given(workloads(), engines)
def test_every_request_ends_once_and_every_token_is_computed_once(
    workload: Workload, engine: dict[str, Any]
) -> None:
    check_run(run_small(workload, jump=True, **engine), workload, engine)


@relaxed
@given(workloads(), engines)
def test_time_and_blocks_stay_within_bounds(workload: Workload, engine: dict[str, Any]) -> None:
    log = run_small(workload, jump=True, **engine)
    steps = log.instances[0].steps
    start, end = steps.column("start_ns"), steps.column("end_ns")
    assert (start < end).all()
    assert (start[1:] >= end[:-1]).all()
    assert (steps.column("kv_blocks_used") <= engine["blocks"] - 1).all()
    assert (steps.column("running") <= engine["max_num_seqs"]).all()
    assert (steps.column("prefill_tokens") + steps.column("decode_tokens") <= engine["budget"]).all()


@relaxed
@given(workloads(), st.sampled_from(["LOAD", "RR", "RAND", "PREFIX"]), st.integers(2, 4), st.booleans())
def test_several_instances_lose_nothing_and_repeat_exactly(
    workload: Workload, policy: str, count: int, jump: bool
) -> None:
    def go(jumping: bool) -> RunLog:
        tables = BlockTables(workload)
        loops = [
            small_loop(workload, tables=tables, index=i, depth=1 + i % 2, jump=jumping) for i in range(count)
        ]
        return Simulation(loops, workload, RuntimeOptions(request_routing_policy=policy)).run()

    log = go(jump)
    assert sorted(r.request for r in (*log.requests, *log.rejected)) == list(range(len(workload)))
    assert everything(log) == everything(go(not jump))
