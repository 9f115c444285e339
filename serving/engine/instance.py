"""One model replica: its scheduler, its step timer, and the steps in flight."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from serving.engine.arrivals import NEVER
from serving.engine.batch import Batch
from serving.engine.request_state import RequestState
from serving.errors import RunError
from serving.memory.kv_cache import BlockTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from serving.engine.block_tables import BlockTables
    from serving.engine.scheduler import Scheduler
    from serving.results.records import InstanceLog
    from serving.workload.request import Request

_MIN_JUMP = 12  # steps; below this, stepping one by one is cheaper than a vectorised jump
_MAX_JUMP = 8192


class StepTimes(Protocol):
    """What an instance asks of a step timer; see :class:`serving.latency.step_timer.StepTimer`."""

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int: ...

    def decode_run_ns(
        self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int
    ) -> NDArray[np.int64]: ...

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int: ...


class Instance:
    """Runs steps one after the other, ``depth`` of them in flight.

    With synchronous scheduling (``depth`` 1) a step is scheduled when the one before has ended. With
    asynchronous scheduling (``depth`` 2), vLLM's default, it is scheduled while the one before still runs,
    before its tokens are known. Requests that arrive during a step are seen at the next step boundary.
    """

    def __init__(
        self,
        log: InstanceLog,
        scheduler: Scheduler,
        timer: StepTimes,
        tables: BlockTables,
        *,
        depth: int = 2,
        jump: bool = True,
    ) -> None:
        self.log = log
        self.scheduler = scheduler
        self.timer = timer
        self.tables = tables
        self.next_ns = NEVER
        """When this instance acts next: the end of its oldest step in flight, or an arrival if it is idle."""
        self.finished: list[RequestState] = []
        """Requests that ended since the owner last emptied this list."""
        self.trace: Callable[[Batch, int, int], None] | None = None
        """Debugging hook: called after every step with its batch, its start in ns and the number of free
        blocks."""
        self._depth = depth
        self._jump = jump
        self._inbox: list[RequestState] = []
        self._in_flight: deque[Batch] = deque()
        self._busy_until_ns = 0
        self._preempted = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no slot."""
        return len(self.scheduler.waiting) + len(self._inbox)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self.scheduler.running)

    def cached_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt that this instance's prefix cache holds right now."""
        kv = self.scheduler.kv
        table = BlockTable(self.tables.shared_ids(request, kv.block_size), 0)
        return len(kv.lookup(table, request.input_tokens, False)) * kv.block_size

    def submit(self, request: Request, arrival_ns: int) -> None:
        """Hand a request over; it is taken in at the next step boundary, at once if the instance is idle."""
        table = self.tables.new_table(request, self.scheduler.kv.block_size)
        self._inbox.append(RequestState(request, self.log.index, arrival_ns, table))
        if not self._in_flight:
            self.next_ns = min(self.next_ns, arrival_ns)

    def run(self, horizon_ns: int, one_finish: bool) -> None:
        """Run from :attr:`next_ns` until the next action would be at ``horizon_ns`` or later.

        ``one_finish``: also return as soon as a request has ended, so that what it releases can be placed in
        time.

        Raises:
            RunError: requests wait that can never be scheduled.
        """
        scheduler, in_flight = self.scheduler, self._in_flight
        now = self.next_ns
        while True:
            if in_flight and in_flight[0].end_ns <= now:
                self._complete(in_flight.popleft())
            if self._inbox:
                for state in self._inbox:
                    scheduler.enqueue(state, now)
                self._inbox.clear()
            released = one_finish and self.finished  # what that releases may arrive within a jump
            if self._jump and not released and len(in_flight) == self._depth - 1:
                self._jump_ahead(now, horizon_ns)
            while len(in_flight) < self._depth and scheduler.has_work:
                batch = scheduler.schedule(len(self.log.steps), now, bool(in_flight))
                self._preempted += len(batch.preempted)
                if not batch.is_empty:
                    self._launch(batch, now)
                elif in_flight or not batch.preempted:
                    break
            if not in_flight:
                if scheduler.waiting:
                    raise RunError(self._stuck_message())
                self.next_ns = NEVER
                return
            self.next_ns = now = in_flight[0].end_ns
            if now >= horizon_ns or (one_finish and self.finished):
                return

    def _complete(self, batch: Batch) -> None:
        if batch.finishing:
            self.scheduler.finish(batch)
            self.finished += batch.finishing
        if self.trace:
            self.trace(batch, self.log.steps.start_ns[batch.step], self.scheduler.kv.pool.num_free)

    def _launch(self, batch: Batch, now_ns: int) -> None:
        """Put a scheduled batch on the NPU, behind the step that runs."""
        n, chunks = batch.num_decodes, batch.chunks
        if chunks:
            duration = self.timer.mixed_ns(chunks, n, batch.kv_sum, batch.kv_min, batch.kv_max)
        else:
            duration = self.timer.decode_ns(n, batch.kv_sum, batch.kv_min, batch.kv_max)
        start = max(self._busy_until_ns, now_ns)
        batch.end_ns = self._busy_until_ns = start + duration
        scheduler, steps = self.scheduler, self.log.steps
        steps.start_ns.append(start)
        steps.end_ns.append(start + duration)
        steps.prefill_tokens.append(sum(tokens for tokens, _ in chunks) if chunks else 0)
        steps.decode_tokens.append(n)
        steps.running.append(len(scheduler.running))
        steps.waiting.append(len(scheduler.waiting))
        steps.kv_blocks_used.append(scheduler.kv.pool.num_used)
        steps.preempted.append(self._preempted)
        steps.hit_tokens.append(batch.hit_tokens)
        steps.lookup_tokens.append(batch.lookup_tokens)
        self._preempted = 0
        self._in_flight.append(batch)

    def _jump_ahead(self, now_ns: int, horizon_ns: int) -> None:
        """Do many steps at once while nothing but decoding goes on, with the same outcome as one by one."""
        in_flight, steps = self._in_flight, self.log.steps
        if in_flight and in_flight[0].finishing:
            return
        most = _MAX_JUMP
        if horizon_ns < NEVER and len(steps):
            last_ns = steps.end_ns[-1] - steps.start_ns[-1]
            most = min(most, (horizon_ns - now_ns) // max(last_ns, 1) + 2)
        if most < _MIN_JUMP:
            return
        count = self.scheduler.quiet_ticks(most)
        if count < _MIN_JUMP:
            return
        decodes = self.scheduler.decodes
        start = max(self._busy_until_ns, now_ns)
        ends = self.timer.decode_run_ns(decodes.count, *decodes.lengths(), count).cumsum() + start
        # A step is scheduled when the step `depth` before it has ended; that must be before the horizon.
        known = np.array([now_ns, *(batch.end_ns for batch in in_flight)], dtype=np.int64)
        scheduled = np.concatenate((known, ends))[:count]
        count = int(np.searchsorted(scheduled, horizon_ns))
        if count < self._depth:
            return
        ends = ends[:count]
        self._log_quiet_steps(start, ends)
        self.scheduler.run_quietly(count)
        self._busy_until_ns = int(ends[-1])
        in_flight.clear()
        first = len(steps) - self._depth
        for step in range(first, len(steps)):
            in_flight.append(Batch(step, steps.end_ns[step]))

    def _log_quiet_steps(self, start_ns: int, ends: NDArray[np.int64]) -> None:
        scheduler, steps, count = self.scheduler, self.log.steps, len(ends)
        used = np.cumsum(scheduler.decodes.blocks_needed(count)) + scheduler.kv.pool.num_used

        def repeat(value: int) -> NDArray[np.int64]:
            return np.full(count, value, dtype=np.int64)

        starts = np.concatenate((np.array([start_ns], dtype=np.int64), ends[:-1]))
        columns = {
            "start_ns": starts,
            "end_ns": ends,
            "decode_tokens": repeat(scheduler.decodes.count),
            "running": repeat(len(scheduler.running)),
            "waiting": repeat(len(scheduler.waiting)),
            "kv_blocks_used": used.astype(np.int64),
        }
        nothing = repeat(0)
        for name in steps.COLUMNS:
            getattr(steps, name).frombytes(columns.get(name, nothing).tobytes())

    def _stuck_message(self) -> str:
        waiting = self.scheduler.waiting
        names = ", ".join(str(state.request.index) for state in islice(waiting, 5))
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        state, limits, pool = waiting[0], self.scheduler.limits, self.scheduler.kv.pool
        return (
            f"instance {self.log.index} cannot go on: requests {names}{more} wait, nothing runs, and the "
            f"first of them ({state.known} tokens to compute) is never admitted (token budget "
            f"{limits.max_num_batched_tokens}, {pool.num_free} of {pool.usable} blocks free, chunked prefill "
            f"{'on' if limits.chunked_prefill else 'off'}); raise --max-num-batched-tokens or allow chunked "
            "prefill"
        )
