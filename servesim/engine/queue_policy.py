"""Which waiting request is admitted first, and which running one has to go when no block is free.

A policy keeps the scheduler's queue in its order: the scheduler only ever admits the head, and what blocks
the head blocks all behind it, as in vLLM. A policy decides nothing else; token budget, blocks and the order
in which running requests are served stay with the scheduler.

Another policy is a class in a file of its own and a line in :data:`QUEUE_POLICIES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from servesim.engine.request_state import RequestState

QUEUE_POLICIES = {
    "fcfs": "servesim.engine.queue_policy:FirstComeFirstServed",
}
"""Name -> module:class; a class is called without arguments, once for every instance."""

QUEUE_POLICY = "fcfs"
"""The policy of every instance, vLLM's default."""


class QueuePolicy(Protocol):
    """The order of a queue and the choice of a victim."""

    def add(self, waiting: deque[RequestState], state: RequestState) -> None:
        """Put a request that has arrived into the queue."""

    def put_back(self, waiting: deque[RequestState], state: RequestState) -> None:
        """Put a request that was preempted into the queue."""

    def victim(self, running: Sequence[RequestState], first: int) -> int:
        """The place in ``running`` of the request to be preempted.

        Args:
            running: those that run, in admission order, which is the order in which they are served.
            first: place of the request that needs a block. Those before it have been served in this step
                already and cannot go any more; it can go itself.
        """


class FirstComeFirstServed:
    """FCFS: the queue is in order of arrival, preempted requests come first, the last admitted goes first."""

    def add(self, waiting: deque[RequestState], state: RequestState) -> None:
        """See :class:`QueuePolicy`."""
        waiting.append(state)

    def put_back(self, waiting: deque[RequestState], state: RequestState) -> None:
        """See :class:`QueuePolicy`."""
        waiting.appendleft(state)

    def victim(self, running: Sequence[RequestState], first: int) -> int:
        """See :class:`QueuePolicy`."""
        del first
        return len(running) - 1


def queue_policy(name: str = QUEUE_POLICY) -> QueuePolicy:
    """A new object of the policy called ``name``."""
    module, _, attribute = QUEUE_POLICIES[name].partition(":")
    policy: QueuePolicy = getattr(importlib.import_module(module), attribute)()
    return policy
