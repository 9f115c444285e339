"""The clock of a run: who acts when.

Everything that happens is an *action* of an *actor*: transfers that start or end, requests that arrive, step
loops. An actor has one place on the clock at most, and :meth:`Clock.at` moves it there. The clock pops the
earliest place, lets its actor act, and goes on until nobody has a place left::

    clock = Clock()
    bell = clock.actor(Order.REQUEST, lambda now_ns: print("ring", now_ns))
    clock.at(5, bell)
    clock.run()  # prints: ring 5

At equal times KV arrives first, then requests, and step loops act last. So a step that starts at some time
finds all that has arrived by then, whatever order the places were taken in.

Why a step loop may run ahead: between two events that concern it, what it does is nobody else's business, and
popping every one of a million decode steps would cost more than the steps. So a loop asks for the horizon
(:meth:`Clock.horizon_ns`) and does everything before it in one go.
"""

from __future__ import annotations

from enum import IntEnum
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NewType

from servesim.network.links import NEVER as NEVER

if TYPE_CHECKING:
    from collections.abc import Callable

Actor = NewType("Actor", int)
"""Number of an actor on its clock; see :meth:`Clock.actor`."""


class Order(IntEnum):
    """Who acts first at equal times; of the same order, whoever was made an actor first."""

    KV = 0
    REQUEST = 1
    STEP = 2


class Clock:
    """Simulated time in ns, and the places of those who will act."""

    __slots__ = ("_acts", "_due", "_early", "_limit_ns", "_places", "_watch_ns", "_watchers", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        """Time of the present action."""
        self._acts: list[tuple[Order, Callable[[int], None]]] = []
        self._due: list[int] = []
        """Actor -> when it acts next, :data:`NEVER` if it has no place."""
        self._places: list[tuple[int, int, int]] = []
        """Heap of (ns, order, actor). A place that its actor has left stays behind and is skipped when it
        comes up: taking it out would cost a search."""
        self._early: list[int] = []
        """Actors that are not step loops."""
        self._watchers: list[tuple[int, Callable[[int], int]]] = []
        self._watch_ns = NEVER
        """The earliest time of ``_watchers``."""
        self._limit_ns = NEVER
        """Nobody looks further ahead than this."""

    def actor(self, order: Order, act: Callable[[int], None]) -> Actor:
        """A new actor, without a place yet; ``act`` is called with the time."""
        number = len(self._acts)
        self._acts.append((order, act))
        self._due.append(NEVER)
        if order is not Order.STEP:
            self._early.append(number)
        return Actor(number)

    def at(self, ns: int, actor: Actor) -> None:
        """Let ``actor`` act at ``ns`` and not when it would have before; :data:`NEVER`: not at all.

        Raises:
            OverflowError: the time is past :data:`NEVER`.
        """
        if ns > NEVER:
            raise OverflowError("simulated time")
        if ns != self._due[actor]:
            self._due[actor] = ns
            if ns < NEVER:
                heappush(self._places, (ns, self._acts[actor][0], actor))

    def due_ns(self, actor: Actor) -> int:
        """When ``actor`` acts next, :data:`NEVER` if it has no place."""
        return self._due[actor]

    def watch(self, ns: int, look: Callable[[int], int]) -> None:
        """Call ``look`` with the time before the first action at or after ``ns``.

        It returns from when on it wants to look again. A watcher keeps no run going.
        """
        self._watchers.append((ns, look))
        self._watch_ns = min(self._watch_ns, ns)

    @property
    def watch_ns(self) -> int:
        """When somebody looks at the run next."""
        return self._watch_ns

    def horizon_ns(self, alone: bool) -> int:
        """Until when nothing can concern the step loop that acts now.

        ``alone``: what other step loops do concerns it neither.
        """
        due = self._due
        horizon = min(self._watch_ns, self._limit_ns)
        for actor in self._early:
            if due[actor] < horizon:
                horizon = due[actor]
        if not alone:
            places = self._places
            while places and due[places[0][2]] != places[0][0]:
                heappop(places)
            if places and places[0][0] < horizon:
                horizon = places[0][0]
        return horizon

    def run(self) -> None:
        """Let everybody act in order of time, until nobody has a place."""
        self.run_until(NEVER)

    def run_until(self, until_ns: int) -> int:
        """Let everybody act in order of time who is due at or before ``until_ns``, and nobody look further.

        Returns when the next is due, :data:`NEVER` if nobody has a place. It serves those who follow another
        clock: what happens after ``until_ns`` may still change.
        """
        self._limit_ns = until_ns + 1
        places, due, acts = self._places, self._due, self._acts
        while places and places[0][0] <= until_ns:
            now, _, actor = heappop(places)
            if due[actor] != now:
                continue
            if now >= self._watch_ns:
                self._look(now)
            due[actor] = NEVER
            self.now_ns = now
            acts[actor][1](now)
        while places and due[places[0][2]] != places[0][0]:
            heappop(places)
        return places[0][0] if places else NEVER

    def _look(self, now_ns: int) -> None:
        self._watchers = [(look(now_ns) if now_ns >= ns else ns, look) for ns, look in self._watchers]
        self._watch_ns = min(ns for ns, _ in self._watchers)
