"""Energy of one node over a window of time, device by device."""

from __future__ import annotations

from dataclasses import field
from math import ceil
from typing import TYPE_CHECKING

from servesim.power.activity import Spans, States, states
from servesim.power.quantities import SECOND_NS, nanowatts, transfer_aj
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.specs.power import NpuPower, PowerSpec

DEVICES = ("base", "npu", "cpu", "dram", "link", "nic", "storage", "pim", "cxl")
"""Kinds of devices, in the order they are shown in."""


@dataclass(slots=True, frozen=True)
class NpuActivity:
    """NPUs that do everything at the same time: the tensor-parallel ranks of one pipeline stage."""

    instance: int
    first_npu: int
    """Number of the first of them within the instance."""
    count: int
    hardware: str
    spans: Spans


@dataclass(slots=True, frozen=True)
class NodeActivity:
    """What went on in a node around a window of time."""

    npus: list[NpuActivity] = field(default_factory=list)
    pim: Spans = field(default_factory=Spans.none)
    """When processing-in-memory channels compute."""
    link_bytes: int = 0
    """Moved over links between NPUs within the window."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Device of the power section, such as ``dram`` -> bytes that the node's instances moved to and from its
    memory within the window."""


@dataclass(slots=True, frozen=True)
class NpuEnergy:
    """One NPU over the window."""

    instance: int
    npu: int
    energy_aj: int
    states: States

    def __add__(self, later: NpuEnergy) -> NpuEnergy:
        """Over this window and the one of the same NPU that follows it."""
        energy_aj = self.energy_aj + later.energy_aj
        return NpuEnergy(self.instance, self.npu, energy_aj, self.states + later.states)


@dataclass(slots=True, frozen=True)
class NodeEnergy:
    """Energy of a node over a window, in attojoules."""

    devices: dict[str, int]
    """Kind of :data:`DEVICES` -> energy, those of the node's power section only."""
    npus: list[NpuEnergy]

    @property
    def total_aj(self) -> int:
        """All devices together."""
        return sum(self.devices.values())

    def __add__(self, later: NodeEnergy) -> NodeEnergy:
        """Over this window and the one of the same node that follows it."""
        devices = {kind: taken + later.devices[kind] for kind, taken in self.devices.items()}
        return NodeEnergy(devices, [a + b for a, b in zip(self.npus, later.npus, strict=True)])


def node_energy(
    power: PowerSpec, memory_gb: float, activity: NodeActivity, begin_ns: int, end_ns: int
) -> NodeEnergy:
    """What a node takes from ``begin_ns`` to ``end_ns``.

    NPU: active, standby and idle power for the time spent so. CPU: idle power, and ``util`` of the way to its
    active power while any NPU computes. DRAM, CXL memory and links: idle power of every DIMM, device and link
    plus the energy of the bits moved. PIM: active power while it computes. Base, NICs, storage: constant.

    Args:
        power: the node's power section; a device left out takes nothing.
        memory_gb: host memory, which says how many DIMMs there are.
        activity: at least what overlaps the window, and the last activity before it.
        begin_ns: start of the window.
        end_ns: its end.
    """
    elapsed = end_ns - begin_ns
    npus = [
        energy
        for group in activity.npus
        if (draw := power.npu.get(group.hardware)) is not None
        for energy in _npu_energies(draw, group, begin_ns, end_ns)
    ]
    devices = {"base": nanowatts(power.base_node_power) * elapsed}
    if power.npu:
        devices["npu"] = sum(npu.energy_aj for npu in npus)
    if power.cpu is not None:
        computing = Spans.union([group.spans for group in activity.npus])
        active = states(computing, begin_ns, end_ns).active_ns
        idle_nw = nanowatts(power.cpu.idle_power)
        rise_nw = nanowatts((power.cpu.active_power - power.cpu.idle_power) * power.cpu.util)
        devices["cpu"] = idle_nw * elapsed + rise_nw * active
    if power.dram is not None:
        dimms = ceil(memory_gb / power.dram.dimm_size)
        moved = transfer_aj(activity.memory_bytes.get("dram", 0), power.dram.energy_per_bit)
        devices["dram"] = dimms * nanowatts(power.dram.idle_power) * elapsed + moved
    if power.link is not None:
        moved = transfer_aj(activity.link_bytes, power.link.energy_per_bit)
        devices["link"] = power.link.num_links * nanowatts(power.link.idle_power) * elapsed + moved
    if power.nic is not None:
        devices["nic"] = power.nic.num_nics * nanowatts(power.nic.idle_power) * elapsed
    if power.storage is not None:
        devices["storage"] = power.storage.num_devices * nanowatts(power.storage.idle_power) * elapsed
    if power.pim is not None:
        active = states(activity.pim, begin_ns, end_ns).active_ns
        devices["pim"] = nanowatts(power.pim.active_power) * active
    if power.cxl is not None:
        moved = transfer_aj(activity.memory_bytes.get("cxl", 0), power.cxl.energy_per_bit)
        devices["cxl"] = power.cxl.num_devices * nanowatts(power.cxl.idle_power) * elapsed + moved
    return NodeEnergy(devices, npus)


def _npu_energies(draw: NpuPower, group: NpuActivity, begin_ns: int, end_ns: int) -> list[NpuEnergy]:
    spent = states(group.spans, begin_ns, end_ns, round(draw.standby_duration * SECOND_NS))
    energy = (
        nanowatts(draw.active_power) * spent.active_ns
        + nanowatts(draw.standby_power) * spent.standby_ns
        + nanowatts(draw.idle_power) * spent.idle_ns
    )
    numbers = range(group.first_npu, group.first_npu + group.count)
    return [NpuEnergy(group.instance, number, energy, spent) for number in numbers]
