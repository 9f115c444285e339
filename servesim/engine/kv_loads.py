"""Requests that wait with blocks in hand for KV that a connector reads, and blocks that come back late.

A connector can read KV *beside* the steps (vLLM: ``load_kv_async``, status ``WAITING_FOR_REMOTE_KVS``). What
happens to a waiting request then:

1. The queue comes to it, and a connector has KV for it. It gets blocks for that KV and no more, if they are
   free beyond what others that are under way still need (:meth:`KvLoads.reserved`). The read begins.
2. It is passed over, and others overtake it. Nobody can take its blocks.
3. The last byte is there (:meth:`KvLoads.arrive`).
4. The queue comes to it again: its blocks become visible to other requests (:meth:`KvLoads.take_up`), and it
   is admitted with these tokens computed, as soon as token budget and blocks for the rest allow. If that is
   its whole prompt, the last token is computed again, for its logits.

Such a read is not ordered against the steps on the NPU. So blocks that a step in flight may still write to
must not be handed out before it has ended: :class:`LateFrees`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from servesim.engine.request_state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from servesim.engine.request_state import RequestState
    from servesim.memory.block_pool import BlockPool
    from servesim.memory.kv_cache import AnyKvCache


def _nobody(now_ns: int) -> None:
    """Whoever looks at the scheduler all the time need not be told."""


class KvLoads:
    """The requests of one scheduler that wait with blocks in hand."""

    __slots__ = ("_arrived", "_kv", "first", "holding", "wake")

    def __init__(self, kv: AnyKvCache, *, first: bool) -> None:
        """
        Args:
            kv: the cache that their blocks are of.
            first: whether they come before all other waiting requests; if not, they keep their places.
        """
        self._kv = kv
        self.first = first
        self.holding: dict[RequestState, None] = {}
        """Requests that wait with blocks in hand, in the order in which they got them."""
        self._arrived: set[RequestState] = set()
        """Those of them whose KV is there."""
        self.wake: Callable[[int], None] = _nobody
        """See :meth:`call`."""

    @property
    def ahead(self) -> int:
        """Requests at the head of the queue that come before all others whatever the queue policy says."""
        return len(self.holding) if self.first else 0

    @property
    def under_way(self) -> bool:
        """Whether any read goes on."""
        return len(self._arrived) < len(self.holding)

    def call(self, wake: Callable[[int], None]) -> None:
        """Call ``wake`` with the time when KV is there and the scheduler may have to look again."""
        self.wake = wake

    def begin(self, state: RequestState, tokens: int) -> None:
        """A waiting request has got blocks for its first ``tokens`` tokens, and their KV is being read."""
        state.phase = Phase.LOADING
        state.loaded = tokens
        self.holding[state] = None

    def arrive(self, state: RequestState) -> None:
        """The KV of a request is there."""
        self._arrived.add(state)

    def take_up(self, state: RequestState) -> bool:
        """The queue has come to a request that waits for KV; False if that is not there yet."""
        if state not in self._arrived:
            return False
        state.phase = Phase.WAITING
        self._kv.register_shared(state.table, state.loaded)
        state.loaded = min(state.loaded, state.known - 1)
        return True

    def leave(self, state: RequestState) -> None:
        """A request that waited with blocks in hand is admitted."""
        state.loaded = -1
        del self.holding[state]
        self._arrived.discard(state)

    def reserved(self, prefilling: Iterable[RequestState]) -> int:
        """Blocks that requests under way still need to hold all their known tokens: those whose KV is read,
        and the running ones that still prefill."""
        kv, free = self._kv, self._kv.pool.num_free
        under_way = [*prefilling, *self.holding]
        return sum(max(kv.shortage(state.table, state.known) + free, 0) for state in under_way)


class LateFrees:
    """Blocks of requests that lost them while a step in flight might still write to them."""

    __slots__ = ("_kept", "ended", "scheduled", "spares")

    def __init__(self, *, spares: bool) -> None:
        """``spares``: whether a running request that a step in flight computes for is not preempted at all,
        since that would free nothing now."""
        self.spares = spares
        self.scheduled = -1
        """The last step that was scheduled."""
        self.ended = -1
        """The last step that has ended."""
        self._kept: deque[tuple[int, list[int], int, int]] = deque()
        """(last step scheduled by then, blocks, how many are hashed, how many are full)."""

    @property
    def pending(self) -> bool:
        """Whether blocks are still to be given back."""
        return bool(self._kept)

    def note_scheduled(self, step: int) -> None:
        """Step ``step`` is the last that was scheduled."""
        self.scheduled = step

    def keep(self, blocks: list[int], num_hashed: int, num_full: int) -> None:
        """Give blocks back when the steps scheduled so far have ended; see :meth:`BlockPool.free`."""
        self._kept.append((self.scheduled, blocks, num_hashed, num_full))

    def end(self, step: int, pool: BlockPool) -> bool:
        """A step has ended; whether blocks were given back to ``pool`` therefore."""
        self.ended = step
        gave = False
        while self._kept and self._kept[0][0] <= step:
            _, blocks, num_hashed, num_full = self._kept.popleft()
            pool.free(blocks, num_hashed, num_full)
            gave = True
        return gave
