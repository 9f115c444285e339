"""The recorder's own logic, with a hand-made scheduler in the place of vLLM's; and what it refuses."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from servesim.bench import vllm_scheduler
from servesim.bench.record_scheduler import PRIVATE_TOKEN, Recorder, record_scheduler
from servesim.bench.step_formula import StepFormula
from servesim.bench.vllm_scheduler import SchedulerSettings, _undo_platform, check_scheduler
from servesim.engine.speculation import DrawnAcceptance
from servesim.errors import InputError, MissingFileError, RunError
from servesim.workload.request import Request, Workload

SIMPLE = StepFormula(base_ns=100, per_token_ns=1, per_sequence_ns=10)


class EasyScheduler:
    """A stand-in for vLLM's scheduler: everything waiting runs at once, whole prompts, no memory to run out
    of."""

    def __init__(self, asynchronous: bool) -> None:
        self.requests: dict[str, Any] = {}
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.asynchronous = asynchronous
        self.tokens: dict[str, list[int]] = {}
        pool = SimpleNamespace(get_num_free_blocks=lambda: 7)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    has_requests = has_unfinished_requests

    def take_victims(self) -> list[int]:
        return []

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> Any:
        admitted, self.waiting = self.waiting, []
        self.running += admitted
        scheduled = {}
        for request in self.running:
            wanted = request.prompt + request.scheduled - request.num_computed_tokens
            if wanted and request.scheduled < request.output:
                scheduled[request.request_id] = wanted
                request.num_computed_tokens += wanted
                request.scheduled += 1
        return SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_spec_decode_tokens={},
            preempted_req_ids=set(),
            scheduled_new_reqs=[SimpleNamespace(req_id=request.request_id) for request in admitted],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        )

    def update_from_output(self, output: Any, sampled: Any) -> dict[int, Any]:
        outputs = []
        for name in output.num_scheduled_tokens:
            request = self.requests[name]
            received = self.tokens.setdefault(name, [])
            tokens = sampled.sampled_token_ids[sampled.req_id_to_index[name]]
            received += tokens
            finished = len(received) == request.output
            if finished:
                self.running.remove(request)
            reason = "length" if finished else None
            outputs.append(SimpleNamespace(request_id=name, finish_reason=reason, new_token_ids=tokens))
        return {0: SimpleNamespace(outputs=outputs)}


def easy_recorder(requests: list[Request], asynchronous: bool) -> Recorder:
    def new_request(request: Request, prompt_ids: list[int], arrival_ns: int) -> Any:
        assert arrival_ns == request.arrival_ns or request.predecessor >= 0
        return SimpleNamespace(
            request_id=str(request.index),
            ids=prompt_ids,
            prompt=len(prompt_ids),
            output=request.output_tokens,
            scheduled=0,
            num_computed_tokens=0,
            is_prefill_chunk=False,
        )

    settings = SchedulerSettings(num_gpu_blocks=8, async_scheduling=asynchronous)
    scheduler = EasyScheduler(asynchronous)
    return Recorder(Workload(requests), settings, SIMPLE, scheduler, new_request, SimpleNamespace)


def test_an_arrival_during_a_step_is_taken_in_when_the_step_ends() -> None:
    # Request 0: a step of 100 + 5 + 10 = 115 ns, then decodes of 111 ns. Request 1 comes at 50.
    log = easy_recorder([Request(0, 5, 3, 0), Request(1, 4, 1, 50)], asynchronous=False).run()
    assert [(step.start, step.end, step.sched) for step in log.steps] == [
        (0, 115, {0: 5}),
        (115, 240, {0: 1, 1: 4}),
        (240, 351, {0: 1}),
    ]
    second = log.requests[1]
    assert (second.arrival, second.queued, second.scheduled, second.first, second.end) == (
        50,
        115,
        115,
        240,
        240,
    )
    assert [step.finished for step in log.steps] == [[], [1], [0]]


def test_asynchronous_scheduling_is_one_step_ahead() -> None:
    # At 0 the prompt and, at once, the first decode are scheduled. Request 1 is seen at 115, after both.
    log = easy_recorder([Request(0, 5, 3, 0), Request(1, 4, 1, 50)], asynchronous=True).run()
    assert [(step.start, step.end, step.sched) for step in log.steps] == [
        (0, 115, {0: 5}),
        (115, 226, {0: 1}),
        (226, 351, {0: 1, 1: 4}),
    ]
    assert (log.requests[1].queued, log.requests[1].scheduled, log.requests[1].first) == (115, 115, 351)


def test_an_idle_engine_takes_a_request_when_it_arrives() -> None:
    log = easy_recorder([Request(0, 1, 1, 1000)], asynchronous=True).run()
    assert (log.steps[0].start, log.steps[0].end, log.requests[0].queued) == (1000, 1111, 1000)


@pytest.mark.parametrize(("tool_ns", "queued"), [(0, 115), (5, 120)])
def test_a_follow_up_is_released_when_its_predecessor_has_ended(tool_ns: int, queued: int) -> None:
    requests = [Request(0, 5, 1, 0), Request(1, 2, 1, 0, predecessor=0, tool_ns=tool_ns)]
    log = easy_recorder(requests, asynchronous=False).run()
    assert (log.requests[1].arrival, log.requests[1].queued) == (115 + tool_ns, queued)


def test_a_follow_up_misses_its_predecessors_boundary() -> None:
    requests = [Request(0, 5, 1, 0), Request(1, 5, 2, 0), Request(2, 1, 1, 0, predecessor=0, tool_ns=0)]
    log = easy_recorder(requests, asynchronous=False).run()
    # Both run 0..130; request 1 goes on 130..241 while request 2, released at 130, is not there yet.
    assert [step.end for step in log.steps] == [130, 241, 352]
    assert (log.requests[2].arrival, log.requests[2].queued) == (130, 241)


def test_tokens_are_those_of_the_workload_and_private_without() -> None:
    with_ids = Request(0, 2, 2, 0, input_ids=np.array([3, 4]), output_ids=np.array([8, 9]))
    recorder = easy_recorder([with_ids, Request(1, 2, 1, 0)], asynchronous=True)
    recorder.run()
    assert recorder.scheduler.requests["0"].ids == [3, 4]
    assert recorder.scheduler.tokens["0"] == [8, 9]
    assert recorder.scheduler.requests["1"].ids == [PRIVATE_TOKEN + 1] * 2
    assert recorder.scheduler.tokens["1"] == [PRIVATE_TOKEN + 1]


def test_tokens_come_with_the_drafts_that_are_accepted() -> None:
    request = Request(0, 2, 4, 0, input_ids=np.array([3, 4]), output_ids=np.array([8, 9, 7, 5]))
    recorder = easy_recorder([request], asynchronous=False)
    recorder.acceptance = DrawnAcceptance((1.0, 1.0, 0.0))
    recorder.produced[0] = 1
    assert recorder._next_tokens(0, 0) == [9]
    assert recorder._next_tokens(0, 3) == [9, 7, 5]
    assert recorder._next_tokens(0, 1) == [9, 7]
    recorder.produced[0] = 3
    assert recorder._next_tokens(0, 3) == [5, PRIVATE_TOKEN, PRIVATE_TOKEN]


def test_a_request_that_never_fits_is_refused_before_anything_runs() -> None:
    workload = Workload([Request(0, 60, 5, 0)])
    with pytest.raises(InputError, match=r"needs 4 blocks of 16"):  # 64 tokens of KV
        record_scheduler(workload, SchedulerSettings(num_gpu_blocks=4), SIMPLE)
    with pytest.raises(InputError, match="max_model_len is 60"):
        record_scheduler(workload, SchedulerSettings(num_gpu_blocks=99, max_model_len=60), SIMPLE)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_message_says_what_to_install() -> None:
    with pytest.raises(MissingFileError, match="pip install vllm"):
        record_scheduler(Workload([Request(0, 4, 1, 0)]), SchedulerSettings(num_gpu_blocks=9), SIMPLE)


class Scheduler:
    """As much of vLLM's scheduler as :func:`check_scheduler` looks at."""

    def __init__(self, settings: SchedulerSettings, **changes: Any) -> None:
        values = {
            **asdict(settings),
            "scheduler_reserve_full_isl": settings.reserve_full_isl,
            "policy": settings.scheduling_policy,
            **changes,
        }
        part = SimpleNamespace(**values)
        depth = 1 + isinstance(self, AsyncScheduler)
        self.vllm_config = SimpleNamespace(
            scheduler_config=part, cache_config=part, max_concurrent_batches=depth
        )


