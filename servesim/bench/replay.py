"""Sends a workload to a server as it would arrive, and records when its tokens come back."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from servesim.bench.replay_folder import TICK_S, Journal, ReplayFolder, Segment, save_ticks
from servesim.bench.token_stream import RequestFailedError
from servesim.engine.arrivals import NEVER, Arrivals
from servesim.errors import InputError, RunError
from servesim.slotted import dataclass
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from servesim.bench.target import Answer, Target, TargetFacts
    from servesim.workload.request import Request

_SHOW_EVERY_S = 0.5
_NS = 1_000_000_000


@dataclass(slots=True, frozen=True)
class ReplaySettings:
    """How a replay goes, beside what it is sent to."""

    max_concurrency: int = 0
    """Closed loop: at most this many requests in the server; 0: every request at its time."""
    token_times: bool = True
    """Record the time of every token."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Everything that decides the outcome, for the check on a rerun."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """``dataset_path`` and ``dataset_hash`` for ``meta.json``."""
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Engine arguments the user knows, where a server does not tell."""


@dataclass(slots=True)
class Tally:
    """How far a replay is."""

    total: int
    """Requests of the workload."""
    skipped: int = 0
    """Finished in an earlier session."""
    completed: int = 0
    failed: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    output_tokens: int = 0
    other_length: int = 0
    """Requests whose output was not as long as the workload says."""
    merged: int = 0
    """Requests with fewer stamps than tokens."""
    first_error: str = ""
    delays_s: list[float] = field(default_factory=list)
    """How much later than due each request was sent."""


def replay(
    workload: Workload,
    target: Target,
    path: Path,
    settings: ReplaySettings,
    show: Callable[[Tally], None] | None = None,
) -> Tally:
    """Replay ``workload`` against ``target`` into the folder ``path``, or go on with what is there.

    Requests that fail are listed in ``errors.jsonl``, and sent again by a rerun. On an interrupt what was
    recorded stays, and KeyboardInterrupt goes on to the caller.

    Args:
        workload: requests and sessions.
        target: a server or engine, not opened yet.
        path: the recording.
        settings: how to go about it.
        show: called about twice a second with the state of things.

    Raises:
        InputError: the target cannot be reached, or the folder holds something else.
        RunError: every request failed, or the folder cannot be written.
    """
    folder = ReplayFolder(path, settings.arguments)
    folder.open()
    done = folder.done
    tally = Tally(len(workload), skipped=sum(request_id(request) in done for request in workload))
    if tally.skipped == tally.total:
        return tally
    session = _Session(remaining(workload, done), target, folder, settings, tally)
    asyncio.run(session.run(show))
    if tally.failed and not tally.completed and not tally.skipped:
        raise RunError(f"all {tally.failed} requests failed; the first: {tally.first_error}")
    return tally


def request_id(request: Request) -> str:
    """Name of a request in the recording."""
    return f"bench-{request.index}"


def remaining(workload: Workload, done: set[str]) -> list[tuple[Request, Request]]:
    """What is left to send: each request as it is, and as the clock of this session sees it.

    The latter are numbered from 0. When something is done already, their arrivals start at 0 again, and a
    follow-up whose predecessor is done is released first thing.
    """
    left = [request for request in workload if request_id(request) not in done]
    position = {request.index: i for i, request in enumerate(left)}
    heads = [request.arrival_ns for request in left if request.predecessor < 0]
    shift = min(heads, default=0) if done else 0
    timed = []
    for i, request in enumerate(left):
        before = position.get(request.predecessor, -1)
        released = request.predecessor >= 0 > before
        arrival = request.tool_ns if released else request.arrival_ns - shift
        timed.append(replace(request, index=i, predecessor=before, arrival_ns=arrival))
    return list(zip(left, timed, strict=True))


class _Session:
    """One go at the requests that are left."""

    def __init__(
        self,
        left: list[tuple[Request, Request]],
        target: Target,
        folder: ReplayFolder,
        settings: ReplaySettings,
        tally: Tally,
    ) -> None:
        self._requests = [request for request, _ in left]
        self._arrivals = Arrivals(Workload([timed for _, timed in left]), settings.max_concurrency)
        self._target, self._folder, self._settings, self._tally = target, folder, settings, tally
        self._wake = asyncio.Event()
        self._start_s = 0.0
        self._wall_offset_s = 0.0
        self._journal: Journal | None = None
        self._errors: Journal | None = None

    async def run(self, show: Callable[[Tally], None] | None) -> None:
        """Open the target, send everything, and leave a valid folder whatever happens."""
        target, folder = self._target, self._folder
        try:
            facts = await target.open()
            facts = replace(facts, engine_kwargs={**facts.engine_kwargs, **self._settings.engine_kwargs})
            if folder.model not in (None, facts.model):
                raise InputError(
                    f"--output {folder.path}: holds a replay of {folder.model}, and the server now serves "
                    f"{facts.model}; give another folder"
                )
            self._wall_offset_s = time.time() - perf_counter()
            self._start_s = perf_counter()
            segment = Segment(self._start_s + self._wall_offset_s)
            folder.segments.append(segment)
            folder.write_meta(facts, target.side, self._settings.dataset)
            (folder.path / "errors.jsonl").unlink(missing_ok=True)
            self._journal = Journal(folder.requests_path)
            ended = False
            try:
                await self._together(show)
                ended = True
            finally:
                self._close(facts, segment, ended)
        finally:
            await target.close()

    async def _together(self, show: Callable[[Tally], None] | None) -> None:
        """The sending, and beside it the showing."""
        if show is None:
            await self._send_all()
            return
        shower = asyncio.create_task(_repeat(show, self._tally))
        try:
            await self._send_all()
        finally:
            shower.cancel()
            show(self._tally)

    async def _send_all(self) -> None:
        arrivals, tasks = self._arrivals, set[asyncio.Task[None]]()
        try:
            while True:
                self._wake.clear()
                now_ns = self._now_ns()
                while arrivals.next_ns <= now_ns:
                    due_ns = arrivals.next_ns
                    arrival = arrivals.pop()
                    if arrival is not None:
                        tasks.add(asyncio.create_task(self._one(arrival[1], due_ns)))
                for task in [task for task in tasks if task.done()]:
                    tasks.remove(task)
                    task.result()  # a fault of ours, or a full disk, ends the replay
                if arrivals.next_ns == NEVER and not tasks:
                    break
                await _wait(self._wake, arrivals.next_ns - now_ns)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, position: int, due_ns: int) -> None:
        """Send one request, write down what came of it, and release what waits for it."""
        request, tally = self._requests[position], self._tally
        tally.in_flight += 1
        tally.most_in_flight = max(tally.most_in_flight, tally.in_flight)
        try:
            answer = await self._target.answer(request)
        except RequestFailedError as error:
            self._note_failure(request, error.status, error.message)
            for successor in self._arrivals.drop_successors(position):
                later = self._requests[successor]
                self._note_failure(later, None, f"{request_id(request)} of its session failed")
        else:
            tally.delays_s.append(max(answer.sent_s - self._start_s - due_ns / _NS, 0.0))
            self._note_answer(request, answer)
        finally:
            tally.in_flight -= 1
            self._arrivals.ended(position, self._now_ns())
            self._wake.set()

    def _note_answer(self, request: Request, answer: Answer) -> None:
        row = self._row(request, answer)
        tally = self._tally
        tally.completed += 1
        tally.output_tokens += answer.output_tokens
        tally.other_length += answer.output_tokens != request.output_tokens
        tally.merged += len(answer.token_s) != answer.output_tokens
        assert self._journal is not None
        self._journal.append(row)
        self._folder.rows.append(row)

    def _row(self, request: Request, answer: Answer) -> dict[str, Any]:
        """The request in the form of the recording; seconds, rounded to microseconds."""
        first, last = answer.token_s[0], answer.token_s[-1]
        stamps = (
            answer.sent_s + self._wall_offset_s,
            *(answer.sent_s, answer.sent_s, first, last),
        )
        if answer.stamps is not None:
            own = answer.stamps
            stamps = (
                own.arrival_time,
                own.queued_ts,
                own.scheduled_ts,
                own.first_token_ts,
                own.last_token_ts,
            )
        names = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
        row: dict[str, Any] = {
            "request_id": request_id(request),
            "input_toks": answer.prompt_tokens or request.input_tokens,
            "output_toks": answer.output_tokens,
            **{name: round(value, 6) for name, value in zip(names, stamps, strict=True)},
        }
        if answer.output_tokens != request.output_tokens:
            row["asked_output_toks"] = request.output_tokens
        if self._settings.token_times:
            # one stamp a token, else one a chunk
            name = "token_ts" if len(answer.token_s) == answer.output_tokens else "chunk_ts"
            row[name] = [round(value, 6) for value in answer.token_s]
        return row

    def _note_failure(self, request: Request, status: int | None, message: str) -> None:
        tally = self._tally
        tally.failed += 1
        tally.first_error = tally.first_error or (f"HTTP {status}: {message}" if status else message)
        if self._errors is None:
            self._errors = Journal(self._folder.path / "errors.jsonl")
        self._errors.append(
            {
                "request_id": request_id(request),
                "time": round(perf_counter() + self._wall_offset_s, 6),
                "status": status,
                "message": message,
            }
        )

    def _close(self, facts: TargetFacts, segment: Segment, ended: bool) -> None:
        """Bring the folder into its final form."""
        folder, tally = self._folder, self._tally
        for journal in (self._journal, self._errors):
            if journal is not None:
                journal.close()
        segment.finished_s = perf_counter() + self._wall_offset_s
        segment.completed, segment.failed = tally.completed, tally.failed
        if ended:
            folder.finish_requests()
        save_ticks(folder.path / "timeseries.csv", folder.rows, folder.segments, TICK_S)
        extra = {
            "num_requests": len(folder.rows),
            "requests_asked": tally.total,
            "interrupted": not ended,
            "send_delay_ms": delay_figures(tally.delays_s),
        }
        folder.write_meta(facts, self._target.side, self._settings.dataset, extra)

    def _now_ns(self) -> int:
        return int((perf_counter() - self._start_s) * _NS)


def delay_figures(delays_s: list[float]) -> dict[str, float] | None:
    """How late requests were sent, in ms: what the recording client itself adds to the arrivals."""
    if not delays_s:
        return None
    ordered = sorted(delays_s)
    places = {"median": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "max": len(ordered) - 1}
    return {name: round(ordered[place] * 1e3, 3) for name, place in places.items()}


async def _wait(event: asyncio.Event, at_most_ns: int) -> None:
    """Until the event, or until the time has passed."""
    # not wait_for: in Python 3.11 it loses an interrupt that comes together with the event
    with suppress(TimeoutError):
        async with asyncio.timeout(None if at_most_ns >= NEVER // 2 else max(at_most_ns, 0) / _NS):
            await event.wait()


async def _repeat(show: Callable[[Tally], None], tally: Tally) -> None:
    while True:
        await asyncio.sleep(_SHOW_EVERY_S)
        show(tally)
