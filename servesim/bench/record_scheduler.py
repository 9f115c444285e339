"""Log every decision of vLLM's own scheduler over a workload, without a GPU and without a model.

The scheduler, its KV cache manager and its request objects are vLLM's (imported when a recording starts, vLLM
must be installed); this module plays the engine around them: it hands requests over when they arrive, takes
the time of a step from a formula, and returns one token per request whose known tokens are all computed. The
result is what any simulator of that scheduler must reproduce, see :mod:`servesim.bench.scheduler_log`.

The loop is the one of vLLM's engine core (``EngineCore.step`` and ``EngineCore.step_with_batch_queue``):
requests are taken in between steps only; batches are scheduled until as many are in flight as vLLM allows,
and from then on one whenever the oldest has ended. An empty schedule takes a place in that queue too, until
those before it have ended: in a pipeline that decides when the next one comes. The pauses of a millisecond
that vLLM makes after an empty schedule are left out.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import asdict, field, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from servesim.bench.scheduler_log import LoggedRequest, LoggedStep, SchedulerLog
from servesim.bench.step_formula import StepFormula
from servesim.bench.vllm_scheduler import SchedulerSettings, build_scheduler
from servesim.engine.speculation import DrawnAcceptance
from servesim.errors import InputError, MissingFileError, RunError
from servesim.memory.kv_groups import KvGroup, KvPlan
from servesim.slotted import dataclass
from servesim.workload.hashes import answer_ids, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servesim.workload.request import Request, Workload

_MOST_FRUITLESS = 3
"""Steps without a token, for every token of the workload, after which a recording is given up: a step
computes a token at least, so that without preemptions there are fewer."""
_STOP_TOKEN = 1 << 60
PRIVATE_TOKEN = 1 << 40
"""Token ids from here on belong to one request each: the content of requests that come without ids."""


@dataclass(slots=True)
class _Batch:
    """A scheduled batch, from its scheduling to the processing of its output."""

    output: Any
    """vLLM's SchedulerOutput."""
    step: LoggedStep
    sampled: set[str]
    """Requests that get a token from this batch."""
    drafts: dict[str, int]
    """Request -> drafts that it verifies, without those that only fill it up."""
    called: int
    """Number of the call that scheduled it."""


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
    in_flight: deque[_Batch | None] = field(default_factory=deque)
    """Oldest first; None: an empty schedule."""
    calls: int = 0
    """Calls of the scheduler, as its ``current_step`` counts them."""
    stage_ends: list[int] = field(default_factory=list)
    """Until when the stages of a pipeline are taken."""
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
    acceptance: DrawnAcceptance | None = None
    """How drafts fare, None without."""
    fruitless: int = 0
    """Steps since the last that produced a token."""
    patience: int = 0
    """Most of them before the recording is given up."""

    @property
    def depth(self) -> int:
        """Most batches in flight."""
        return self.settings.batches_in_flight

    def run(self) -> SchedulerLog:
        """Play the whole workload and return the log."""
        for request in self.workload:
            if request.predecessor >= 0:
                self.successors.setdefault(request.predecessor, []).append(request)
            else:
                self.arrivals.append((request.arrival_ns, request.index))
        heapq.heapify(self.arrivals)
        tokens = sum(request.input_tokens + request.output_tokens for request in self.workload)
        idle, self.patience = 0, _MOST_FRUITLESS * tokens
        while True:
            self._take_arrivals()
            self._take_loads()
            if self.scheduler.has_requests():
                before = len(self.preempted)
                batch = self._schedule()
                self.in_flight.append(batch)
                # blocks may be free now, which an empty schedule after it would find
                idle = idle + 1 if batch is None and len(self.preempted) == before else 0
                if len(self.in_flight) < self.depth and (batch or self.scheduler.has_requests()):
                    continue
            if self.in_flight and (any(self.in_flight) or idle <= 2 * self.depth):
                oldest = self.in_flight.popleft()
                if oldest is not None:
                    self._release()
                    self._finish(oldest)
                continue
            self.in_flight.clear()
            self._release()
            ends = self.scheduler.connector.ends.values() if self.settings.kv_loads else ()
            if self.arrivals or ends:
                self.now = max(self.now, min([*ends, *(at for at, _ in self.arrivals[:1])]))
            elif self.scheduler.has_unfinished_requests():
                raise RunError(f"vLLM's scheduler makes no progress at {self.now} ns with nothing in flight")
            else:
                break
            idle = 0
        self.log.requests = [self.records[index] for index in sorted(self.records)]
        return self.log

    def _release(self) -> None:
        """Let follow-ups arrive that were released at this boundary."""
        for follow_up in self.released:
            heapq.heappush(self.arrivals, follow_up)
        self.released.clear()

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

    def _take_loads(self) -> None:
        """Tell the scheduler what a KV connector has read by now.

        vLLM's worker says it in the output of a step, also of one that computes nothing.
        """
        if not self.settings.kv_loads:
            return
        from vllm.v1.core.sched.output import SchedulerOutput
        from vllm.v1.outputs import KVConnectorOutput

        connector = self.scheduler.connector
        ended = connector.take_ended(self.now)
        if ended:
            output = self.runner_output(
                req_ids=[],
                req_id_to_index={},
                kv_connector_output=KVConnectorOutput(finished_recving=ended),
            )
            self.scheduler.update_from_output(SchedulerOutput.make_empty(), output)

    def _schedule(self) -> _Batch | None:
        """One call of schedule(); None when it scheduled no token."""
        output = self.scheduler.schedule()
        self.calls += 1
        self.preempted += self._newly_preempted(output)
        tokens: dict[str, int] = dict(output.num_scheduled_tokens)
        if not tokens:
            return None
        requests = {name: self.scheduler.requests[name] for name in tokens}
        context = sum(requests[name].num_computed_tokens - count for name, count in tokens.items())
        admitted = {data.req_id for data in output.scheduled_new_reqs}
        admitted |= set(output.scheduled_cached_reqs.resumed_req_ids)
        start, end = self._run(self.formula.step_ns(sum(tokens.values()), len(tokens), context))
        step = LoggedStep(
            start=start,
            end=end,
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
        drafts = {
            name: 0 if name in admitted else len(ids)
            for name, ids in output.scheduled_spec_decode_tokens.items()
        }
        return _Batch(output, step, sampled, drafts, self.calls)

    def _run(self, took: int) -> tuple[int, int]:
        """Start and end of the batch that was just scheduled; each stage of a pipeline takes ``took`` ns.

        The first stage of vLLM's second model runner waits for the tokens of the batch that was scheduled
        ``pipeline_parallel_size`` calls before, unless all who got one have left.
        """
        stages = self.settings.pipeline_parallel_size
        if len(self.stage_ends) < stages:
            self.stage_ends = [0] * stages
        ends = self.stage_ends
        start = max(self.now, ends[0])
        for batch in self.in_flight:
            if batch and batch.called == self.calls - stages and stages > 1 and self._go_on(batch):
                start = max(start, batch.step.end)
        at = start
        for stage in range(stages):
            at = ends[stage] = max(at, ends[stage]) + took
        return start, at

    def _go_on(self, batch: _Batch) -> bool:
        """Whether any request that gets a token from a batch in flight needs it to go on."""
        from vllm.v1.request import RequestStatus

        for name in batch.sampled:
            request = self.scheduler.requests.get(name)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            index = int(name)
            if self.produced[index] + 1 < min(
                request.max_tokens, self.settings.max_model_len - request.num_prompt_tokens
            ):
                return True
        return False

    def _newly_preempted(self, output: Any) -> list[int]:
        """Requests preempted by this schedule, in the order in which it happened."""
        victims: list[int] = self.scheduler.take_victims()
        names = {int(name) for name in output.preempted_req_ids or ()}
        if set(victims) != names:
            raise RunError(f"vLLM says that it preempted {sorted(names)}, but it preempted {victims}")
        for index in victims:
            self.records[index].preemptions += 1
        return victims

    def _finish(self, batch: _Batch) -> None:
        """Wait for a batch and give its tokens to the scheduler."""
        self.now = batch.step.end
        names = list(batch.output.num_scheduled_tokens)
        sampled = [
            self._next_tokens(int(name), batch.drafts.get(name, 0)) if name in batch.sampled else []
            for name in names
        ]
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
                tokens, finished = len(output.new_token_ids), output.finish_reason is not None
                self._note_tokens(int(output.request_id), tokens, finished, batch.step)
        if self.acceptance and not self.settings.async_scheduling:
            self._propose(names)
        batch.step.free_after = self._free_blocks()
        self.log.steps.append(batch.step)
        self.fruitless = 0 if any(sampled) else self.fruitless + 1
        if self.fruitless > self.patience:
            raise RunError(
                f"vLLM's scheduler goes round in circles: {self.fruitless} steps without a token, in which "
                "requests preempt each other before any of them has computed its prompt"
            )

    def _next_tokens(self, index: int, drafts: int) -> list[int]:
        """A request's next token, and behind it as many more as drafts are accepted."""
        request, done = self.workload.requests[index], self.produced[index]
        tokens = 1
        if drafts and self.acceptance:
            tokens += min(self.acceptance.accepted(index, request.input_tokens + done), drafts)
        if index not in self.answers:
            self.answers[index] = answer_ids(request)
        known, own = self.answers[index], PRIVATE_TOKEN + index
        ids: list[int] = [] if known is None else known[done : done + tokens].tolist()
        ids += [own] * (tokens - len(ids))  # what is accepted beyond the end of an answer is cut off
        if done + tokens >= request.output_tokens < request.max_tokens:
            ids[max(request.output_tokens - done - 1, 0)] = _STOP_TOKEN
        return ids

    def _propose(self, names: list[str]) -> None:
        """Give the scheduler drafts of a step's requests, as the engine does in synchronous scheduling."""
        from vllm.v1.outputs import DraftTokenIds

        assert self.acceptance
        proposed = []
        for name in names:
            request = self.workload.requests[int(name)]
            known = request.input_tokens + self.produced[int(name)]
            proposed.append([0] * self.acceptance.drafts(int(name), known))
        self.scheduler.update_draft_token_ids(DraftTokenIds(names, proposed))

    def _note_tokens(self, index: int, tokens: int, finished: bool, step: LoggedStep) -> None:
        """Bookkeeping of tokens that came with ``step``; releases follow-ups of a request that ended."""
        self.produced[index] += tokens
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
        "settings": {name: value for name, value in asdict(settings).items() if value != ""},
        "formula": formula.as_dict(),
        "source": workload.source,
    }
    return recorder.run()


