"""Which waiting request is admitted first, and which running one has to go when no block is free.

The scheduler looks at the requests of its queue (:class:`WaitingQueue`) from the head on. It only ever
admits the head, and what blocks the head blocks all behind it, as in vLLM. Only a request whose LoRA adapter
finds no slot, or whose KV is being read, is passed over; it is looked at first from then on. A policy keeps
the queue in its order and decides nothing else; token budget, blocks and the order in which running requests
are served stay with the scheduler.

Another policy is a class in a file of its own and a line in :data:`QUEUE_POLICIES`.
"""

from __future__ import annotations

import importlib
from bisect import insort
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.kv_loads import KvLoads
    from servesim.engine.request_state import RequestState

QUEUE_POLICIES = {
    "fcfs": "servesim.engine.queue_policy:FirstComeFirstServed",
    "priority": "servesim.engine.queue_policy:ByPriority",
}
"""Name -> module:class; a class is called without arguments, once for every instance."""

_by_rank = attrgetter("rank")


class QueuePolicy(Protocol):
    """The order of a queue and the choice of a victim."""

    @property
    def strikes_anywhere(self) -> bool:
        """Whether a victim may have been served in this step already; if not, it is never before the request
        that needs a block."""

    def add(self, waiting: deque[RequestState], state: RequestState) -> None:
        """Put a request that has arrived into the queue."""

    def put_back(self, waiting: deque[RequestState], state: RequestState, passed_over: int) -> None:
        """Put a request that was preempted into the queue, at whose head ``passed_over`` requests have been
        passed over before."""

    def victim(self, running: Sequence[RequestState], first: int) -> int:
        """The place in ``running`` of the request to be preempted.

        Args:
            running: those that run, in admission order, which is the order in which they are served.
            first: place of the request that needs a block; it can go itself. Those before it have had their
                turn in this step, and go only if the policy :attr:`strikes_anywhere`.
        """


class FirstComeFirstServed:
    """FCFS: the queue is in order of arrival, preempted requests come first, the last admitted goes first."""

    strikes_anywhere = False

    def add(self, waiting: deque[RequestState], state: RequestState) -> None:
        """See :class:`QueuePolicy`."""
        waiting.append(state)

    def put_back(self, waiting: deque[RequestState], state: RequestState, passed_over: int) -> None:
        """See :class:`QueuePolicy`."""
        waiting.insert(passed_over, state)

    def victim(self, running: Sequence[RequestState], first: int) -> int:
        """See :class:`QueuePolicy`."""
        del first
        return len(running) - 1


class ByPriority:
    """The queue is in order of priority (a smaller number first), then of arrival.

    The running request that is last in this order goes first; of several that arrived together, the one that
    was admitted first.
    """

    strikes_anywhere = True

    def add(self, waiting: deque[RequestState], state: RequestState) -> None:
        """See :class:`QueuePolicy`."""
        insort(waiting, state, key=_by_rank)

    def put_back(self, waiting: deque[RequestState], state: RequestState, passed_over: int) -> None:
        """See :class:`QueuePolicy`."""
        del passed_over
        insort(waiting, state, key=_by_rank)

    def victim(self, running: Sequence[RequestState], first: int) -> int:
        """See :class:`QueuePolicy`."""
        del first
        return max(range(len(running)), key=lambda place: running[place].rank[:2])


class WaitingQueue:
    """The waiting requests of one scheduler, in the order in which it looks at them.

    Where those that wait with blocks in hand come first, the policy orders them among themselves, and the
    others among themselves.
    """

    __slots__ = ("_loads", "_policy", "passed_over", "requests")

    def __init__(self, policy: QueuePolicy, loads: KvLoads | None = None) -> None:
        """``loads``: knows who waits with blocks in hand; None: nobody does."""
        self._policy = policy
        self._loads = loads
        self.requests: deque[RequestState] = deque()
        """Always the same object."""
        self.passed_over = 0
        """How many of them are passed over; see :attr:`RequestState.passed_over`."""

    def add(self, state: RequestState) -> None:
        """Put a request that has arrived into the queue."""
        holders = self._take_holders()
        self._policy.add(self.requests, state)
        self.requests.extendleft(reversed(holders))

    def put_back(self, state: RequestState, *, behind_passed_over: bool) -> None:
        """Put a request that was preempted into the queue."""
        holders = self._take_holders()
        self._policy.put_back(self.requests, state, self.passed_over if behind_passed_over else 0)
        self.requests.extendleft(reversed(holders))

    def put_ahead(self, state: RequestState, place: int) -> None:
        """Put the request at ``place``, which waits with blocks in hand from now on, among those that do."""
        del self.requests[place]
        holders = self._take_holders()
        self._policy.add(holders, state)
        self.requests.extendleft(reversed(holders))

    def pass_over(self, state: RequestState) -> None:
        """Look at the request behind this one, which is looked at first from now on."""
        self.passed_over += not state.passed_over
        state.passed_over = True

    def take_out(self, state: RequestState, place: int) -> None:
        """Take a request out, which is at ``place``."""
        if place:
            del self.requests[place]
        else:
            self.requests.popleft()
        self.passed_over -= state.passed_over
        state.passed_over = False

    def _take_holders(self) -> deque[RequestState]:
        """Take those that wait with blocks in hand from the head, if their place is there."""
        ahead = self._loads.ahead if self._loads else 0
        return deque([self.requests.popleft() for _ in range(ahead)])


def queue_policy(name: str) -> QueuePolicy:
    """A new object of the policy called ``name``."""
    module, _, attribute = QUEUE_POLICIES[name].partition(":")
    policy: QueuePolicy = getattr(importlib.import_module(module), attribute)()
    return policy