class AsyncScheduler(Scheduler):
    """vLLM's other one is derived from it too."""


def test_the_scheduler_asked_for_is_recorded_or_none() -> None:
    settings = SchedulerSettings(num_gpu_blocks=9, max_model_len=32)
    check_scheduler(AsyncScheduler(settings), settings)
    with pytest.raises(RunError, match="vLLM built its Scheduler where AsyncScheduler was asked for"):
        check_scheduler(Scheduler(settings), settings)
    with pytest.raises(RunError, match="works with block_size 128 where 16 was asked for"):
        check_scheduler(AsyncScheduler(settings, block_size=128), settings)
    with pytest.raises(RunError, match="vLLM keeps 2 batches in flight where 5 were expected"):
        check_scheduler(AsyncScheduler(settings), replace(settings, pipeline_parallel_size=4))
    settings = replace(settings, async_scheduling=False)
    check_scheduler(Scheduler(settings), settings)
    with pytest.raises(RunError, match="vLLM built its AsyncScheduler where Scheduler was asked for"):
        check_scheduler(AsyncScheduler(settings), settings)


@pytest.mark.parametrize("users", [None, "0"])
@pytest.mark.parametrize(("stages", "asked"), [(1, False), (2, True)])
def test_the_model_runner_is_asked_for_in_pipelines_alone(
    stages: int, asked: bool, users: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM reads of the environment, and what is in it afterwards."""
    name, seen = "VLLM_USE_V2_MODEL_RUNNER", []
    monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(name, users)
    for function in ("_vllm_config", "_scheduler_of"):
        monkeypatch.setattr(vllm_scheduler, function, lambda *_: seen.append(os.environ.get(name)))
    for function in ("_undo_platform", "check_scheduler"):
        monkeypatch.setattr(vllm_scheduler, function, lambda *_: None)
    settings = SchedulerSettings(num_gpu_blocks=9, max_model_len=32, pipeline_parallel_size=stages)
    vllm_scheduler.build_scheduler(settings)
    assert seen == ([None, "1"] if asked else [users, users])
    assert os.environ.get(name) == users


def test_what_the_platform_changes_is_set_again() -> None:
    settings = SchedulerSettings(num_gpu_blocks=9, max_model_len=32)
    made = AsyncScheduler(settings, async_scheduling=False, block_size=128, enable_chunked_prefill=False)
    _undo_platform(made.vllm_config, settings)
    check_scheduler(made, settings)
