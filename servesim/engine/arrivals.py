"""When requests enter the system: at their own time, when a predecessor has ended, or when a place is
free."""

from __future__ import annotations

from array import array
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from servesim.engine.clock import NEVER as NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.engine.request_state import RequestState
    from servesim.results.records import RunLog
    from servesim.workload.request import Workload

TURNED_AWAY = "turned away (503)"
"""How the reason begins of a request that found the server full."""
_FRONT_END = 3  # what the random stream is for, the second word of its seed


_LEAST_DRAWN = 4096


class QueueLimits:
    """How many requests, and of how many prompt tokens, a server lets in before it turns others away.

    As in vLLM's API server, a prompt counts in full until its first token is out.
    """

    def __init__(self, most_requests: int | None, most_tokens: int | None, log: RunLog) -> None:
        """
        Args:
            most_requests: that may be unfinished; None: any number.
            most_tokens: of prompts without a first token, with which no more is let in; None: any number.
            log: of the run, for the times of tokens.
        """
        self._most_requests = most_requests
        self._most_tokens = most_tokens
        self._log = log
        self._let_in: dict[int, RequestState] = {}

    def let_in(self, state: RequestState) -> None:
        """A request goes on to its instance."""
        self._let_in[state.request.index] = state

    def refusal(self, now_ns: int) -> str:
        """Why a request that arrives now is turned away; empty if it is not."""
        for index in [i for i, state in self._let_in.items() if 0 <= state.record.end_ns <= now_ns]:
            del self._let_in[index]
        most, there = self._most_requests, len(self._let_in)
        if most is not None and there >= most:
            return f"{TURNED_AWAY}: {there} requests are unfinished, and max_num_queued_reqs is {most}"
        most = self._most_tokens
        if most is None:
            return ""
        waiting = sum(s.prompt_tokens for s in self._let_in.values() if not self._has_token(s, now_ns))
        if waiting < most:
            return ""
        return (
            f"{TURNED_AWAY}: {waiting} prompt tokens wait for their first token, and "
            f"max_num_queued_tokens is {most}"
        )

    def _has_token(self, state: RequestState, now_ns: int) -> bool:
        track, entry = (
            state.record.token_steps[0][:2] if state.record.token_steps else (state.track, state.run_start)
        )
        beyond = track - len(self._log.instances)
        ends = self._log.instances[track].steps.end_ns if beyond < 0 else self._log.pipeline_tracks[beyond]
        return 0 <= entry < len(ends) and ends[entry] <= now_ns


class FrontEnds:
    """Requests on their way from the client to the engine.

    Each is there for the constant of its instance and an exponential part, a function of the seed and the
    request alone. All of it lies before the engine, though some of it is the way back of the
    tokens: latencies are the same, and a closed loop lets the next request in at the same time.
    """

    def __init__(self, times_us: Sequence[tuple[float, float]], num_requests: int, seed: int) -> None:
        """
        Args:
            times_us: of every instance the constant and the mean of the exponential part.
            num_requests: of the workload.
            seed: of the exponential parts.
        """
        self._times_us = times_us
        self._shares: NDArray[np.float64] | None = None
        if any(jitter for _, jitter in times_us):
            drawn = max(num_requests, _LEAST_DRAWN)  # a server does not know how many will come
            self._shares = np.random.default_rng((seed, _FRONT_END)).standard_exponential(drawn)
        self._due: list[tuple[int, int, RequestState]] = []

    def ns(self, instance: int, request: int) -> int:
        """Time that a request spends before this instance's engine, in whole µs."""
        constant, jitter = self._times_us[instance]
        shares = self._shares
        drawn = jitter * float(shares[request % len(shares)]) if shares is not None else 0.0
        return round(constant + drawn) * 1000

    @property
    def next_ns(self) -> int:
        """When the next one is through, :data:`NEVER` if none is on its way."""
        return self._due[0][0] if self._due else NEVER

    def send(self, state: RequestState, due_ns: int) -> None:
        """Let a request through at ``due_ns``."""
        heappush(self._due, (due_ns, state.request.index, state))

    def pop(self) -> RequestState:
        """The one that is through first."""
        return heappop(self._due)[2]


class Arrivals:
    """The requests still to come, in order of time and, at equal times, of index.

    A request of a session enters ``tool_ns`` after its predecessor ended. With ``max_concurrency`` (closed
    loop) a request whose time has come waits outside until fewer than that many are in the system; its
    arrival is the moment it is let in. Who has waited longest goes first, follow-ups of sessions included.
    """

    def __init__(self, workload: Workload, max_concurrency: int = 0) -> None:
        times_ns, indices = workload.column("arrival_ns"), workload.column("index")
        heads = np.flatnonzero(workload.column("predecessor") < 0)
        heads = heads[np.lexsort((indices[heads], times_ns[heads]))]
        self._planned_ns = array("q", times_ns[heads].tobytes())
        self._planned = array("q", indices[heads].tobytes())
        """Requests whose time is known beforehand, in their order."""
        self._next_planned = 0
        """The first of them that is not among ``_due``."""
        self._due: list[tuple[int, int]] = []
        """The next of them, and those that were released: a heap."""
        self._plan_next()
        followers = [request for request in workload.special if request.predecessor >= 0]
        self._tool_ns = {request.index: request.tool_ns for request in followers}
        self._successor = {request.predecessor: request.index for request in followers}
        self._cap = max_concurrency
        self._inside = 0
        self._held: deque[int] = deque()
        """Requests that wait outside, in the order in which their time came."""
        self._let_in: set[int] = set()
        """Those of ``_due`` for which a place inside is kept."""

    @property
    def last_planned_ns(self) -> int:
        """The last time that is known beforehand, 0 if there is none."""
        return self._planned_ns[-1] if self._planned_ns else 0

    @property
    def feedback(self) -> bool:
        """Whether the end of one request decides when another arrives."""
        return bool(self._cap or self._successor)

    @property
    def next_ns(self) -> int:
        """Time of the next arrival, :data:`NEVER` if none is known yet."""
        return self._due[0][0] if self._due else NEVER

    def pop(self) -> tuple[int, int] | None:
        """The next (time, request), or None if it has to wait outside."""
        time_ns, index = heappop(self._due)
        if index == self._planned[self._next_planned - 1]:
            self._plan_next()
        if index in self._let_in:
            self._let_in.remove(index)
            return time_ns, index
        if self._cap and self._inside >= self._cap:
            self._held.append(index)
            return None
        self._inside += 1
        return time_ns, index

    def _plan_next(self) -> None:
        place = self._next_planned
        if place < len(self._planned):
            heappush(self._due, (self._planned_ns[place], self._planned[place]))
            self._next_planned = place + 1

    def ended(self, index: int, now_ns: int) -> bool:
        """Tell that a request has left the system, which may release another; returns whether one may come
        at this very time."""
        self._inside -= 1
        successor = self._successor.get(index)
        at_once = bool(self._held)
        if successor is not None:
            at_once = at_once or not self._tool_ns[successor]
            heappush(self._due, (now_ns + self._tool_ns[successor], successor))
        if self._held:
            first = self._held.popleft()
            self._inside += 1
            self._let_in.add(first)
            heappush(self._due, (now_ns, first))
        return at_once

    def drop_successors(self, index: int) -> list[int]:
        """Remove and return the requests that can never arrive because ``index`` will not run."""
        dropped = []
        while (successor := self._successor.pop(index, None)) is not None:
            dropped.append(successor)
            index = successor
        return dropped
