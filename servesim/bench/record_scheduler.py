"""Log every decision of vLLM's own scheduler over a workload, without a GPU and without a model.

The scheduler, its KV cache manager and its request objects are vLLM's (imported when a recording starts, vLLM
must be installed); this module plays the engine around them: it hands requests over when they arrive, takes
the time of a step from a formula, and returns one token per request whose known tokens are all computed. The
result is what any simulator of that scheduler must reproduce, see :mod:`servesim.bench.scheduler_log`.

The loop is the one of vLLM's engine core (``EngineCore.step`` and ``EngineCore.step_with_batch_queue``):
requests are taken in between steps only; with asynchronous scheduling a second batch is scheduled while the
first one runs, and from then on every batch is scheduled right after the output of the one before the running
one was processed.
"""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import deque
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.bench.scheduler_log import LoggedRequest, LoggedStep, SchedulerLog
from servesim.bench.step_formula import StepFormula
from servesim.errors import InputError, MissingFileError, RunError
from servesim.slotted import dataclass
from servesim.workload.hashes import answer_ids, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servesim.workload.request import Request, Workload

_PLACES = {
    "scheduler_config": (
        *("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "max_model_len"),
        *("enable_chunked_prefill", "reserve_full_isl", "async_scheduling", "scheduling_policy"),
    ),
    "cache_config": ("num_gpu_blocks", "block_size", "enable_prefix_caching"),
}
"""Part of vLLM's configuration -> the settings that are in it."""
_VLLM_NAMES = {"reserve_full_isl": "scheduler_reserve_full_isl", "scheduling_policy": "policy"}
PRIVATE_TOKEN = 1 << 40
"""Token ids from here on belong to one request each: the content of requests that come without ids."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the scheduler is configured with; the names are those of the run options."""

    num_gpu_blocks: int
    """KV blocks, the null block included: one less can be used."""
    block_size: int = 16
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    max_model_len: int = 0
    """Longest sequence; 0: the longest of the workload."""
    enable_chunked_prefill: bool = True
    reserve_full_isl: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    scheduling_policy: str = "fcfs"


@dataclass(slots=True)
class _Batch:
    """A scheduled batch, from its scheduling to the processing of its output."""

    output: Any
    """vLLM's SchedulerOutput."""
    step: LoggedStep
    sampled: set[str]
    """Requests that get a token from this batch."""


@dataclass(slots=True)
class Recorder:
    """vLLM's scheduler, a clock, and the log under construction."""

    workload: Workload
    settings: SchedulerSettings
    formula: StepFormula
    scheduler: Any
    new_request: Any
    """Callable (request, prompt ids, arrival in ns) -> vLLM's Request."""
    runner_output: Any
    """vLLM's ModelRunnerOutput class."""
    log: SchedulerLog = field(default_factory=SchedulerLog)
    now: int = 0
    arrivals: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (release time, request index)."""
    in_flight: deque[_Batch] = field(default_factory=deque)
    records: dict[int, LoggedRequest] = field(default_factory=dict)
    produced: dict[int, int] = field(default_factory=dict)
    """Tokens each request has received."""
    answers: dict[int, NDArray[np.int64] | None] = field(default_factory=dict)
    """Token ids of the answers begun so far, as far as they are known."""
    preempted: list[int] = field(default_factory=list)
    """Preempted by schedules that came out empty; they are logged with the next step."""
    successors: dict[int, list[Request]] = field(default_factory=dict)
    released: list[tuple[int, int]] = field(default_factory=list)
    """Follow-ups of requests that ended at this boundary. They are not handed over before the next one, even
    without any tool time: a client has to read the answer first."""
    last_end: int = 0

    @property
    def depth(self) -> int:
        """Most batches in flight."""
        return 2 if self.settings.async_scheduling else 1

    def run(self) -> SchedulerLog:
        """Play the whole workload and return the log."""
        for request in self.workload:
            if request.predecessor >= 0:
                self.successors.setdefault(request.predecessor, []).append(request)
            else:
                self.arrivals.append((request.arrival_ns, request.index))
        heapq.heapify(self.arrivals)
        depth = self.depth
        while True:
            self._take_arrivals()
            if self.scheduler.has_unfinished_requests():
                batch = self._schedule()
                if batch is not None:
                    self.in_flight.append(batch)
                    if len(self.in_flight) < depth:
                        continue
            for follow_up in self.released:
                heapq.heappush(self.arrivals, follow_up)
            self.released.clear()
            if self.in_flight:
                self._finish_oldest()
            elif self.arrivals:
                self.now = max(self.now, self.arrivals[0][0])
            elif self.scheduler.has_unfinished_requests():
                raise RunError(f"vLLM's scheduler makes no progress at {self.now} ns with nothing in flight")
            else:
                break
        self.log.requests = [self.records[index] for index in sorted(self.records)]
        return self.log

    def _take_arrivals(self) -> None:
        """Hand over every request released by now, in order of (release time, index)."""
        while self.arrivals and self.arrivals[0][0] <= self.now:
            arrival_ns, index = heapq.heappop(self.arrivals)
            request = self.workload.requests[index]
            self.records[index] = LoggedRequest(index, arrival_ns, self.now, -1, -1, -1, 0)
            self.produced[index] = 0
            known = prompt_ids(request)
            ids = [PRIVATE_TOKEN + index] * request.input_tokens if known is None else known.tolist()
            self.scheduler.add_request(self.new_request(request, ids, arrival_ns))

    def _schedule(self) -> _Batch | None:
        """One call of schedule(); None when it scheduled no token."""
        output = self.scheduler.schedule()
        self.preempted += self._newly_preempted(output)
        tokens: dict[str, int] = dict(output.num_scheduled_tokens)
        if not tokens:
            return None
        requests = {name: self.scheduler.requests[name] for name in tokens}
        context = sum(requests[name].num_computed_tokens - count for name, count in tokens.items())
        admitted = {data.req_id for data in output.scheduled_new_reqs}
        admitted |= set(output.scheduled_cached_reqs.resumed_req_ids)
        start = max(self.now, self.last_end)
        self.last_end = start + self.formula.step_ns(sum(tokens.values()), len(tokens), context)
        step = LoggedStep(
            start=start,
            end=self.last_end,
            sched={int(name): count for name, count in tokens.items()},
            preempted=self.preempted,
            free=self._free_blocks(),
            hits={
                int(name): requests[name].num_computed_tokens - count
                for name, count in tokens.items()
                if name in admitted
            },
        )
        self.preempted = []
        for index, hit in step.hits.items():
            if self.records[index].scheduled < 0:
                self.records[index].scheduled = self.now
                self.records[index].hit = hit
        # The scheduler marks a request whose step leaves tokens to compute; all others are sampled from.
        sampled = {name for name, request in requests.items() if not request.is_prefill_chunk}
        return _Batch(output, step, sampled)

    def _newly_preempted(self, output: Any) -> list[int]:
        """Requests preempted by this schedule, in the order in which it happened."""
        victims: list[int] = self.scheduler.take_victims()
        names = {int(name) for name in output.preempted_req_ids or ()}
        if set(victims) != names:
            raise RunError(f"vLLM says that it preempted {sorted(names)}, but it preempted {victims}")
        for index in victims:
            self.records[index].preemptions += 1
        return victims

    def _finish_oldest(self) -> None:
        """Wait for the oldest batch in flight and give its tokens to the scheduler."""
        batch = self.in_flight.popleft()
        self.now = batch.step.end
        names = list(batch.output.num_scheduled_tokens)
        sampled = [[self._next_token(int(name))] if name in batch.sampled else [] for name in names]
        outputs = self.scheduler.update_from_output(
            batch.output,
            self.runner_output(
                req_ids=names,
                req_id_to_index={name: position for position, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for client in outputs.values():
            for output in client.outputs:
                self._note_token(int(output.request_id), output.finish_reason is not None, batch.step)
        batch.step.free_after = self._free_blocks()
        self.log.steps.append(batch.step)

    def _next_token(self, index: int) -> int:
        if index not in self.answers:
            self.answers[index] = answer_ids(self.workload.requests[index])
        known = self.answers[index]
        return PRIVATE_TOKEN + index if known is None else int(known[self.produced[index]])

    def _note_token(self, index: int, finished: bool, step: LoggedStep) -> None:
        """Bookkeeping of one token that came with ``step``; releases follow-ups of a request that ended."""
        self.produced[index] += 1
        record = self.records[index]
        if record.first < 0:
            record.first = step.end
        if finished:
            record.end = step.end
            step.finished.append(index)
            for successor in self.successors.get(index, ()):
                self.released.append((step.end + successor.tool_ns, successor.index))

    def _free_blocks(self) -> int:
        free: int = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return free


def record_scheduler(
    workload: Workload,
    settings: SchedulerSettings,
    formula: StepFormula,
    recorder_class: type[Recorder] = Recorder,
) -> SchedulerLog:
    """Drive vLLM's scheduler over ``workload`` and return its log.

    Raises InputError when vLLM could not serve the workload with these settings (its own refusals included)
    and MissingFileError when vLLM is not installed.
    """
    settings = _resolved(workload, settings)
    try:
        recorder, version = _build_recorder(workload, settings, formula, recorder_class)
    except ImportError as error:
        raise MissingFileError(
            f"recording needs vLLM's scheduler, but importing it failed: {error}. Install vLLM next to "
            "servesim, for example `pip install vllm==0.33.0`; no GPU is needed"
        ) from error
    except ValueError as error:  # pydantic's ValidationError is one
        reasons = (
            "; ".join(str(item["msg"]) for item in error.errors()) if hasattr(error, "errors") else error
        )
        raise InputError(f"vLLM refuses these settings: {reasons}") from error
    recorder.log.header = {
        "vllm": version,
        "scheduler": type(recorder.scheduler).__name__,
        "settings": asdict(settings),
        "formula": formula.as_dict(),
        "source": workload.source,
    }
    return recorder.run()


def _resolved(workload: Workload, settings: SchedulerSettings) -> SchedulerSettings:
    """The settings with ``max_model_len`` filled in; refuses workloads that could never finish."""
    longest = max((r.input_tokens + r.output_tokens for r in workload), default=1)
    resolved = SchedulerSettings(**{**asdict(settings), "max_model_len": settings.max_model_len or longest})
    if longest > resolved.max_model_len:
        raise InputError(
            f"max_model_len is {resolved.max_model_len}, but the longest request has {longest} tokens"
        )
    # A request's last token is never fed back, so its KV takes one token less than it is long.
    blocks = -(-(longest - 1) // settings.block_size)
    if blocks > settings.num_gpu_blocks - 1:
        raise InputError(
            f"num_gpu_blocks is {settings.num_gpu_blocks} ({settings.num_gpu_blocks - 1} usable), but the "
            f"longest request needs {blocks} blocks of {settings.block_size} tokens"
        )
    return resolved


def _build_recorder(
    workload: Workload, settings: SchedulerSettings, formula: StepFormula, recorder_class: type[Recorder]
) -> tuple[Recorder, str]:
    """Import vLLM, build its scheduler, and wrap it; also returns vLLM's version."""
    import os

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request as VllmRequest

    scheduler = _build_scheduler(settings)
    hasher = None
    if settings.enable_prefix_caching:
        init_none_hash(sha256)
        hasher = get_request_block_hasher(settings.block_size, sha256)

    def new_request(request: Request, prompt_ids: list[int], arrival_ns: int) -> Any:
        return VllmRequest(
            # vLLM orders names as texts where priority and arrival are equal; noughts make that our order
            request_id=f"{request.index:09d}",
            prompt_token_ids=prompt_ids,
            sampling_params=SamplingParams(max_tokens=request.output_tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=arrival_ns,
            priority=request.priority,
            block_hasher=hasher,
        )

    recorder = recorder_class(workload, settings, formula, scheduler, new_request, ModelRunnerOutput)
    return recorder, str(vllm.__version__)


def _build_scheduler(settings: SchedulerSettings) -> Any:
    """vLLM's scheduler for a model of one attention layer; the model's size does not matter to it."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    with tempfile.TemporaryDirectory() as folder:
        _write_tiny_model(Path(folder), settings.max_model_len)
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=settings.max_model_len
        )
    scheduling = SchedulerConfig(
        max_model_len=settings.max_model_len,
        is_encoder_decoder=False,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        scheduler_reserve_full_isl=settings.reserve_full_isl,
        async_scheduling=settings.async_scheduling,
        policy=settings.scheduling_policy,
    )
    cache = CacheConfig(block_size=settings.block_size, enable_prefix_caching=settings.enable_prefix_caching)
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduling,
        cache_config=cache,
        device_config=DeviceConfig(device="cpu"),
    )
    cache.num_gpu_blocks = settings.num_gpu_blocks
    _undo_platform(config, settings)
    layer = FullAttentionSpec(
        block_size=settings.block_size, num_kv_heads=1, head_size=1, dtype=torch.bfloat16
    )
    scheduler = _scheduler_class(settings.async_scheduling)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=settings.num_gpu_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["attention"], layer)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=settings.block_size,
    )
    check_scheduler(scheduler, settings)
    return scheduler


def _scheduler_class(asynchronous: bool) -> Any:
    """vLLM's scheduler class, by the setting and not by what the platform has made of it.

    It also takes down whom it preempts: vLLM itself only tells the set.
    """
    if asynchronous:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base

    class Noting(Base):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self._victims: list[int] = []
            super().__init__(**arguments)

        def _preempt_request(self, request: Any, *arguments: Any, **more: Any) -> None:
            self._victims.append(int(request.request_id))
            super()._preempt_request(request, *arguments, **more)

        def take_victims(self) -> list[int]:
            victims, self._victims = self._victims, []
            return victims

    return type(Base.__name__, (Noting,), {})


def _undo_platform(config: Any, settings: SchedulerSettings) -> None:
    """Set again what vLLM's CPU platform changes: without a GPU it switches asynchronous scheduling off."""
    for part, names in _PLACES.items():
        for name in names:
            setattr(getattr(config, part), _VLLM_NAMES.get(name, name), getattr(settings, name))


def check_scheduler(scheduler: Any, settings: SchedulerSettings) -> None:
    """Refuse a scheduler that is not the one asked for: its log would be of another one.

    Raises:
        RunError: it is of the other class, or works with other settings.
    """
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    wanted = "AsyncScheduler" if settings.async_scheduling else "Scheduler"
    if wanted not in names or ("AsyncScheduler" in names) != settings.async_scheduling:
        raise RunError(f"vLLM built its {names[0]} where {wanted} was asked for; nothing is recorded")
    for part, fields in _PLACES.items():
        for name in fields:
            theirs = getattr(getattr(scheduler.vllm_config, part), _VLLM_NAMES.get(name, name))
            if theirs != getattr(settings, name):
                raise RunError(
                    f"vLLM's scheduler works with {name} {theirs!r} where {getattr(settings, name)!r} was "
                    "asked for; nothing is recorded"
                )


def _write_tiny_model(folder: Path, max_model_len: int) -> None:
    """A config.json that vLLM accepts; no weights are ever read."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
