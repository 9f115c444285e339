"""Time between client and engine: in TTFT and latency, not in the engine's own stamps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import servesim
from servesim.engine.arrivals import FrontEnds
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servesim import Result


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[Path]:
    with toy_world(tmp_path) as root:
        yield root


def ran(engine: dict[str, float], **options: int) -> Result:
    workload = Workload([Request(i, 16, 4, 1_000_000 * i) for i in range(6)])
    return servesim.simulate(toy_cluster([toy_instance(engine=engine)]), workload, **options)


def test_a_front_end_is_part_of_ttft_and_latency() -> None:
    plain, late = ran({}, max_concurrency=1), ran({"front_end_us": 8000.0}, max_concurrency=1)
    assert (late.requests["TTFT"] - plain.requests["TTFT"]).tolist() == [8_000_000] * 6
    assert (late.requests["latency"] - plain.requests["latency"]).tolist() == [8_000_000] * 6
    assert (late.requests["TPOT"] == plain.requests["TPOT"]).all()
    assert (late.requests["queuing_delay"] == plain.requests["queuing_delay"]).all()


def test_the_engines_own_ttft_is_reported_beside_it() -> None:
    summary = ran({"front_end_us": 8000.0}, max_concurrency=1).summary
    assert summary["front_end"]["mean_ms"] == 8.0
    engine = summary["front_end"]["mean_engine_ttft_ms"]
    assert engine == pytest.approx(summary["mean_ttft_ms"] - 8.0)
    assert "front_end" not in ran({}).summary


def test_what_is_drawn_depends_on_seed_and_request_alone() -> None:
    ends = FrontEnds([(1000.0, 500.0)], 1000, seed=1)
    drawn = np.array([ends.ns(0, request) for request in range(1000)])
    assert drawn.min() >= 1_000_000
    assert drawn.mean() == pytest.approx(1_500_000, rel=0.05)
    again = FrontEnds([(1000.0, 500.0)], 1000, seed=1)
    assert again.ns(0, 999) == drawn[999]
    assert FrontEnds([(1000.0, 500.0)], 1000, seed=2).ns(0, 999) != drawn[999]


def test_late_requests_may_overtake() -> None:
    jittered = ran({"front_end_us": 10.0, "front_end_jitter_us": 5000.0})
    received = [record.arrival_ns + record.front_end_ns for record in jittered.records]
    assert received != sorted(received)
    assert all(record.queued_ns >= record.arrival_ns + record.front_end_ns for record in jittered.records)


@pytest.mark.parametrize("policy", ["LOAD", "PREFIX"])
@pytest.mark.parametrize("refresh_s", [0.0, 0.1])
@pytest.mark.parametrize("front_end_us", [0.0, 8000.0])
def test_a_router_counts_who_is_in_a_front_end(policy: str, refresh_s: float, front_end_us: float) -> None:
    """It knows whom it gave them to, though the engines have not seen them yet."""
    workload = Workload([Request(i, 16, 4, 1_000 * i) for i in range(12)])
    engine = {"front_end_us": front_end_us}
    for sides in ((None, None, None), ("prefill", "prefill", "decode")):
        instances = [toy_instance(engine=engine, pd_type=side) for side in sides]
        result = servesim.simulate(
            toy_cluster(instances), workload, request_routing_policy=policy, router_refresh=refresh_s
        )
        taken = np.bincount(result.requests["instance_id"], minlength=3)
        fronts = sum(side != "decode" for side in sides)
        assert taken[:fronts].tolist() == [12 // fronts] * fronts
