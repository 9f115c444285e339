"""Failures that simulators of serving clusters have been seen to have, each with the test that ours does not.

Some have their tests elsewhere:

- a prompt over the token budget without chunked prefill: also in ``test_one_instance.py``;
- the queuing delay, overwritten by every chunk: also in ``test_one_instance.py``;
- a data-parallel group with a member that falls idle: hand-computed waves in ``test_waves.py``;
- a full decode instance: hand-computed in ``test_hand_over.py``;
- a dataset given by its absolute path, on the command line: ``tests/cli/test_run_command.py``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import simulate
from servesim.engine.build import build_simulation
from servesim.engine.connector import HandOver
from servesim.engine.step_loop import StepLoop
from servesim.errors import BrokenRunError, InputError, RunError
from servesim.memory.block_pool import BlockPool
from servesim.specs.cluster import load_cluster
from servesim.specs.options import RuntimeOptions
from servesim.workload.formats import load_workload
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import MOE, toy_cluster, toy_instance

if TYPE_CHECKING:
    from servesim.results.records import RunLog

MS = 1_000_000


pytestmark = pytest.mark.usefixtures("toys")


def run(instances: list[dict[str, Any]], *requests: Request, **flags: Any) -> RunLog:
    cluster = load_cluster(toy_cluster(instances))
    return build_simulation(cluster, Workload(list(requests), "w"), RuntimeOptions(**flags)).run()


def burst(count: int, prompt: int, output: int, every_ns: int = 0) -> list[Request]:
    return [Request(i, prompt, output, i * every_ns) for i in range(count)]


# ------------------------------------------------------------------ hangs


@pytest.mark.parametrize("model", ["org/toy", MOE])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_a_group_goes_on_when_a_member_falls_idle(model: str, pp: int) -> None:
    """The other simulator hangs with data and pipeline parallelism together."""
    ep = 2 if model == MOE else 1
    group = [toy_instance(model, pp_size=pp, ep_size=ep, dp_group="A") for _ in range(2)]
    # The second member has three tokens to make, then nothing for long, then one more request.
    log = run(group, Request(0, 40, 300, 0), Request(1, 40, 3, 0), Request(2, 40, 3, 20 * MS))
    assert [r.instance for r in log.requests] == [0, 1, 1]
    first, second, third = log.requests
    assert second.end_ns < third.arrival_ns < third.end_ns < first.end_ns
    assert len(log.instances[1].steps) < len(log.instances[0].steps)


def test_a_member_that_never_gets_a_request_holds_nobody_up() -> None:
    group = [toy_instance(MOE, pp_size=2, ep_size=2, dp_group="A") for _ in range(2)]
    log = run(group, Request(0, 40, 30, 0))
    assert log.requests[0].end_ns > 0
    assert len(log.instances[1].steps) == 0


@pytest.mark.parametrize("sides", [False, True])
def test_a_prompt_over_the_budget_without_chunking_is_rejected(sides: bool) -> None:
    """The other simulator asks for its first batch for ever."""
    roles = ("prefill", "decode") if sides else (None, None)
    limits: dict[str, Any] = {"max_num_batched_tokens": 64, "max_model_len": 64, "max_num_seqs": 64}
    instances = [toy_instance(pd_type=role, enable_chunked_prefill=False, **limits) for role in roles]
    log = run(instances, Request(0, 65, 2, 0), Request(1, 62, 2, 0))
    assert [r.request for r in log.requests] == [1]
    assert [r.request for r in log.rejected] == [0]
    assert "tokens exceed the longest context of 64" in log.rejected[0].reason


def test_a_budget_under_the_context_is_refused_without_chunking() -> None:
    """As vLLM does: a request that is preempted late could never be computed again."""
    with pytest.raises(InputError, match="instance 0: --max-num-batched-tokens: 9 is not allowed without"):
        run([toy_instance(**preempted(9))], *burst(2, 8, 16))
    log = run([toy_instance(**preempted(28), max_model_len=28)], *burst(2, 8, 16))
    assert len(log.requests) == 2
    assert sum(log.instances[0].steps.preempted) > 0


# ------------------------------------------------------------------ crashes


def test_a_full_decode_instance_lets_requests_queue() -> None:
    """The other simulator ends with an error when the decode side has no memory left."""
    sides = [toy_instance(pd_type="prefill"), toy_instance(pd_type="decode", num_gpu_blocks=9, block_size=16)]
    log = run(sides, *burst(6, prompt=90, output=30))  # 8 usable blocks hold one request of 119 tokens
    assert [r.request for r in log.requests] == list(range(6))
    assert max(log.instances[1].steps.running) == 1
    for before, after in zip(log.requests, log.requests[1:], strict=False):
        assert after.first_token_ns > before.end_ns


def test_a_decode_instance_too_small_for_a_request_rejects_it() -> None:
    sides = [toy_instance(pd_type="prefill"), toy_instance(pd_type="decode", num_gpu_blocks=9, block_size=16)]
    log = run(sides, Request(0, 90, 40, 0), Request(1, 90, 30, 0))
    assert [r.request for r in log.requests] == [1]
    assert log.rejected[0].reason == "its KV cache takes 9 blocks, and there are 8"


def test_a_workload_is_found_by_its_absolute_path(toys: Path) -> None:
    path = toys / "somewhere" / "w.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"input_toks": 20, "output_toks": 2, "arrival_time_ns": 0}))
    assert len(simulate(toy_cluster([toy_instance()]), path.resolve()).requests) == 1


# ------------------------------------------------------------------ options without effect, wrong figures


@pytest.mark.parametrize("pp", [1, 2])
def test_skip_prefill_computes_no_prompt_on_any_instance(pp: int) -> None:
    instances = [toy_instance(pp_size=pp), toy_instance(pp_size=pp)]
    log = run(instances, *burst(4, prompt=200, output=5), skip_prefill=True)
    assert sum(sum(i.steps.prefill_tokens) for i in log.instances) == 0
    assert sum(sum(i.steps.decode_tokens) for i in log.instances) == 4 * 5
    usual = run(instances, *burst(4, prompt=200, output=5))
    assert sum(sum(i.steps.prefill_tokens) for i in usual.instances) == 4 * 200
    assert usual.requests[0].first_token_ns > log.requests[0].first_token_ns


def test_the_queuing_delay_is_that_of_the_first_chunk() -> None:
    instances = [toy_instance(pp_size=2, max_num_batched_tokens=64, max_num_seqs=64)]
    log = run(instances, Request(0, 500, 2, 7))
    assert len([t for t in log.instances[0].steps.prefill_tokens if t]) == 8
    assert log.requests[0].scheduled_ns == 7


# ------------------------------------------------------------------ work that nobody asked for


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Instance -> how often its loop was run."""
    counts: dict[int, int] = {}
    act = StepLoop.act

    def count(loop: StepLoop, now_ns: int) -> None:
        counts[loop.index] = counts.get(loop.index, 0) + 1
        act(loop, now_ns)

    monkeypatch.setattr(StepLoop, "act", count)
    return counts


