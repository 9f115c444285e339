"""An engine that requests come to while it runs: the simulation of ``servesim run``, led by another clock.

The clock of a run jumps from event to event. Here a *pace* says what time it is (the wall clock, faster or
slower, or the moment at which all clients wait), the simulation runs up to it, and every step that has ended
by then gives its tokens to the requests that wait for them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Protocol, cast

from servesim.engine.build import Builder
from servesim.engine.clock import NEVER
from servesim.engine.simulation import Simulation, why_impossible
from servesim.errors import InputError
from servesim.server.bounded import KEPT_STEPS, LiveSteps, LiveTables
from servesim.server.pace import VirtualPace, WallPace
from servesim.specs.speculative import OPTION as SPECULATIVE
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState
    from servesim.engine.step_loop import LoopPlan
    from servesim.server.bounded import Tail
    from servesim.server.kv_events import KvEvents
    from servesim.server.pace import Pace
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions


@dataclass(slots=True, eq=False)
class Stream:
    """One sequence of tokens on its way to a client."""

    request: Request
    salt: str = ""
    key: bytes = b""
    """Decides the order among requests of the same moment where time stands still."""
    tokens: int = 0
    """Tokens that are out."""
    limited: bool = True
    """Whether it ends for its length (``length``), not by itself (``stop``)."""
    finish_reason: str | None = None
    """None while it goes on."""
    refused: str = ""
    """Why it can never run."""
    arrival_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    instance: int = 0
    cached_tokens: int = 0
    receiver: Receiver | None = None
    state: RequestState | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None


class Receiver(Protocol):
    """To whom a stream goes; see :class:`servesim.server.answer.Answer`."""

    def tell(self, stream: Stream) -> None: ...


class Audience(Protocol):
    """Who counts what happens; see :class:`servesim.server.metrics.Metrics`."""

    def taken(self, stream: Stream) -> None: ...

    def tokens(self, stream: Stream, before_ns: int, times_ns: Sequence[int]) -> None: ...

    def ended(self, stream: Stream, reason: str) -> None: ...

    def refused(self, stream: Stream) -> None: ...


class _LiveSimulation(Simulation):
    """A simulation whose requests come from outside, and that tells what becomes of them."""

    def __init__(
        self,
        plans: Sequence[LoopPlan],
        options: RuntimeOptions,
        builder: Builder,
        submitted: Callable[[RequestState, Instance], None],
        ended: Callable[[RequestState], None],
        refused: Callable[[int, str], None],
    ) -> None:
        super().__init__(
            plans,
            Workload([]),
            options,
            clock=builder.clock,
            pipeline_tracks=builder.pipeline_tracks,
            hand_over=builder.hand_over,
            notes=builder.notes,
        )
        self._tell_submitted, self._tell_ended, self._tell_refused = submitted, ended, refused

    def take(self, request: Request, now_ns: int) -> None:
        """Hand a request to the router."""
        self._route(request, now_ns)

    def _submit(self, instance: Instance, state: RequestState, now: int) -> None:
        super()._submit(instance, state, now)
        self._tell_submitted(state, instance)

    def _end(self, state: RequestState) -> None:
        self._tell_ended(state)

    def _reject(self, index: int, instance: int, now: int, reason: str) -> None:
        del instance, now
        self._tell_refused(index, reason)


class LiveEngine:
    """Instances, a router and a clock that follows a pace."""

    def __init__(self, cluster: ClusterSpec, options: RuntimeOptions, pace: Pace) -> None:
        """
        Args:
            cluster: what runs.
            options: of the run; those of a workload do not act here.
            pace: what time it is.

        Raises:
            InputError: the cluster cannot be built, or an option cannot act in a server.
        """
        if options.sticky_sessions or options.router_refresh:
            flag = "--sticky-sessions" if options.sticky_sessions else "--router-refresh"
            raise InputError(f"{flag}: is not built for a server; leave it out")
        self.pace = pace
        self.options = options
        builder = Builder(
            cluster,
            Workload([]),
            options.replace(stepped=True),
            tables=(tables := LiveTables()),
            new_steps=LiveSteps,
        )
        plans = [builder.plan(group) for group in builder.lockstep_groups()]
        self.warnings = list(builder.warnings)
        self.tables = tables
        self._clock = builder.clock
        self._pipeline_tracks = cast("Sequence[Tail]", builder.pipeline_tracks)  # LiveSteps makes them
        self._moved = builder.transfers.moved
        self._simulation = _LiveSimulation(
            plans, options, builder, self._submitted, self._ended, self._refused
        )
        self.instances: Sequence[Instance] = self._simulation.instances
        if any(instance.log.options.speculative for instance in self.instances):
            raise InputError(f"{SPECULATIVE}: is not built for a server; leave it out")
        blocks = sum(instance.log.capacity.num_blocks for instance in self.instances)
        tables.remember(blocks)
        self.notes = list(builder.notes)
        self.woken = asyncio.Event()
        self._speed = pace.speed if isinstance(pace, WallPace) else 0.0
        self.late_ns: deque[int] = deque(maxlen=KEPT_STEPS)
        """How long after their time the latest tokens went out, in wall-clock ns."""
        self._audience: Audience | None = None
        self._events: KvEvents | None = None
        self._streams: dict[int, Stream] = {}
        """Index of a request → its stream."""
        self._pending: list[Stream] = []
        self._numbers = count()

    def watch(self, audience: Audience) -> None:
        """Let somebody count what happens."""
        self._audience = audience

    def publish(self, events: KvEvents) -> None:
        """Let somebody publish what the prefix caches hold."""
        self._events = events

    # ------------------------------------------------------------------ for the server

    @property
    def open_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams) + len(self._pending)

    @property
    def max_model_len(self) -> int:
        """The longest context that every instance takes."""
        return min(instance.log.options.max_model_len for instance in self.instances)

    def new_request(
        self, input_ids: NDArray[np.int64], output_ids: NDArray[np.int64], model: str | None
    ) -> Request:
        """A request that has not been submitted yet."""
        return Request(
            next(self._numbers), len(input_ids), len(output_ids), 0, input_ids, output_ids, model=model
        )

    def submit(self, streams: Sequence[Stream]) -> None:
        """Let requests arrive now."""
        now = self.pace.now_ns()
        for stream in streams:
            stream.arrival_ns = now
        self._pending += streams
        self._count_calls(len(streams))
        self.woken.set()

    def abort(self, streams: Iterable[Stream]) -> None:
        """Take back what has not ended; its KV blocks are free at once."""
        for stream in streams:
            if stream.done:
                continue
            if stream in self._pending:
                self._pending.remove(stream)
            else:
                state = stream.state
                if state is None or not self.instances[stream.instance].abort(state):
                    # it goes on to its end, and nobody sees it
                    self._streams[stream.request.index] = Stream(stream.request, finish_reason="abort")
                else:
                    del self._streams[stream.request.index]
                    self.tables.forget(stream.request)
            self._finish(stream, "abort")

    def reset_prefix_cache(self) -> bool:
        """Forget what the prefix caches hold; False if requests run, as in vLLM."""
        if self._streams:
            return False
        self.tables.forget_all()
        if self._events:
            self._events.cleared(self.pace.now_ns())
        return True

    async def run(self) -> None:
        """Follow the pace for ever."""
        due_ns = NEVER
        answering = asyncio.ensure_future(self._events.answer()) if self._events else None
        try:
            while True:
                await self.pace.wait(due_ns, self.woken)
                self.woken.clear()
                due_ns = self.advance(self.pace.now_ns())
        finally:
            if answering:
                answering.cancel()
            if self._events:
                self._events.close()

    def advance(self, now_ns: int) -> int:
        """Run up to ``now_ns``; returns when something happens next, :data:`NEVER` if nothing will."""
        clock = self._clock
        pending, self._pending = self._pending, []
        if isinstance(self.pace, VirtualPace):
            if pending and self.pace.stands_still:
                self._pending, pending = pending, []  # others of the same moment may still come
            pending.sort(key=lambda stream: stream.key)
        for stream in pending:
            # at equal times requests arrive before steps end
            arrival_ns = max(stream.arrival_ns, clock.now_ns)
            clock.run_until(arrival_ns - 1)
            self._streams[stream.request.index] = stream
            if stream.salt:
                self.tables.salt(stream.request, stream.salt)
            self._simulation.take(stream.request, arrival_ns)
        due_ns = clock.run_until(now_ns)
        self._hand_out(now_ns)
        if self._events:
            self._events.flush(now_ns)
        del self._moved[:-KEPT_STEPS]
        return due_ns

    def _hand_out(self, now_ns: int) -> None:
        """Give every stream the tokens of the steps that have ended by ``now_ns``, then count them."""
        handed: list[tuple[Stream, int, list[int]]] = []
        latest: dict[tuple[int, int], list[int]] = {}
        for stream in list(self._streams.values()):
            state = stream.state
            if state is None or stream.finish_reason is not None:
                continue
            times = self._token_times(state, stream.tokens, now_ns, latest)
            if times:
                handed.append((stream, stream.last_token_ns, times))
                self._take_tokens(stream, state, times)
                if stream.receiver:
                    stream.receiver.tell(stream)
                self._note_lateness(times)
        if self._audience:
            for stream, before_ns, times in handed:
                self._audience.tokens(stream, before_ns, times)

    # ------------------------------------------------------------------ from the simulation

    def _submitted(self, state: RequestState, instance: Instance) -> None:
        stream = self._streams[state.request.index]
        stream.instance = instance.log.index
        if stream.done and instance.abort(state):  # its client left while the front end had it
            del self._streams[state.request.index]
            self.tables.forget(state.request)
            return
        if state.total_tokens == state.request.input_tokens + state.request.output_tokens:
            stream.state = state  # where it is decoded
        if self._audience and not stream.tokens and not stream.done:
            self._audience.taken(stream)

    def _ended(self, state: RequestState) -> None:
        stream = self._streams.pop(state.request.index)
        self.tables.forget(state.request)
        if stream.done:
            return
        before_ns = stream.last_token_ns
        times = self._token_times(state, stream.tokens, state.record.end_ns, {})
        if times:
            self._take_tokens(stream, state, times)
            if self._audience:
                self._audience.tokens(stream, before_ns, times)
        self._finish(stream, "length" if stream.limited else "stop")
        self._note_lateness(times)

    def _refused(self, index: int, reason: str) -> None:
        stream = self._streams.pop(index)
        self.tables.forget(stream.request)
        stream.refused = reason
        if self._audience:
            self._audience.refused(stream)
        stream.finish_reason = "error"
        self._count_calls(-1)
        if stream.receiver:
            stream.receiver.tell(stream)

    def _finish(self, stream: Stream, reason: str) -> None:
        stream.finish_reason = reason
        self._count_calls(-1)
        if self._audience:
            self._audience.ended(stream, reason)
        if stream.receiver:
            stream.receiver.tell(stream)

    def _count_calls(self, calls: int) -> None:
        if isinstance(self.pace, VirtualPace):
            self.pace.enter(calls)
            self.woken.set()

    @staticmethod
    def _take_tokens(stream: Stream, state: RequestState, times_ns: Sequence[int]) -> None:
        """A stream has got the tokens of steps that ended at these times."""
        if not stream.tokens:
            stream.cached_tokens = state.record.npu_hit + state.record.storage_hit
            stream.first_token_ns = times_ns[0]
        stream.tokens += len(times_ns)
        stream.last_token_ns = times_ns[-1]

    def _note_lateness(self, times_ns: Sequence[int]) -> None:
        """Tokens have gone out now."""
        if self._speed:
            now_ns = self.pace.now_ns()
            for time_ns in times_ns:
                self.late_ns.append(int((now_ns - time_ns) / self._speed))

    def _token_times(
        self, state: RequestState, seen: int, now_ns: int, latest: dict[tuple[int, int], list[int]]
    ) -> list[int]:
        """Ends in ns of the steps that made the tokens after the first ``seen``, up to ``now_ns``.

        ``latest`` keeps the step ends of a track from an entry on, for requests that go on together.
        """
        times: list[int] = []
        before = 0
        for track, first, last in state.record.token_steps:
            if seen < before + last - first + 1:
                start = first + max(seen - before, 0)
                times += self._track(track).since(start)[: last + 1 - start]
            before += last - first + 1
        if state.run_start >= 0:
            key = state.track, state.run_start + max(seen - before, 0)
            if key not in latest:
                latest[key] = self._track(state.track).since(key[1]).tolist()
            times += latest[key]
        while times and times[-1] > now_ns:
            times.pop()
        return times

    def _track(self, track: int) -> Tail:
        beyond = track - len(self.instances)
        ends = self._pipeline_tracks[beyond] if beyond >= 0 else self.instances[track].log.steps.end_ns
        return cast("Tail", ends)


def why_refused(engine: LiveEngine, request: Request) -> str:
    """Why a request can run on no instance; empty if it can on one."""
    reasons = [why_impossible(request, instance) for instance in engine.instances]
    return "" if "" in reasons else reasons[0]
