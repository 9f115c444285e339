"""When the block tables of decoding requests change, where groups of layers keep different things.

With full attention alone a table changes when a block is full. Here it also changes when a block falls behind
a window, which depends on what is in flight: a block is kept until the steps that may read it have ended. So
a request is looked at whenever its length passes one of a few numbers modulo the block size, in the two steps
after anything else than one token was computed for it, and whenever what is in flight begins or ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from servesim.engine.decode_set import by_order
from servesim.engine.request_state import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim.engine.decode_set import DecodeSet
    from servesim.engine.request_state import RequestState
    from servesim.memory.group_cache import GroupedKvCache
    from servesim.memory.kv_cache import AnyKvCache

_UNSETTLED_STEPS = 2


class GroupChanges:
    """What a scheduler remembers for a cache of several groups."""

    __slots__ = (
        "_changed",
        "_flying",
        "_in_flight",
        "_kv",
        "_lag",
        "_lags",
        "_last",
        "_residues",
        "_unsettled",
    )

    def __init__(self, kv: AnyKvCache, *, pipelined: bool) -> None:
        """
        Args:
            kv: the cache.
            pipelined: whether a request is in one batch at a time, so that nothing of it is in flight when it
                is scheduled.
        """
        self._kv = cast("GroupedKvCache", kv)
        self._lags = self._kv.rules.frees_settled and not pipelined
        """Whether tokens in flight hold blocks back."""
        self._lag = 0
        """Tokens in flight of a request that only decodes."""
        self._residues = [self._kv.residues(0), self._kv.residues(1)]
        self._in_flight: dict[RequestState, int] = {}
        """Tokens in the last batch of those that had another number of them than a decode."""
        self._last: dict[RequestState, int] = {}
        """The same of the batch that is being scheduled."""
        self._flying = 0
        """Tokens in flight of a request in a quiet stretch, whether or not they hold blocks back."""
        self._changed = True
        """Whether the lag is another one than in the last batch."""
        self._unsettled: dict[RequestState, int] = {}
        """Requests to look at whatever their length -> for how many steps."""

    def new_step(self, in_flight: bool) -> None:
        """A step is about to be scheduled, with or without another one in flight."""
        self._kv.new_step()
        self._last = {}
        lag = int(in_flight and self._lags)
        if lag != self._lag:
            self._lag, self._changed = lag, True

    def due(self, decodes: DecodeSet) -> list[RequestState]:
        """Decoding requests whose tables may change in this step, in admission order."""
        if self._changed:
            return decodes.everyone()
        found = [*decodes.at_residues(self._residues[self._lag])]
        more = [s for s in self._unsettled if s.phase is Phase.DECODE and s.home is decodes]
        if not more:
            return found
        return sorted({*found, *more}, key=by_order)

    def release(self, state: RequestState, computed: int, known: int) -> None:
        """Give back what a running request with ``computed`` tokens, some perhaps in flight, needs no
        more; ``known``: those of them that are known."""
        done = computed
        if self._lag:
            done -= self._in_flight.get(state, int(state.phase is Phase.DECODE))
        self._kv.release(state.table, done, known)

    def note_chunk(self, state: RequestState, tokens: int) -> None:
        """``tokens`` tokens of a prompt are in the batch that is being scheduled."""
        self._last[state] = tokens

    def scheduled(self, completed: Iterable[RequestState], stalled: Iterable[RequestState]) -> None:
        """The batch is complete, and not empty: with it these prompts are, and these decodes are left out."""
        self._changed = False
        left = {state: steps - 1 for state, steps in self._unsettled.items() if steps > 1}
        self._unsettled = left | dict.fromkeys((*completed, *stalled), _UNSETTLED_STEPS)
        self._in_flight = self._last | dict.fromkeys(stalled, 0)

    # ------------------------------------------------------------------ quiet stretches

    def quiet_ticks(self, most: int, count: int, free: int, in_flight: bool) -> int:
        """Of the next ``most`` steps of ``count`` decodes, how many find room in ``free`` blocks whatever
        windows give back; ``in_flight``: each follows a step in flight."""
        if self._changed or self._unsettled or int(in_flight and self._lags) != self._lag:
            return 0
        self._flying = int(in_flight)
        while most and count * self._kv.blocks_for(most) > free:
            most //= 2
        return most

    def run_quietly(self, decodes: DecodeSet, ticks: int, unknown: int) -> list[int]:
        """The tables of ``ticks`` steps that :meth:`quiet_ticks` has vouched for; returns the blocks in use
        after each. ``unknown``: of a request's computed tokens, those not known at the first of them."""
        kv, lag, residues = self._kv, self._lag, self._residues[self._lag]
        pool, used = kv.pool, []
        self._in_flight = {}
        for ahead in range(ticks):
            for state in decodes.at_residues(residues, ahead):
                computed = decodes.length(state) + ahead
                kv.release(state.table, computed - lag, max(state.known, computed - unknown))
                kv.grow(state.table, computed + 1)
            unknown = self._flying
            used.append(pool.num_used)
        return used