def test_idle_instances_are_left_alone(acted: dict[int, int]) -> None:
    """The other simulator polls its idle NPUs hundreds of times for every batch."""
    log = run([toy_instance() for _ in range(50)], *burst(3, 50, 400, every_ns=MS))
    assert set(acted) == {0, 1, 2}
    steps = sum(len(i.steps) for i in log.instances)
    assert sum(acted.values()) < steps / 20  # most steps are jumped over


@pytest.mark.parametrize("roles", [(None,) * 4, ("prefill", "decode", "decode", "decode")])
@pytest.mark.parametrize("pp", [1, 2])
def test_a_loop_runs_for_its_own_steps_and_arrivals_only(
    acted: dict[int, int], roles: tuple[str | None, ...], pp: int
) -> None:
    requests = burst(30, 50, 20, every_ns=MS)
    log = run([toy_instance(pd_type=role, pp_size=pp) for role in roles], *requests, stepped=True)
    for instance in log.instances:
        arrived = sum(instance.index in (r.instance, r.decode_instance) for r in log.requests)
        assert acted.get(instance.index, 0) <= len(instance.steps) + 2 * arrived


def test_a_run_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other simulator starts one for every step."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run starts a process")

    for owner, name in (
        (subprocess, "Popen"),
        (os, "fork"),
        (os, "posix_spawn"),
        (os, "system"),
        (multiprocessing.Process, "start"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    sides = [toy_instance(MOE, pp_size=2), toy_instance()]
    assert len(run(sides, *burst(4, 50, 20)).requests) == 4


# ------------------------------------------------------------------ runs that cannot go on


def preempted(budget: int) -> dict[str, Any]:
    """An instance whose second request is preempted and then has more tokens than a step may have."""
    return {
        "num_gpu_blocks": 8,
        "block_size": 4,
        "max_num_batched_tokens": budget,
        "max_num_seqs": budget,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }


@pytest.fixture
def any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check at the start, so that the guard behind it has something to find."""
    monkeypatch.setattr("servesim.memory.start_up.check_budget", lambda *_: None)


STUCK = "cannot go on: requests 1 wait, nothing runs, and the first of them"


@pytest.mark.usefixtures("any_budget")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_a_stuck_request_is_named(pp: int, asynchronous: bool) -> None:
    instance = toy_instance(pp_size=pp, async_scheduling=asynchronous, **preempted(9))
    with pytest.raises(RunError, match=f"instance 0 {STUCK}"):
        run([instance], *burst(2, 8, 16))


@pytest.mark.usefixtures("any_budget")
def test_a_stuck_member_is_named_once_others_are_done() -> None:
    group = [toy_instance(MOE, dp_group="A"), toy_instance(MOE, dp_group="A", **preempted(9))]
    requests = [Request(0, 8, 16, 0), Request(1, 8, 16, 0), Request(2, 8, 500, 0)]
    with pytest.raises(RunError, match="instance 1 cannot go on: requests 1 wait"):
        run(group, *requests, request_routing_policy="tests.engine.test_known_failures:third_first")


def third_first(request: Request, candidates: Any) -> Any:
    """Request 2 to the first instance, the others to the second."""
    return candidates[request.index != 2]


@pytest.mark.usefixtures("any_budget")
def test_a_request_stuck_on_the_decode_side_is_named() -> None:
    sides = [toy_instance(pd_type="prefill"), toy_instance(pd_type="decode", **preempted(9))]
    with pytest.raises(RunError, match=f"instance 1 {STUCK}"):
        run(sides, *burst(2, 8, 16))


@pytest.mark.usefixtures("any_budget")
def test_many_stuck_requests_are_counted() -> None:
    with pytest.raises(RunError) as error:
        run([toy_instance(**preempted(9))], *burst(9, 8, 16))
    assert "requests 1, 2, 3, 4, 5 and 3 more wait" in str(error.value)
    assert "raise --max-num-batched-tokens or allow chunked prefill" in str(error.value)


@pytest.mark.pure
def test_a_lost_block_ends_the_run_and_saves_its_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cluster = load_cluster(toy_cluster([toy_instance(num_gpu_blocks=10, block_size=4)]))
    with monkeypatch.context() as broken:
        broken.setattr(BlockPool, "free", lambda *_: None)
        with pytest.raises(BrokenRunError, match="KV blocks of instance 0 do not add up") as error:
            simulate(cluster, Workload(burst(1, 8, 4), "w"), seed=7)
    (folder,) = re.findall(r"the input in (\S+)", str(error.value))
    assert json.loads((Path(folder) / "options.json").read_text()) == {"seed": 7}
    with chdir(folder):
        again = load_cluster("cluster.json"), load_workload("workload.jsonl.gz")
    assert again[0].model_dump() == cluster.model_dump()
    assert [(r.input_tokens, r.output_tokens) for r in again[1]] == [(8, 4)]


@pytest.mark.parametrize("arrival_ns", [2**62 - 500, 2**62 + 500])
def test_a_time_that_does_not_fit_64_bits_is_named(arrival_ns: int) -> None:
    workload = Workload([Request(0, 8, 4, arrival_ns)], "w")
    with pytest.raises(RunError, match="146 years"):
        simulate(load_cluster(toy_cluster([toy_instance()])), workload)


def test_what_gets_lost_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HandOver, "step_started", lambda *_: None)  # KV that never leaves
    with pytest.raises(RunError, match="nothing is left to do, but requests 0, 1 have not ended"):
        run([toy_instance(pd_type=role) for role in ("prefill", "decode")], *burst(2, 8, 4))


def test_a_circle_of_preemptions_ends_the_run() -> None:
    """Two prompts of one priority, each too large beside the other: neither is ever whole, in vLLM either."""
    with pytest.raises(RunError, match="in a circle"):
        run(
            [toy_instance(num_gpu_blocks=15)],
            *burst(2, 190, 2),
            scheduling_policy="priority",
            long_prefill_token_threshold=8,
            reserve_full_isl=False,
            enable_prefix_caching=False,
        )
