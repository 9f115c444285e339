"""Bytes on the move between instances and memories, on links they share."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from servesim.engine.clock import NEVER, Order
from servesim.network.links import Links, Port
from servesim.results.records import MovedBytes
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.engine.clock import Clock
    from servesim.engine.instance import Instance
    from servesim.network.topology import Topology


@dataclass(frozen=True, slots=True)
class Route:
    """A way that bytes take."""

    ports: Sequence[Port]
    latency_ns: int
    bandwidth_gbs: float
    """Of the slowest port, unshared."""


class Routes:
    """The ways between instances: out of one, into the other, and through both uplinks between nodes.

    Every NPU has a link of its own (dimension dp); a node's uplink (dimension nodes) is one for all.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __call__(self, source: Instance, target: Instance) -> Route:
        """The way from ``source`` to ``target``."""
        near, far = self._topology.dp, self._topology.nodes
        ports = [
            Port(f"out of instance {source.log.index}", near.bandwidth_gbs),
            Port(f"into instance {target.log.index}", near.bandwidth_gbs),
        ]
        latency = near.latency_ns
        if source.log.node != target.log.node:
            ports.append(Port(f"out of node {source.log.node}", far.bandwidth_gbs))
            ports.append(Port(f"into node {target.log.node}", far.bandwidth_gbs))
            latency = far.latency_ns
        return Route(tuple(ports), round(latency), min(port.bandwidth_gbs for port in ports))


class Transfers:
    """Starts transfers when their time has come and tells whoever waits for them when they have ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._actor = clock.actor(Order.KV, self._advance)
        self._advancing = False
        self._links = Links()
        self._planned: list[tuple[int, int, int, Sequence[Port], int]] = []
        """(first byte, serial, bytes, ports, earliest end)."""
        self._waiting: dict[int, tuple[Callable[[int], None], int, int, tuple[str, ...]]] = {}
        """Whom to tell of the end, start, bytes, names of the ports."""
        self._serial = 0
        self._soon: list[Callable[[int], None]] = []
        self.moved: list[MovedBytes] = []
        """What has been moved."""

    def plan(
        self, start_ns: int, size: int, route: Route, ended: Callable[[int], None], earliest_ns: int = 0
    ) -> None:
        """Move ``size`` bytes over ``route``.

        The first byte arrives a latency after ``start_ns``, and the whole not before ``earliest_ns``; then
        ``ended`` is called with the time.
        """
        first_byte_ns = start_ns + route.latency_ns
        heappush(self._planned, (first_byte_ns, self._serial, size, route.ports, earliest_ns))
        names = tuple(port.name for port in route.ports)
        self._waiting[self._serial] = ended, start_ns, size, names
        self._serial += 1
        if not self._advancing and first_byte_ns < self._clock.due_ns(self._actor):
            self._clock.at(first_byte_ns, self._actor)

    def soon(self, call: Callable[[int], None]) -> None:
        """Call back with the present time when whoever acts now is done."""
        self._soon.append(call)
        self._clock.at(self._clock.now_ns, self._actor)

    def _advance(self, now_ns: int) -> None:
        """End and start what is due at ``now_ns``."""
        soon, self._soon = self._soon, []
        for call in soon:
            call(now_ns)
        # Whoever is told of an end may plan more at once: that is started here too, and only then are the
        # rates of all shared out, since sharing in between would round the bytes left twice.
        self._advancing = True
        for serial in self._links.advance(now_ns):
            ended, start_ns, size, names = self._waiting.pop(serial)
            self.moved.append(MovedBytes(start_ns, now_ns, size, names))
            ended(now_ns)
        while self._planned and self._planned[0][0] <= now_ns:
            _, serial, size, ports, earliest_ns = heappop(self._planned)
            self._links.open(serial, size, ports, now_ns, earliest_ns)
        self._advancing = False
        starts_ns = self._planned[0][0] if self._planned else NEVER
        self._clock.at(min(starts_ns, self._links.next_ns), self._actor)
