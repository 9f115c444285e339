"""What two runs have to do with one another, whatever they are of: no clock, name or neighbour matters that
should not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.engine.block_tables import BlockTables
from servesim.engine.simulation import Simulation
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.small_engine import LinearTimes, run_small, small_loop
from tests.engine.test_properties import engines, workloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.results.records import RequestRecord, RunLog

relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Row = tuple[int, ...]


def stamps(log: RunLog) -> dict[int, Row]:
    """Request -> when what happened to it."""
    return {
        each.request: (each.arrival_ns, each.queued_ns, each.scheduled_ns, each.first_token_ns, each.end_ns)
        for each in log.requests
    }


def counts(each: RequestRecord) -> Row:
    return (each.instance, each.npu_hit, each.preemptions, each.recomputed_tokens)


def outcome(log: RunLog) -> Any:
    """When what happened to every request, and what else is known of it; who was rejected."""
    refused = [(each.request, each.reason) for each in log.rejected]
    return stamps(log), {each.request: counts(each) for each in log.requests}, refused


def copied(workload: Workload, change: Callable[[Request], None]) -> Workload:
    """The workload, with something changed in every request."""
    made = [replace(request) for request in workload]
    for request in made:
        change(request)
    return Workload(made, workload.source)


@relaxed
@given(workloads(), engines, st.integers(2, 1000), st.integers(0, 3))
def test_slower_clocks_scale_everything(
    workload: Workload, engine: dict[str, Any], factor: int, per_kv: int
) -> None:
    """Arrivals, pauses and steps that take ``factor`` times as long give the same schedule, stretched."""

    def stretch(request: Request) -> None:
        request.arrival_ns *= factor
        request.tool_ns *= factor

    log = run_small(workload, jump=True, times=LinearTimes(1000, 10, per_kv), **engine)
    slow = LinearTimes(1000 * factor, 10 * factor, per_kv * factor)
    slower = run_small(copied(workload, stretch), jump=True, times=slow, **engine)
    assert stamps(slower) == {
        request: tuple(time * factor for time in times) for request, times in stamps(log).items()
    }
    assert outcome(slower)[1:] == outcome(log)[1:]


@relaxed
@given(workloads(), engines, st.integers(1, 10**12))
def test_a_later_start_shifts_everything(workload: Workload, engine: dict[str, Any], later_ns: int) -> None:
    def shift(request: Request) -> None:
        request.arrival_ns += later_ns

    log = run_small(workload, jump=True, **engine)
    later = run_small(copied(workload, shift), jump=True, **engine)
    assert stamps(later) == {
        request: tuple(time + later_ns for time in times) for request, times in stamps(log).items()
    }
    assert outcome(later)[1:] == outcome(log)[1:]


@relaxed
@given(workloads(), engines, st.integers(0, 40_000))
def test_nothing_acts_before_it_arrives(workload: Workload, engine: dict[str, Any], until_ns: int) -> None:
    """Without the requests that come later, everything before is the same."""
    head = {
        each.index: each if each.predecessor < 0 else workload.requests[each.predecessor] for each in workload
    }
    early = [each for each in workload if head[each.index].arrival_ns <= until_ns]
    number = {each.index: place for place, each in enumerate(early)}
    made = [
        replace(each, index=number[each.index], predecessor=number.get(each.predecessor, -1))
        for each in early
    ]
    if not made:
        return
    whole = stamps(run_small(workload, jump=True, **engine))
    part = stamps(run_small(Workload(made, "early"), jump=True, **engine))
    for request, place in number.items():
        if request in whole and whole[request][-1] <= until_ns:
            assert part[place] == whole[request]


@relaxed
@given(workloads(), engines, st.randoms(use_true_random=False))
def test_the_order_of_lines_is_no_matter(workload: Workload, engine: dict[str, Any], rng: Any) -> None:
    """Requests that arrive at different times may stand anywhere in a file."""
    for index, request in enumerate(workload):
        request.arrival_ns = 1 + request.arrival_ns * 64 + index  # no two alike
    chains = [
        [each, *(more for more in workload if more.predecessor == each.index)]
        for each in workload
        if each.predecessor < 0
    ]
    rng.shuffle(chains)
    number = {each.index: place for place, each in enumerate(each for chain in chains for each in chain)}
    moved = [
        replace(each, index=number[each.index], predecessor=number.get(each.predecessor, -1))
        for chain in chains
        for each in chain
    ]
    log = run_small(workload, jump=True, **engine)
    other = run_small(Workload(moved, "moved"), jump=True, **engine)
    assert {number[request]: times for request, times in stamps(log).items()} == stamps(other)


@relaxed
@given(workloads(), engines)
def test_what_tokens_are_called_is_no_matter(workload: Workload, engine: dict[str, Any]) -> None:
    """Only which of them are alike."""

    def rename(request: Request) -> None:
        for name in ("input_ids", "output_ids"):
            if (ids := getattr(request, name)) is not None:
                setattr(request, name, 7919 * ids + 31)

    assert outcome(run_small(copied(workload, rename), **engine)) == outcome(run_small(workload, **engine))


@relaxed
@given(workloads(), engines)
def test_limits_out_of_reach_are_no_limits(workload: Workload, engine: dict[str, Any]) -> None:
    """As many places as there are requests, and a budget of all their tokens."""
    tokens = sum(each.input_tokens + each.output_tokens for each in workload)
    logs = [
        outcome(run_small(workload, **{**engine, "max_num_seqs": len(workload) * n, "budget": tokens * n}))
        for n in (1, 3)
    ]
    assert logs[0] == logs[1]


@relaxed
@given(workloads(), engines)
def test_without_ids_there_is_nothing_to_cache(workload: Workload, engine: dict[str, Any]) -> None:
    """Where no request is preempted; one that is finds its own blocks again."""
    engine = {**engine, "blocks": 5000}

    def forget(request: Request) -> None:
        request.input_ids = request.output_ids = None

    plain = copied(workload, forget)
    with_cache, without = (outcome(run_small(plain, **{**engine, "caching": on})) for on in (True, False))
    assert with_cache == without


@relaxed
@given(workloads(), engines)
def test_littles_law_holds_for_the_running(workload: Workload, engine: dict[str, Any]) -> None:
    """Requests that run, summed over the time of the steps, are the time that each of them runs."""
    engine = {**engine, "depth": 1, "blocks": 5000}
    log = run_small(workload, **engine)
    steps = log.instances[0].steps
    busy = steps.column("end_ns") - steps.column("start_ns")
    assert int((steps.column("running") * busy).sum()) == sum(
        each.end_ns - each.scheduled_ns for each in log.requests
    )


@relaxed
@given(workloads(), st.integers(2, 3), st.sampled_from([1, 2]))
def test_twins_in_turn_are_each_the_one(workload: Workload, count: int, depth: int) -> None:
    """Every request ``count`` times, taken in turn by as many instances: each does what one alone does."""

    def flat(request: Request) -> None:
        request.predecessor, request.tool_ns = -1, 0

    plain = copied(workload, flat)
    alone = stamps(run_small(plain, depth=depth))
    plain.requests.sort(key=lambda each: each.arrival_ns)  # the router takes them as they come
    twins = Workload(
        [replace(each, index=count * at + n) for at, each in enumerate(plain) for n in range(count)], "twins"
    )
    tables = BlockTables(twins)
    loops = [small_loop(twins, tables=tables, index=i, depth=depth) for i in range(count)]
    log = Simulation(loops, twins, RuntimeOptions(request_routing_policy="RR")).run()
    for at, each in enumerate(plain):
        for n in range(count):
            assert stamps(log)[count * at + n] == alone[each.index]
