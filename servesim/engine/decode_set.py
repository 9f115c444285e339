"""The requests of an instance that decode, kept so that a step costs only what changes.

From its first decode step on, everything about a request is known: it grows by one token a step, needs a new
block whenever its length reaches a multiple of the block size, and ends at a known step. So time is counted
in *ticks* (steps in which the decoding requests advance), and a request is filed under the ticks at which
something happens to it: under ``tick % block_size`` for its block boundaries and under the tick of its last
token. Its KV length is a constant plus the tick, and so are the sum, the smallest and the largest length of
all.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from servesim.engine.batch import Batch
    from servesim.engine.request_state import RequestState

by_order = attrgetter("order")

NO_END: Final = 1 << 60
"""A tick that never comes."""


class DecodeSet:
    """Decoding requests of one instance and the calendars they are filed in."""

    __slots__ = (
        "_block_size",
        "_boundaries",
        "_end_ticks",
        "_ends",
        "base_sum",
        "bases",
        "count",
        "flying",
        "joined",
        "knew",
        "sharing",
        "tick",
        "token_times",
        "track",
    )

    def __init__(self, block_size: int, track: int = 0, token_times: array[int] | None = None) -> None:
        self.track = track
        """Index of the track on which the times of these requests' tokens are noted."""
        self.token_times = array("q") if token_times is None else token_times
        """The track itself: end in ns of every step of these requests."""
        self.tick = 0
        self.count = 0
        self.flying: Batch | None = None
        """In a pipeline: the newest batch of these requests, while it is in flight."""
        self.knew = True
        """Whether nothing of them was in flight when that batch was scheduled."""
        self.joined: set[RequestState] = set()
        """Requests that came since from another set, or sat out the last step: nothing of them is in
        flight."""
        self.sharing: set[RequestState] = set()
        """Requests with blocks yet to be made visible to other requests."""
        self._ends: dict[int, list[RequestState]] = {}
        """Tick → requests whose last token is produced at it."""
        self._end_ticks: list[int] = []
        """The keys of ``_ends``, rising; keys that are gone are dropped when they come up."""
        self._block_size = block_size
        self._boundaries: list[list[RequestState]] = [[] for _ in range(block_size)]
        self.bases: list[int] = []
        """``decode_base`` of every request, rising."""
        self.base_sum = 0

    def add(self, state: RequestState) -> None:
        """File a request that has ``known`` computed tokens and decodes from the next tick on.

        If they are all it will have, its last token is in flight and not known to be the last: it stays until
        :meth:`drop`.
        """
        base = state.known - self.tick
        state.home = self
        state.decode_base = base
        state.last_tick = state.total_tokens - 2 - base
        insort(self.bases, base)
        self.base_sum += base
        self.count += 1
        if state.last_tick in self._ends:
            self._ends[state.last_tick].append(state)
        elif state.last_tick >= self.tick:
            self._ends[state.last_tick] = [state]
            insort(self._end_ticks, state.last_tick)
        if state.table.awaits_hash:
            self.sharing.add(state)
        filed = self._boundaries[-base % self._block_size]
        if not filed or filed[-1].order < state.order:  # mostly: who was admitted last decodes last
            filed.append(state)
        else:
            insort(filed, state, key=by_order)

    def remove(self, state: RequestState) -> None:
        """Take a request out of every calendar."""
        self.drop(state)
        if state.last_tick < self.tick:
            return  # its last token is in flight
        ending = self._ends[state.last_tick]
        ending.remove(state)
        if not ending:
            del self._ends[state.last_tick]

    def drop(self, state: RequestState) -> None:
        """Take out a request whose last token has come, which its stop token made known only now."""
        base = state.decode_base
        del self.bases[bisect_left(self.bases, base)]
        self.base_sum -= base
        self.count -= 1
        self._boundaries[-base % self._block_size].remove(state)
        self.sharing.discard(state)
        self.joined.discard(state)

    def send(self, batch: Batch) -> None:
        """A batch of these requests is in flight from now on."""
        self.knew = self.flying is None
        self.flying = batch
        self.joined.clear()

    def receive(self, batch: Batch) -> None:
        """A batch of these requests has ended."""
        if self.flying is batch:
            self.flying = None

    def length(self, state: RequestState) -> int:
        """Computed tokens of a decoding request before the present tick."""
        return state.decode_base + self.tick

    def at_boundary(self, ahead: int = 0) -> list[RequestState]:
        """Requests whose length is a multiple of the block size ``ahead`` ticks from now, in admission
        order."""
        return self._boundaries[(self.tick + ahead) % self._block_size]

    def at_residues(self, residues: Iterable[int], ahead: int = 0) -> list[RequestState]:
        """Requests whose length is one of ``residues`` modulo the block size ``ahead`` ticks from now, in
        admission order."""
        at, size = self.tick + ahead, self._block_size
        found = [filed for residue in residues if (filed := self._boundaries[(at - residue) % size])]
        if len(found) == 1:
            return found[0]
        return sorted((state for filed in found for state in filed), key=by_order)

    def everyone(self) -> list[RequestState]:
        """All requests, in admission order."""
        return sorted((state for filed in self._boundaries for state in filed), key=by_order)

    def lengths(self) -> tuple[int, int, int]:
        """Sum, minimum and maximum of the KV lengths before the present tick (zeros when nothing decodes)."""
        if not self.count:
            return 0, 0, 0
        tick, bases = self.tick, self.bases
        return self.base_sum + self.count * tick, bases[0] + tick, bases[-1] + tick

    def each_length(self) -> list[int]:
        """KV length of every request before the present tick, rising."""
        return [base + self.tick for base in self.bases]

    @property
    def next_end(self) -> int:
        """The tick at which the next request ends; a tick that never comes where the last tokens of all are
        in flight."""
        ticks = self._end_ticks
        while ticks and ticks[0] not in self._ends:
            del ticks[0]
        return ticks[0] if ticks else NO_END

    def next_end_from(self, tick: int) -> int:
        """The first tick from ``tick`` on, one that will come soon, at which a request ends; :data:`NO_END`
        if there is none."""
        ends = self._ends
        for end_tick in self._end_ticks:
            if end_tick >= tick and end_tick in ends:
                return end_tick
        return NO_END

    def ending_at(self, tick: int) -> Sequence[RequestState]:
        """Requests whose last token is produced at ``tick``."""
        return self._ends.get(tick, ())

    def advance(self) -> Iterable[RequestState]:
        """Give every request one token; returns those for which it is the last one (no longer filed here)."""
        ended = self._ends.pop(self.tick, ())
        for state in ended:
            if not state.stops:
                self.drop(state)
        self.tick += 1
        return ended

    def skip(self, ticks: int) -> None:
        """Give every request ``ticks`` tokens, none of them a last one."""
        self.tick += ticks

    def absorb(self, other: DecodeSet) -> None:
        """Take over all requests of ``other``; their next token will be noted on this set's track."""
        for state in [state for filed in other._boundaries for state in filed]:
            state.known = other.length(state)
            other.remove(state)
            state.end_run(len(other.token_times) - 1)
            state.run_start, state.track = len(self.token_times), self.track
            self.add(state)

    def blocks_needed(self, ticks: int) -> list[int]:
        """New blocks needed at each of the next ``ticks`` ticks."""
        sizes = [len(filed) for filed in self._boundaries]
        start = self.tick % self._block_size
        cycle = sizes[start:] + sizes[:start]
        rounds, rest = divmod(ticks, self._block_size)
        return cycle * rounds + cycle[:rest]
