"""Power draw of a node's devices."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.specs.base import Count, PowerW, SizeGb, Spec, Unit

EnergyPerBitPj = Annotated[float, Field(ge=0, le=1e6), Unit("pJ/bit")]


class NpuPower(Spec):
    """One NPU: idle, active while it computes, standby for a while after."""

    idle_power: PowerW
    active_power: PowerW
    standby_power: PowerW
    standby_duration: Annotated[float, Field(ge=0, le=1e6), Unit("s")]


class CpuPower(Spec):
    """Host processor."""

    idle_power: PowerW
    active_power: PowerW
    util: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Utilization while NPUs compute."""


class DramPower(Spec):
    """Host memory, DIMM by DIMM."""

    dimm_size: SizeGb
    idle_power: PowerW
    energy_per_bit: EnergyPerBitPj


class LinkPower(Spec):
    """Links between NPUs."""

    num_links: Count
    idle_power: PowerW
    energy_per_bit: EnergyPerBitPj


class NicPower(Spec):
    """Network cards."""

    num_nics: Count
    idle_power: PowerW


class StoragePower(Spec):
    """Disks."""

    num_devices: Count
    idle_power: PowerW


class PowerSpec(Spec):
    """A node's ``power`` section; a device left out draws nothing."""

    base_node_power: PowerW
    npu: dict[str, NpuPower] = Field(default_factory=dict)
    """Hardware name -> its NPU."""
    cpu: CpuPower | None = None
    dram: DramPower | None = None
    link: LinkPower | None = None
    nic: NicPower | None = None
    storage: StoragePower | None = None
