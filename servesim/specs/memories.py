"""Memories beside those of the NPUs: the kinds there are, and how a cluster config describes each.

A new kind is an entry of :data:`KINDS` and a field of a node or of the cluster, most often a plain
:class:`MemorySpec` (:mod:`servesim.specs.cluster`): placement rules and ``--prefix-storage`` then know it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from servesim.slotted import dataclass
from servesim.specs.annotated import Field
from servesim.specs.validation import BandwidthGbs, Count, LatencyNs, SizeGb, Spec

if TYPE_CHECKING:
    from servesim.specs.cluster import ClusterSpec

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class MemorySpec(Spec):
    """One memory, or one of several equal devices."""

    mem_size: Annotated[SizeGb, Field(description="GB (2**30 bytes)")]
    mem_bw: Annotated[BandwidthGbs, Field(description="GB/s (1e9 bytes per second)")]
    mem_latency: Annotated[LatencyNs, Field(description="ns")]

    @property
    def devices(self) -> int:
        """How many there are of it."""
        return 1


class CpuMemory(MemorySpec):
    """Host memory of a node, shared by its instances."""

    pim_config: Word | None = None
    """Name of a processing-in-memory device, ``configs/pim/<name>.ini``."""


class CxlMemory(MemorySpec):
    """CXL memory pool of the cluster."""

    mem_size: Annotated[SizeGb, Field(description="GB (2**30 bytes) of one device")]
    mem_bw: Annotated[BandwidthGbs, Field(description="GB/s of one device")]
    mem_latency: Annotated[LatencyNs, Field(description="ns")]
    num_devices: Count = 1

    @property
    def devices(self) -> int:
        """How many there are of it."""
        return self.num_devices


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """What does not depend on the cluster."""

    scope: Literal["node", "cluster"]
    """Whose memory it is, and so where the config describes it."""
    field: str
    """Key of the config that describes it."""
    power: str | None = None
    """Part of a node's ``power`` section that pays for the bits of its instances; None: none does."""
    numbered: bool = False
    """Whether there may be several devices, which rules tell apart by number."""

    def spec(self, cluster: ClusterSpec, node: int) -> MemorySpec | None:
        """The memory as ``node`` sees it; None: there is none."""
        owner = cluster.nodes[node] if self.scope == "node" else cluster
        found: MemorySpec | None = getattr(owner, self.field)
        return found


KINDS = {
    "cpu": MemoryKind("node", "cpu_mem", power="dram"),
    "cxl": MemoryKind("cluster", "cxl_mem", power="cxl", numbered=True),
}
"""Name in placement rules -> kind. In capitals it is a word of ``--prefix-storage``."""

TIER_WORDS = tuple(name.upper() for name in KINDS)
PLACES = ("npu", *(f"{name}:<device>" if kind.numbered else name for name, kind in KINDS.items()))
"""What placement rules may name."""


def split_place(place: str) -> tuple[str, int | None]:
    """(kind, device) of a place such as ``cpu``, ``cxl:1``, or ``CXL``: all devices, None."""
    name, _, device = place.lower().partition(":")
    return name, int(device) if device else None


def is_place(word: str) -> bool:
    """Whether a word is one of :data:`PLACES`."""
    return any(re.fullmatch(place.replace("<device>", r"\d{1,6}"), word) for place in PLACES)
