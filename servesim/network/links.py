"""Transfers that are under way at the same time share the links they cross.

A transfer crosses a set of *ports*: the way out of one instance, the way into another, a node's uplink, a
memory device. Whatever is open shares every port max-min fairly: all transfers speed up together until a port
is full, those through it stay at that rate, the others go on. Rates change only when a transfer opens or has
moved its last byte, so time passes from one such moment to the next.
"""

from __future__ import annotations

from dataclasses import field
from heapq import heapify, heappop, heappush
from math import ceil
from typing import TYPE_CHECKING, Final

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

NEVER: Final = (1 << 62) - 1
"""A time after every other, in ns: the greatest number that the compiled core handles without an object."""

_ROUNDING_NS = 1e-6  # a transfer that is late by less than this is in time: floating-point noise


@dataclass(slots=True, frozen=True)
class Port:
    """Something that moves at most ``bandwidth_gbs`` GB/s (1e9 bytes per second, so bytes per ns)."""

    name: str
    bandwidth_gbs: float
    weight: int = field(default=1, compare=False)
    """How often each byte of a transfer counts here: the port of one of D devices over which others are
    striped is stated at D times its bandwidth, and counts D-fold what lies in that device alone."""


@dataclass(slots=True)
class _Flow:
    """A transfer that still moves bytes."""

    ports: tuple[int, ...]
    floor_ns: int
    remaining_bytes: float
    rate: float = 0.0
    """Bytes per ns."""
    drained_ns: int = NEVER
    """When its last byte will have moved if no rate changes."""


class Links:
    """All transfers under way. Times are whole ns and never go back."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._flows: dict[int, _Flow] = {}
        """In the order they were opened."""
        self._numbers: dict[Port, int] = {}
        """Port → its number here, in the order of first use."""
        self._bandwidths: list[float] = []
        """Of each port by number, in bytes per ns."""
        self._users: list[dict[int, int]] = []
        """The transfers through each port by number, with their weights."""
        self._changed: dict[int, None] = {}
        """Ports that transfers joined or left since rates were last shared out."""
        self._ending: dict[int, int] = {}
        """Transfer with no bytes left → when it ends."""

    @property
    def next_ns(self) -> int:
        """When to call :meth:`advance` next: rates change or a transfer ends."""
        self._share()
        drained = min((flow.drained_ns for flow in self._flows.values()), default=NEVER)
        return min(drained, min(self._ending.values(), default=NEVER))

    def open(self, flow: int, size: int, ports: Iterable[Port], now_ns: int, floor_ns: int = 0) -> None:
        """Start transfer ``flow`` (a number not in use) of ``size`` bytes over ``ports`` at ``now_ns``.

        It ends when its last byte has moved, but not before ``floor_ns``: latency, or data that are not there
        yet. Without ports nothing holds it up but that.
        """
        if flow in self._flows or flow in self._ending:
            raise ValueError(f"transfer {flow} is under way already")
        self._pass_time(now_ns)
        weights = {self._number(port): port.weight for port in ports}
        crossed = tuple(weights)
        if size > 0 and crossed:
            self._flows[flow] = _Flow(crossed, floor_ns, float(size))
            for port in crossed:
                self._users[port][flow] = weights[port]
                self._changed[port] = None
        else:
            self._ending[flow] = max(now_ns, floor_ns)

    def advance(self, now_ns: int) -> list[int]:
        """Let time pass until ``now_ns``; the transfers that have ended by then, in the order they ended."""
        self._pass_time(now_ns)
        ended = sorted((end_ns, flow) for flow, end_ns in self._ending.items() if end_ns <= now_ns)
        for _, flow in ended:
            del self._ending[flow]
        return [flow for _, flow in ended]

    def rates(self) -> dict[int, float]:
        """Transfer → GB/s it moves at right now; those that only wait for their floor are left out."""
        self._share()
        return {number: flow.rate for number, flow in self._flows.items()}

    def _pass_time(self, now_ns: int) -> None:
        if now_ns < self._now_ns:
            raise ValueError(f"time goes back from {self._now_ns} to {now_ns} ns")
        if now_ns == self._now_ns and self._changed:
            return  # what opens and ends at one time is shared out together
        self._share()
        while self._flows and (change_ns := min(f.drained_ns for f in self._flows.values())) <= now_ns:
            self._move(change_ns)
            for number in [n for n, flow in self._flows.items() if flow.drained_ns <= change_ns]:
                self._drop(number, change_ns)
            if change_ns < now_ns:
                self._share()
        self._move(now_ns)

    def _move(self, now_ns: int) -> None:
        """Move bytes at the present rates until ``now_ns``."""
        elapsed = now_ns - self._now_ns
        if elapsed:
            for flow in self._flows.values():
                flow.remaining_bytes = max(flow.remaining_bytes - flow.rate * elapsed, 0.0)
        self._now_ns = now_ns

    def _drop(self, number: int, now_ns: int) -> None:
        """A transfer has moved its last byte."""
        flow = self._flows.pop(number)
        self._ending[number] = max(now_ns, flow.floor_ns)
        for port in flow.ports:
            del self._users[port][number]
            self._changed[port] = None

    def _number(self, port: Port) -> int:
        if port not in self._numbers:
            self._numbers[port] = len(self._numbers)
            self._bandwidths.append(port.bandwidth_gbs)
            self._users.append({})
        return self._numbers[port]

    def _share(self) -> None:
        """Max-min fair rates for all that a change can reach, by progressive filling: the port with the least
        left for each of its transfers fixes theirs, then the next.

        A transfer whose rate stays the same keeps its end, so that an unrelated change never moves it.
        """
        if not self._changed:
            return
        reached = self._reached()
        self._changed.clear()
        left = {port: self._bandwidths[port] for port in reached}
        waiting = {port: sum(self._users[port].values()) for port in reached}
        heap = [(left[port] / waiting[port], port) for port in reached]
        heapify(heap)
        fixed: set[int] = set()
        while heap:
            rate, full = heappop(heap)
            if not waiting[full] or rate != left[full] / waiting[full]:
                continue  # said before some of its transfers were fixed elsewhere
            touched: set[int] = set()
            for number in self._users[full]:
                if number in fixed:
                    continue
                fixed.add(number)
                flow = self._flows[number]
                for port in flow.ports:
                    weight = self._users[port][number]
                    left[port] -= rate * weight
                    waiting[port] -= weight
                touched.update(flow.ports)
                if rate != flow.rate:
                    flow.rate = rate
                    flow.drained_ns = self._now_ns + ceil(flow.remaining_bytes / rate - _ROUNDING_NS)
            for port in touched:
                if waiting[port]:
                    heappush(heap, (left[port] / waiting[port], port))

    def _reached(self) -> list[int]:
        """Ports in use that a change can concern: those changed, and all that transfers tie to them."""
        queue = [port for port in self._changed if self._users[port]]
        found, seen = set(queue), set[int]()
        for port in queue:  # grows while it is walked
            for number in self._users[port]:
                if number not in seen:
                    seen.add(number)
                    new = [other for other in self._flows[number].ports if other not in found]
                    found.update(new)
                    queue += new
        return queue
