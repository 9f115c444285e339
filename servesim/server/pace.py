"""What time it is for an engine that follows another clock: the wall's, or that of clients who wait."""

from __future__ import annotations

import asyncio
from time import perf_counter, sleep
from typing import Protocol

from servesim.engine.clock import NEVER
from servesim.results.units import SECOND

_TIMER_S = 0.001
"""The event loop waits in whole milliseconds, rounded up; the rest of one is slept, and nothing else runs."""


class Pace(Protocol):
    """The clock that the simulation follows."""

    def now_ns(self) -> int:
        """The present simulated time."""

    async def wait(self, due_ns: int, woken: asyncio.Event) -> None:
        """Come back when ``due_ns`` has come or ``woken`` is set, whatever is first."""


class WallPace:
    """Simulated time goes ``speed`` times as fast as the wall clock."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._start_s = perf_counter()

    def now_ns(self) -> int:
        return int((perf_counter() - self._start_s) * self.speed * SECOND)

    async def wait(self, due_ns: int, woken: asyncio.Event) -> None:
        if due_ns >= NEVER:
            await woken.wait()
            return
        left_s = self._left_s(due_ns)
        if left_s <= 0 or woken.is_set():
            await asyncio.sleep(0)
            return
        early_s = _TIMER_S if left_s > _TIMER_S else 0.0
        timer = asyncio.get_running_loop().call_later(left_s - early_s, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()
        if 0 < (left_s := self._left_s(due_ns)) <= early_s:
            sleep(left_s)

    def _left_s(self, due_ns: int) -> float:
        return (due_ns - self.now_ns()) / SECOND / self.speed


class VirtualPace:
    """Time stands still until ``clients`` calls wait for it, and then goes on to the next thing that happens.

    A call is a request that has not ended, or a sleep in simulated time. So what clients compute takes no
    simulated time, and the same clients see the same run twice.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self._now_ns = 0
        self._waiting = 0
        self._sleeps: list[tuple[int, asyncio.Event]] = []

    def now_ns(self) -> int:
        return self._now_ns

    def expect(self, clients: int, woken: asyncio.Event) -> None:
        """Let time go on when so many calls wait, from now on."""
        self.clients = clients
        woken.set()

    def enter(self, calls: int = 1) -> None:
        """So many more calls wait; fewer, if negative."""
        self._waiting += calls

    @property
    def stands_still(self) -> bool:
        """Whether a client is still at work."""
        return self._waiting < max(self.clients, 1)

    async def sleep(self, seconds: float, woken: asyncio.Event) -> None:
        """Come back after so many simulated seconds."""
        over = asyncio.Event()
        self._sleeps.append((self._now_ns + round(seconds * SECOND), over))
        self.enter()
        woken.set()
        await over.wait()

    async def wait(self, due_ns: int, woken: asyncio.Event) -> None:
        await asyncio.sleep(0)
        first_ns = min([due_ns, *(ns for ns, _ in self._sleeps)])
        if woken.is_set():
            return
        if self.stands_still or first_ns >= NEVER:
            await woken.wait()
            return
        self._now_ns = max(self._now_ns, first_ns)
        for ns, over in self._sleeps:
            if ns <= self._now_ns:
                self.enter(-1)
                over.set()
        self._sleeps = [(ns, over) for ns, over in self._sleeps if ns > self._now_ns]