def _resolved(workload: Workload, settings: SchedulerSettings) -> SchedulerSettings:
    """The settings with ``max_model_len`` filled in; refuses workloads that could never finish.

    Answers that do not fit are cut by vLLM's scheduler, whatever a server of the version makes of them.
    """
    longest = max((r.input_tokens + r.output_tokens for r in workload), default=1)
    resolved = replace(settings, max_model_len=settings.max_model_len or longest)
    prompt = max((r.input_tokens for r in workload), default=0)
    if prompt >= resolved.max_model_len:
        raise InputError(
            f"max_model_len is {resolved.max_model_len}, but the longest prompt has {prompt} tokens and "
            "needs room for an answer"
        )
    adapter = next((request for request in workload if request.lora is not None), None)
    if adapter is not None and not resolved.max_loras:
        raise InputError(
            f"request {adapter.index} names the LoRA adapter {adapter.lora}; give --max-loras beside"
        )
    asked = max((max(r.output_tokens, r.max_tokens) for r in workload), default=0)
    if asked > resolved.max_model_len:
        raise InputError(
            f"max_model_len is {resolved.max_model_len}, but a request asks for {asked} tokens; servers "
            "refuse it"
        )
    longest = min(longest, resolved.max_model_len)
    # A request's last token is never fed back, so its KV takes one token less than it is long.
    groups = resolved.groups or (KvGroup("full", settings.scheduler_block, (1,)),)
    in_flight = settings.max_num_batched_tokens * settings.batches_in_flight
    blocks = KvPlan(groups).request_blocks(longest - 1, in_flight)
    if blocks > settings.num_gpu_blocks - 1:
        raise InputError(
            f"num_gpu_blocks is {settings.num_gpu_blocks} ({settings.num_gpu_blocks - 1} usable), but the "
            f"longest request needs {blocks} blocks of {settings.scheduler_block} tokens"
        )
    return resolved


