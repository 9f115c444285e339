"""Instances behind a router look past arrivals for others; the slow twin, a run step by step, never does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.noise import StepNoise
from servesim.engine.outlook import Outlook
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.specs.options import RuntimeOptions
from tests.engine.small_engine import ConstantStages, LinearTimes, requests, small_loop, small_member
from tests.engine.test_glide import CountedLaunches
from tests.engine.test_properties import Watcher, engines, everything, workloads
from tests.hand_made import OneInstance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.router import Candidate
    from servesim.results.records import RunLog
    from servesim.workload.request import Request, Workload


def most_running(request: Request, candidates: Sequence[Candidate]) -> Candidate:
    """A custom policy, which may look at whatever it likes."""
    return max(candidates, key=lambda candidate: (candidate.num_running, candidate.cached_tokens(request)))


CUSTOM = f"{__name__}:most_running"


@st.composite
def fleets(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What differs between instances: how they schedule, noise, adapters, stages of a pipeline."""
    kinds: list[dict[str, Any]] = [{}, {}, {}, {"sigma": 0.2}, {"max_loras": 1}, {"stages": 2}]
    drawn = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=5))
    return [
        {**kind, "depth": draw(st.sampled_from([1, 2])), "per_kv": draw(st.integers(0, 3))} for kind in drawn
    ]


def run_fleet(
    workload: Workload,
    fleet: list[dict[str, Any]],
    engine: dict[str, Any],
    options: RuntimeOptions,
    *,
    jump: bool,
) -> tuple[RunLog, Watcher]:
    tables, tracks = BlockTables(workload), []  # type: ignore[var-annotated]
    loops = []
    for index, described in enumerate(fleet):
        own = {**engine, **described}
        sigma, stages, per_kv = own.pop("sigma", None), own.pop("stages", None), own.pop("per_kv")
        own["noise"] = None if sigma is None else StepNoise(sigma, (index,))
        if stages:
            own.update(stages=ConstantStages(stages), tracks=tracks, instances=len(fleet))
        own.update(times=LinearTimes(per_kv=per_kv), jump=jump, tables=tables)
        loops.append(small_loop(workload, index=index, **own))
    watcher = Watcher(2500)
    log = Simulation(loops, workload, options, pipeline_tracks=tracks).run(watcher)
    return log, watcher


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    workloads(),
    fleets(),
    engines,
    st.builds(
        RuntimeOptions,
        request_routing_policy=st.sampled_from(["LOAD", "LOAD", "LOAD", "RR", "RAND", "PREFIX", CUSTOM]),
        router_refresh=st.sampled_from([0.0, 0.0, 3e-6]),
        sticky_sessions=st.booleans(),
        max_num_queued_reqs=st.sampled_from([None, None, 4]),
        max_num_queued_tokens=st.sampled_from([None, None, 50]),
    ),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([None, "a", "b"])), min_size=14, max_size=14),
)
def test_looking_past_arrivals_changes_nothing(
    workload: Workload,
    fleet: list[dict[str, Any]],
    engine: dict[str, Any],
    options: RuntimeOptions,
    more: list[tuple[int, str | None]],
) -> None:
    engine = dict(engine)
    options = options.replace(max_concurrency=engine.pop("max_concurrency"))
    for request, (stop, lora) in zip(workload, more, strict=False):
        request.max_tokens = request.output_tokens + 5 if stop == 1 else 0  # ends by a stop token
        request.lora = lora if all("max_loras" in kind for kind in fleet) else None
    log, seen = run_fleet(workload, fleet, engine, options, jump=True)
    stepped, seen_stepped = run_fleet(workload, fleet, engine, options, jump=False)
    assert everything(log) == everything(stepped)
    assert seen.seen == seen_stepped.seen


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["LOAD", "RR", "RAND"])
def test_steps_between_arrivals_for_others_are_not_launched(depth: int, policy: str) -> None:
    """40 requests to 4 instances, one every step or so: what is launched one by one is what a stepped run
    has more."""
    workload = requests(*[(4, 30 + i % 7, 700 * i) for i in range(40)])
    launched = []
    for jump in (True, False):
        tables, times = BlockTables(workload), CountedLaunches(LinearTimes())
        loops = [
            LoopPlan([small_member(workload, index, tables, max_num_seqs=20)], times, depth=depth, jump=jump)
            for index in range(4)
        ]
        log = Simulation(loops, workload, RuntimeOptions(request_routing_policy=policy)).run()
        launched.append((times.launched, everything(log)))
    assert launched[0][1] == launched[1][1]
    assert launched[1][0] > 150
    assert launched[0][0] <= 4 * depth  # of an instance with nothing else in flight


