"""One model replica as the router and the clock see it: its scheduler, its inbox, its log."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Protocol

from servesim.engine.request_state import RequestState
from servesim.memory.traffic import tokens_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.block_tables import BlockTables
    from servesim.engine.scheduler import Scheduler
    from servesim.results.records import InstanceLog, RequestRecord
    from servesim.workload.request import Request


class StepHook(Protocol):
    """Follows an instance step by step, for tests: a class of the engine cannot be derived from once it is
    compiled."""

    def holds_back(self, steps: int) -> bool:
        """Whether nothing is scheduled now behind those in flight of the ``steps`` steps so far."""

    def scheduled(self, batch: Batch) -> None:
        """Called with every batch of the scheduler, also with those that came out empty."""

    def ended(self, batch: Batch, start_ns: int, free_blocks: int) -> None:
        """Called after every step."""


class Instance:
    """A scheduler with the requests handed to it. When its steps run is up to its :class:`StepLoop`."""

    __slots__ = (
        "_inbox",
        "_left",
        "hook",
        "log",
        "preempted",
        "scheduler",
        "tables",
    )

    def __init__(
        self,
        log: InstanceLog,
        scheduler: Scheduler,
        tables: BlockTables,
        hook: StepHook | None = None,
    ) -> None:
        """
        Args:
            log: where it writes down what happens.
            scheduler: decides what it computes.
            tables: make the block tables of its requests.
            hook: follows its steps; None: nobody.
        """
        self.log = log
        self.scheduler = scheduler
        self.tables = tables
        self.hook = hook
        self._inbox: list[RequestState] = []
        self._left = 0
        """Running requests that have left as its step loop laid out; the scheduler learns it later."""
        self.preempted = 0
        """Preemptions that are not in the log of steps yet."""

    @property
    def plain(self) -> bool:
        """Whether nobody looks at its steps one by one, and its scheduler is :attr:`Scheduler.plain`."""
        return self.hook is None and self.log.kv_reads is None and self.scheduler.plain

    def counts(self) -> tuple[int, int]:
        """Waiting and running requests."""
        scheduler = self.scheduler
        return len(scheduler.waiting) + len(self._inbox), len(scheduler.running) - self._left

    def cached_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt that this instance's prefix cache holds right now."""
        kv = self.scheduler.kv
        table = self.tables.new_table(request, kv, lasting=False)
        return kv.hit_tokens(kv.lookup(table, request.input_tokens, False))

    def new_state(
        self,
        request: Request,
        arrival_ns: int,
        output_tokens: int | None = None,
        handed_over: RequestRecord | None = None,
    ) -> RequestState:
        """A request as this instance will keep track of it; see :class:`RequestState`."""
        table = self.tables.new_table(request, self.scheduler.kv)
        return RequestState(
            request,
            self.log.index,
            arrival_ns,
            table,
            output_tokens=output_tokens,
            longest=self.log.options.max_model_len,
            handed_over=handed_over,
        )

    def put_in(self, state: RequestState) -> None:
        """Lay a request into the inbox; :meth:`take_in` finds it at the next step boundary."""
        self._inbox.append(state)

    def note_left(self, requests: int) -> None:
        """So many running requests have left of which the scheduler does not know yet."""
        self._left = requests

    @property
    def has_mail(self) -> bool:
        """Whether requests wait for the next step boundary."""
        return bool(self._inbox)

    def abort(self, state: RequestState) -> bool:
        """Take a request out before its end; see :meth:`Scheduler.abort`."""
        if state in self._inbox:
            self._inbox.remove(state)
            return True
        return self.scheduler.abort(state)

    def take_in(self, now_ns: int) -> None:
        """Queue the requests handed over since the last step boundary."""
        if self._inbox:
            for state in self._inbox:
                self.scheduler.enqueue(state, now_ns)
            self._inbox.clear()

    def schedule(self, step: int, now_ns: int, in_flight: bool) -> Batch | None:
        """The batch of step ``step``, None if there is nothing to compute; see
        :meth:`Scheduler.schedule`."""
        scheduler, hook = self.scheduler, self.hook
        if hook is not None and in_flight and hook.holds_back(step):
            return None
        while scheduler.has_work:
            batch = scheduler.schedule(step, now_ns, in_flight)
            if hook is not None:
                hook.scheduled(batch)
            self.preempted += len(batch.preempted)
            if not batch.is_empty:
                return batch
            if in_flight or not batch.preempted or scheduler.pipeline:
                break
        return None

    def note_step(self, batch: Batch, start_ns: int) -> None:
        """Write down a step that runs from ``start_ns`` to ``batch.end_ns``."""
        scheduler = self.scheduler
        self.log.steps.append(
            start_ns,
            batch.end_ns,
            batch.num_decodes + batch.draft_tokens,
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.kv.pool.num_used,
        )
        self.note_batch(batch, start_ns)

    def note_batch(self, batch: Batch, start_ns: int) -> None:
        """Write down what few steps have of a step that starts at ``start_ns``: all but its row."""
        step, steps, connectors = batch.step, self.log.steps, self.scheduler.connectors
        if batch.chunks:
            prompts = 0
            for tokens, _ in batch.chunks:
                prompts += tokens
            steps.prefill_tokens.put(step, prompts)
        if self.preempted:
            steps.preempted.put(step, self.preempted)
        if batch.lookup_tokens:
            steps.lookup_tokens.put(step, batch.lookup_tokens)
        if batch.hit_tokens:
            steps.hit_tokens.put(step, batch.hit_tokens)
        if batch.recomputed_tokens:
            steps.recomputed_tokens.put(step, batch.recomputed_tokens)
        if connectors:
            recalled_bytes = sum(batch.recalls) + sum([each.take_read_bytes() for each in connectors])
            if batch.recalled_tokens:
                steps.recalled_tokens.put(step, batch.recalled_tokens)
            if recalled_bytes:
                steps.recalled_bytes.put(step, recalled_bytes)
            moved = recalled_bytes + sum([each.take_written_bytes() for each in connectors])
            if moved:
                steps.tier_bytes.put(step, moved)
        if self.log.kv_reads is not None:
            self.log.kv_reads.append(self._kv_read(batch))
            if self.log.window_reads:
                pim = self.log.options.enable_attn_offloading
                decodes, kv_sum = (0, 0) if pim else (batch.num_decodes, batch.kv_sum)
                histories = [history for _, history in batch.chunks]
                for reach, reads in self.log.window_reads.items():
                    reads.append(tokens_within(reach, histories, decodes, kv_sum))
        self.preempted = 0
        if batch.travelling is not None:
            batch.travelling.token_times.append(batch.end_ns)
        for connector in connectors:
            connector.step_started(batch, start_ns)

    def finish(self, batch: Batch) -> Sequence[RequestState]:
        """Commit a step that has ended; the requests that leave the system with it."""
        leaving = self.scheduler.finish(batch)
        if connectors := self.scheduler.connectors:
            # what ended requests leave behind
            written = sum([each.take_written_bytes() for each in connectors])
            if written:
                tier_bytes = self.log.steps.tier_bytes
                tier_bytes.put(batch.step, tier_bytes[batch.step] + written)
        if self.hook is not None:
            self.hook.ended(batch, self.log.steps.start_ns[batch.step], self.scheduler.kv.pool.num_free)
        return leaving

    def _kv_read(self, batch: Batch) -> int:
        """Tokens of KV that the NPUs read in a step; not those that memory computes with itself."""
        history = sum(history for _, history in batch.chunks)
        return history if self.log.options.enable_attn_offloading else history + batch.kv_sum

    def stuck_message(self) -> str:
        """Why nothing can go on although requests wait."""
        waiting = self.scheduler.waiting
        names = ", ".join(str(state.request.index) for state in islice(waiting, 5))
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        state, limits, pool = waiting[0], self.scheduler.limits, self.scheduler.kv.pool
        loads = self.scheduler.loads
        if loads and loads.holding:
            return (
                f"instance {self.log.index} cannot go on: requests {names}{more} wait, nothing runs, and "
                f"{len(loads.holding)} of them hold {pool.num_used} of {pool.usable} blocks for KV that was "
                "read, so that none has blocks for all its tokens. vLLM comes to a halt here as well (before "
                "0.33 more often); give the KV cache more blocks, or read KV in the step that needs it "
                "(--kv-load step)"
            )
        return (
            f"instance {self.log.index} cannot go on: requests {names}{more} wait, nothing runs, and the "
            f"first of them ({state.known} tokens to compute) is never admitted (token budget "
            f"{limits.max_num_batched_tokens}, {pool.num_free} of {pool.usable} blocks free, chunked prefill "
            f"{'on' if limits.chunked_prefill else 'off'}); raise --max-num-batched-tokens or allow chunked "
            "prefill"
        )