def _build_recorder(
    workload: Workload, settings: SchedulerSettings, formula: StepFormula, recorder_class: type[Recorder]
) -> tuple[Recorder, str]:
    """Import vLLM, build its scheduler, and wrap it; also returns vLLM's version."""
    import os

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request as VllmRequest

    scheduler = build_scheduler(settings)
    hasher = None
    if settings.enable_prefix_caching:
        init_none_hash(sha256)
        sizes = [group.block_size for group in settings.groups] or [settings.scheduler_block]
        ahead = getattr(scheduler, "num_hash_lookahead_tokens", 0)
        hasher = get_request_block_hasher(gcd(*sizes), sha256, *([ahead] if ahead else []))

    def new_request(request: Request, prompt_ids: list[int], arrival_ns: int) -> Any:
        return VllmRequest(
            # vLLM orders names as texts where priority and arrival are equal; noughts make that our order
            request_id=f"{request.index:09d}",
            prompt_token_ids=prompt_ids,
            sampling_params=SamplingParams(
                max_tokens=max(request.output_tokens, request.max_tokens),
                ignore_eos=True,
                stop_token_ids=[_STOP_TOKEN] if request.max_tokens > request.output_tokens else None,
            ),
            pooling_params=None,
            arrival_time=arrival_ns,
            priority=request.priority,
            cache_salt=request.cache_salt,
            lora_request=request.lora and LoRARequest(request.lora, numbers[request.lora], "/adapters"),
            block_hasher=hasher,
        )

    adapters = sorted({request.lora for request in workload if request.lora is not None})
    numbers = {name: number for number, name in enumerate(adapters, start=1)}

    drafts = DrawnAcceptance(settings.speculative.rates) if settings.speculative else None
    made = scheduler, new_request, ModelRunnerOutput
    recorder = recorder_class(workload, settings, formula, *made, acceptance=drafts)
    return recorder, str(vllm.__version__)