class CountedPrices(LinearTimes):
    """Counts the steps that are priced."""

    priced = 0

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int:
        self.priced += 1
        return super().decode_ns(n, kv_sum, kv_min, kv_max)

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int:
        self.priced += not n
        return super().mixed_ns(chunks, n, kv_sum, kv_min, kv_max)


def prices(policy: str, watched_every_ns: int) -> tuple[int, RunLog]:
    """Steps priced in a run of 40 requests to 4 instances, and the run."""
    workload = requests(*[(4, 30 + i % 7, 700 * i) for i in range(40)])
    tables, times = BlockTables(workload), CountedPrices()
    loops = [
        LoopPlan([small_member(workload, index, tables, max_num_seqs=20)], OneInstance(times), depth=2)
        for index in range(4)
    ]
    options = RuntimeOptions(request_routing_policy=policy)
    log = Simulation(loops, workload, options).run(Watcher(watched_every_ns))
    return times.priced, log


def test_an_onlooker_makes_nothing_be_priced_again() -> None:
    assert prices("LOAD", 2500)[0] == prices("LOAD", 10**12)[0]


@pytest.mark.parametrize("policy", ["RR", "RAND"])
def test_turns_and_chance_need_no_outlook(policy: str) -> None:
    priced, log = prices(policy, 2500)
    assert priced == sum(len(instance.steps) for instance in log.instances)  # none that did not come
    assert prices("LOAD", 2500)[0] > priced


def laid_out(first: int, ends_ns: list[int], leaves_ns: Sequence[int] = ()) -> Outlook:
    """Steps behind two in flight; requests leave at these times."""
    member = small_member(requests((4, 4, 0)))
    outlook = Outlook(member.scheduler, LinearTimes(), 2, through_ends=True)
    outlook.open_with(first, ends_ns, leaves_ns)
    return outlook


def test_an_outlook_says_when_requests_leave_and_when_it_is_over() -> None:
    # steps 7, 8, 9 behind two in flight that end at 10 and 20; one request leaves at 20, two at 30
    outlook = laid_out(7, [10, 20, 30, 40, 50], [20, 30, 30, 50])
    assert outlook.until_ns == 40  # when step 10 would be scheduled
    assert outlook.next_ns() == 20
    outlook.pass_to(20)
    assert (outlook.left, outlook.next_ns()) == (1, 30)
    outlook.pass_to(35)
    assert (outlook.left, outlook.next_ns()) == (3, 40)
    assert outlook.ends_before(7, 20) == [30]  # step 7 is scheduled at 10, step 8 at 20
    assert outlook.ends_before(8, 40) == [40, 50]


@pytest.mark.parametrize(("after", "until_ns"), [(False, 20), (True, 30)])
def test_what_comes_at_a_boundary_cuts_an_outlook(after: bool, until_ns: int) -> None:
    outlook = laid_out(0, [10, 20, 30, 40, 50])
    outlook.cut(20, after=after)
    assert outlook.until_ns == until_ns
    outlook.cut(35, after=False)  # a second request changes nothing
    assert outlook.until_ns == until_ns
