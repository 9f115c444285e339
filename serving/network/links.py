"""Transfers that are under way at the same time share the links they cross.

A transfer crosses a set of *ports*: the way out of one instance, the way into another, a node's uplink, a
memory device. Whatever is open shares every port max-min fairly: all transfers speed up together until a port
is full, those through it stay at that rate, the others go on. Rates change only when a transfer opens or has
moved its last byte, so time passes from one such moment to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

NEVER = 1 << 62
"""A time after every other, in ns."""

_ROUNDING_NS = 1e-6  # a transfer that is late by less than this is in time: floating-point noise


@dataclass(slots=True, frozen=True)
class Port:
    """Something that moves at most ``bandwidth_gbs`` GB/s (1e9 bytes per second, so bytes per ns)."""

    name: str
    bandwidth_gbs: float


@dataclass(slots=True)
class _Flow:
    """A transfer that still moves bytes."""

    ports: tuple[Port, ...]
    floor_ns: int
    remaining_bytes: float
    rate: float = 0.0
    """Bytes per ns."""
    drained_ns: int = NEVER
    """When its last byte will have moved if no rate changes."""


@dataclass(slots=True)
class Links:
    """All transfers under way. Times are whole ns and never go back."""

    _now_ns: int = 0
    _flows: dict[int, _Flow] = field(default_factory=dict)
    """In the order they were opened."""
    _landing: dict[int, int] = field(default_factory=dict)
    """Transfer with no bytes left → when it ends."""
    next_ns: int = NEVER
    """When to call :meth:`advance` next: rates change or a transfer ends."""

    def open(self, flow: int, size: int, ports: Iterable[Port], now_ns: int, floor_ns: int = 0) -> None:
        """Start transfer ``flow`` (a number not in use) of ``size`` bytes over ``ports`` at ``now_ns``.

        It ends when its last byte has moved, but not before ``floor_ns``: latency, or data that are not there
        yet. Without ports nothing holds it up but that.
        """
        if flow in self._flows or flow in self._landing:
            raise ValueError(f"transfer {flow} is under way already")
        self._pass_time(now_ns)
        crossed = tuple(dict.fromkeys(ports))
        if size > 0 and crossed:
            self._flows[flow] = _Flow(crossed, floor_ns, float(size))
            self._share()
        else:
            self._landing[flow] = max(now_ns, floor_ns)
        self._plan()

    def advance(self, now_ns: int) -> list[int]:
        """Let time pass until ``now_ns``; the transfers that have ended by then, in the order they ended."""
        self._pass_time(now_ns)
        ended = sorted((end_ns, flow) for flow, end_ns in self._landing.items() if end_ns <= now_ns)
        for _, flow in ended:
            del self._landing[flow]
        self._plan()
        return [flow for _, flow in ended]

    def rates(self) -> dict[int, float]:
        """Transfer → GB/s it moves at right now; those that only wait for their floor are left out."""
        return {number: flow.rate for number, flow in self._flows.items()}

    def _pass_time(self, now_ns: int) -> None:
        if now_ns < self._now_ns:
            raise ValueError(f"time goes back from {self._now_ns} to {now_ns} ns")
        while self._flows and (change_ns := min(f.drained_ns for f in self._flows.values())) <= now_ns:
            self._move(change_ns)
            for number in [n for n, flow in self._flows.items() if flow.drained_ns <= change_ns]:
                self._landing[number] = max(change_ns, self._flows.pop(number).floor_ns)
            self._share()
        self._move(now_ns)

    def _move(self, now_ns: int) -> None:
        """Move bytes at the present rates until ``now_ns``."""
        elapsed = now_ns - self._now_ns
        if elapsed:
            for flow in self._flows.values():
                flow.remaining_bytes = max(flow.remaining_bytes - flow.rate * elapsed, 0.0)
        self._now_ns = now_ns

    def _share(self) -> None:
        """Max-min fair rates by progressive filling: the port with the least left for each of its transfers
        fixes theirs, then the next.

        A transfer whose rate stays the same keeps its end, so that an unrelated change never moves it.
        """
        left: dict[Port, float] = {}
        users: dict[Port, dict[int, None]] = {}
        for number, flow in self._flows.items():
            for port in flow.ports:
                left[port] = port.bandwidth_gbs
                users.setdefault(port, {})[number] = None
        while users:
            port = min(users, key=lambda port: left[port] / len(users[port]))
            rate = left[port] / len(users[port])
            for number in list(users[port]):
                flow = self._flows[number]
                for crossed in flow.ports:
                    left[crossed] = max(left[crossed] - rate, 0.0)
                    del users[crossed][number]
                    if not users[crossed]:
                        del users[crossed]
                if rate != flow.rate:
                    flow.rate = rate
                    flow.drained_ns = self._now_ns + ceil(flow.remaining_bytes / rate - _ROUNDING_NS)

    def _plan(self) -> None:
        drained = min((flow.drained_ns for flow in self._flows.values()), default=NEVER)
        self.next_ns = min(drained, min(self._landing.values(), default=NEVER))
