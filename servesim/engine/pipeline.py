"""Which requests of a pipeline can be scheduled in which step.

A pipeline has several batches in flight. With synchronous scheduling a request is in one of them at a time:
its decode set travels with the batch and comes back when that has ended. With asynchronous scheduling, as
vLLM's second model runner does it, a request that was given a token is scheduled again as many schedules
later as there are stages (``next_decode_eligible_step``), whether or not that token is known: the requests
form a ring of decode sets that take turns. Schedules that come out empty count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.engine.request_state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.engine.batch import Batch
    from servesim.engine.decode_set import DecodeSet
    from servesim.engine.request_state import RequestState


class Pipeline:
    """The decode sets of a pipeline and the batches in flight."""

    __slots__ = ("_awaits_chunks", "_new", "_spare", "_turn", "in_flight", "ring")

    def __init__(
        self, new_decodes: Callable[[], DecodeSet], ring: int = 0, *, awaits_chunks: bool = True
    ) -> None:
        """
        Args:
            new_decodes: makes a decode set with a track of its own.
            ring: stages with asynchronous scheduling; 0: a request is in one batch at a time.
            awaits_chunks: whether a request that is preempted while a chunk of its prompt is in flight is
                admitted again only after that.
        """
        self._awaits_chunks = awaits_chunks
        self._new = new_decodes
        self._spare: list[DecodeSet] = []
        self._turn = 0
        self.ring = [new_decodes() for _ in range(ring)]
        """Decode sets that take turns; empty with synchronous scheduling."""
        self.in_flight: list[Batch] = []

    def first(self) -> DecodeSet:
        """The decode set of the first schedule."""
        return self.ring[0] if self.ring else self._new()

    def next_set(self) -> DecodeSet | None:
        """Whose turn it is; a schedule begins. None with synchronous scheduling: all that are back have
        it."""
        if not self.ring:
            return None
        self._turn = (self._turn + 1) % len(self.ring)
        return self.ring[self._turn - 1]

    def sent(self, batch: Batch, decodes: DecodeSet) -> None:
        """A batch with the requests of ``decodes`` is on its way."""
        batch.travelling = decodes
        batch.track_step = len(decodes.token_times)
        self.in_flight.append(batch)
        decodes.send(batch)

    def behind(self, decodes: DecodeSet, sent: bool) -> DecodeSet:
        """Where requests go that this schedule could not serve any more."""
        if self.ring:
            return self.ring[self._turn]
        if not sent:
            return decodes
        return self._spare.pop() if self._spare else self._new()

    def back(self, batch: Batch, ready: DecodeSet) -> DecodeSet:
        """A batch has ended; returns the set of those that can be scheduled now."""
        self.in_flight.remove(batch)
        back = batch.travelling
        assert back is not None
        back.receive(batch)
        for state in batch.awaited_by:
            state.awaits_token = False
        if self.ring:
            return ready
        # the smaller set moves into the larger one: filing a request costs
        ready, other = (ready, back) if ready.count > back.count else (back, ready)
        if other.count:
            ready.absorb(other)
        self._spare.append(other)
        return ready

    def computes(self, state: RequestState) -> Batch | None:
        """The newest batch in flight that computes for a running request."""
        home = state.home
        if state.phase is Phase.DECODE and home is not None:
            return home.flying if took_part(state, home) else None
        if state.phase is Phase.PREFILL:
            return state.chunk if self._awaits_chunks and state.chunk in self.in_flight else None
        return next((batch for batch in self.in_flight if state in batch.finishing), None)

    def was_ahead(self, state: RequestState) -> bool:
        """Whether the newest batch of a request was scheduled while the token before was in flight."""
        home = state.home
        return home is not None and not home.knew and state.run_start < len(home.token_times) - 1

    def await_batch(self, batch: Batch, victim: RequestState) -> None:
        """Keep a preempted request from being admitted until a batch that computes for it has ended."""
        batch.awaited_by = [*batch.awaited_by, victim]
        victim.awaits_token = True


def took_part(state: RequestState, home: DecodeSet) -> bool:
    """Whether a request was in the newest batch of its decode set."""
    return state.run_start < len(home.token_times)
