"""Bytes on the move between instances and memories, on links they share."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from servesim.engine.arrivals import NEVER
from servesim.network.links import Links

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.network.links import Port


@dataclass(frozen=True, slots=True)
class Route:
    """A way that bytes take."""

    ports: Sequence[Port]
    latency_ns: int
    bandwidth_gbs: float
    """Of the slowest port, unshared."""


class Transfers:
    """Starts transfers when their time has come and tells whoever waits for them when they have ended."""

    def __init__(self) -> None:
        self._links = Links()
        self._planned: list[tuple[int, int, int, Sequence[Port], int]] = []
        """(first byte, serial, bytes, ports, earliest end)."""
        self._waiting: dict[int, Callable[[int], None]] = {}
        self._serial = 0

    @property
    def next_ns(self) -> int:
        """When a transfer starts, ends or changes its rate next."""
        starts = self._planned[0][0] if self._planned else NEVER
        return min(starts, self._links.next_ns)

    def plan(
        self, start_ns: int, size: int, route: Route, ended: Callable[[int], None], earliest_ns: int = 0
    ) -> None:
        """Move ``size`` bytes over ``route``.

        The first byte arrives a latency after ``start_ns``, and the whole not before ``earliest_ns``; then
        ``ended`` is called with the time.
        """
        first_byte_ns = start_ns + route.latency_ns
        heappush(self._planned, (first_byte_ns, self._serial, size, route.ports, earliest_ns))
        self._waiting[self._serial] = ended
        self._serial += 1

    def advance(self, now_ns: int) -> None:
        """End and start what is due at ``now_ns``."""
        for serial in self._links.advance(now_ns):
            self._waiting.pop(serial)(now_ns)
        while self._planned and self._planned[0][0] <= now_ns:
            _, serial, size, ports, earliest_ns = heappop(self._planned)
            self._links.open(serial, size, ports, now_ns, earliest_ns)
