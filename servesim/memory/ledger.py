"""Memories, and one ledger for each: what every instance books on it, and what that leaves to whom.

A memory is data. What lies in it is weights, KV cache, and chunks of lower tiers of the prefix cache; who
reads it shares its bandwidth. Both sums are taken here and nowhere else, so that nothing counts twice.
"""

from __future__ import annotations

from dataclasses import field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True, frozen=True)
class Memory:
    """A place for bytes."""

    name: str
    """For people: ``CPU memory of node 0``."""
    scope: Literal["rank", "node", "cluster"]
    """Whose it is: each NPU has its own, a node has one, all nodes share it."""
    total_bytes: int
    bandwidth_gbs: float
    """GB/s (1e9 bytes per second)."""
    latency_ns: float
    """Until the first byte of a read has arrived."""


@dataclass(slots=True, frozen=True)
class Share:
    """What one instance, all its ranks together, has of a memory that is not its NPUs'."""

    place: str
    """As placement rules name it: ``cpu``, ``cxl:<device>``, or ``pim``."""
    memory: Memory
    weight_bytes: int
    kv_bytes_per_token: int
    room_bytes: int
    """For the instance's KV cache."""

    def blocks(self, block_size: int) -> int:
        """KV blocks that fit."""
        return self.room_bytes // (self.kv_bytes_per_token * block_size)

    def no_room(self, block_size: int) -> str:
        """That not even two blocks fit, with the figures."""
        return (
            f"no room for the KV cache in {self.place}: of {self.memory.total_bytes} bytes, "
            f"{self.room_bytes} are left to this instance beside weights and other instances, for blocks of "
            f"{self.kv_bytes_per_token * block_size} bytes (2 are needed at least); choose a larger memory "
            "or another kv_loc"
        )


@dataclass(slots=True)
class Ledger:
    """The bookings on one memory, by instance. Bytes are of all ranks of an instance together.

    Weights take what they need. What they leave is split evenly among the instances with KV cache here, or
    among the pools of lower tiers, never both.
    """

    memory: Memory
    weights: dict[int, int] = field(default_factory=dict)
    kv: dict[int, int] = field(default_factory=dict)
    """Bytes per token."""
    tiers: dict[int, tuple[int, str]] = field(default_factory=dict)
    """(node, word) of the lower tier that an instance has here. A word such as ``CXL`` or ``CXL:0`` stands
    for the memories that chunks of a tier are striped over; this one may be in several such."""

    def book(self, instance: int, weight_bytes: int, kv_bytes_per_token: int) -> None:
        """Add to what an instance keeps here."""
        self.weights[instance] = self.weights.get(instance, 0) + weight_bytes
        self.kv[instance] = self.kv.get(instance, 0) + kv_bytes_per_token

    @property
    def weight_bytes(self) -> int:
        """Of all instances."""
        return sum(self.weights.values())

    @property
    def keeps_kv(self) -> bool:
        """Whether an instance has its KV cache, or that of some blocks, here."""
        return any(self.kv.values())

    @property
    def kv_room_bytes(self) -> int:
        """For the KV cache of each instance that has some here."""
        return (self.memory.total_bytes - self.weight_bytes) // max(sum(map(bool, self.kv.values())), 1)

    @property
    def placed_gbs(self) -> float:
        """Bandwidth of each instance that reads weights or KV cache here in its steps.

        All that read here have equal shares, whether the others read at that moment or not.
        """
        return self.memory.bandwidth_gbs / len(self._readers)

    @property
    def tier_gbs(self) -> float:
        """Bandwidth that recalls from lower tiers share among themselves: all but that of instances which
        only read weights or KV cache here. An instance that does both recalls first and reads then."""
        return self.memory.bandwidth_gbs * len(self.tiers) / len(self._readers)

    @property
    def _readers(self) -> set[int]:
        return {*self.weights, *self.tiers}

    def tier_room_bytes(self, node: int, owners: int, *, shared: bool) -> Fraction:
        """What one pool of a lower tier on ``node`` has here.

        Args:
            node: where its instances are.
            owners: nodes that the memory is split over, times, without sharing, the instances of the node.
            shared: whether the node's instances share their pools; then each word on this memory has one.
        """
        pools = len({word for other, word in self.tiers.values() if other == node}) if shared else 1
        return Fraction(self.memory.total_bytes - self.weight_bytes, owners * pools)


def striped_bytes(rooms: Iterable[Fraction]) -> int:
    """Size of a pool that has these rooms on its memories."""
    return int(sum(rooms, Fraction()))
