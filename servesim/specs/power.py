"""Power draw of a node's devices."""

from __future__ import annotations

from typing import Annotated

from servesim.specs.annotated import Field
from servesim.specs.validation import Count, PowerW, SizeGb, Spec, Unit

EnergyPerBitPj = Annotated[float, Field(ge=0, le=1e6), Unit("pJ/bit")]


class NpuPower(Spec):
    """One NPU: idle, active while it computes, standby for a while after."""

    idle_power: Annotated[PowerW, Field(description="W")]
    active_power: Annotated[PowerW, Field(description="W while it computes")]
    standby_power: Annotated[PowerW, Field(description="W after it has computed")]
    standby_duration: Annotated[
        float, Field(ge=0, le=1e6, description="s of standby before it falls idle"), Unit("s")
    ]


class CpuPower(Spec):
    """Host processors of a node, all together."""

    idle_power: Annotated[PowerW, Field(description="W")]
    active_power: Annotated[PowerW, Field(description="W at full load")]
    util: Annotated[float, Field(ge=0, le=1, description="load while NPUs compute")] = 0.7


class DramPower(Spec):
    """Host memory, DIMM by DIMM."""

    dimm_size: Annotated[SizeGb, Field(description="GB (2**30 bytes); cpu_mem.mem_size says how many")]
    idle_power: Annotated[PowerW, Field(description="W of one DIMM")]
    energy_per_bit: Annotated[EnergyPerBitPj, Field(description="pJ per bit moved")]


class LinkPower(Spec):
    """Links between NPUs."""

    num_links: Count
    idle_power: Annotated[PowerW, Field(description="W of one link")]
    energy_per_bit: Annotated[EnergyPerBitPj, Field(description="pJ per bit moved")]


class NicPower(Spec):
    """Network cards."""

    num_nics: Count
    idle_power: Annotated[PowerW, Field(description="W of one card")]


class StoragePower(Spec):
    """Disks."""

    num_devices: Count
    idle_power: Annotated[PowerW, Field(description="W of one disk")]


class PimPower(Spec):
    """Processing-in-memory channels, on top of what ``dram`` says of their memory."""

    active_power: Annotated[PowerW, Field(description="W of all channels together while they compute")]


class CxlPower(Spec):
    """Devices of the cluster's ``cxl_mem`` that draw their power from this node."""

    num_devices: Count
    idle_power: Annotated[PowerW, Field(description="W of one device")]
    energy_per_bit: Annotated[EnergyPerBitPj, Field(description="pJ per bit moved by the node's instances")]


class PowerSpec(Spec):
    """A node's ``power`` section; a device left out draws nothing."""

    base_node_power: Annotated[PowerW, Field(description="W of everything that is not listed")]
    npu: dict[str, NpuPower] = Field(default_factory=dict, description="hardware name -> one NPU")
    """Names the hardware of every instance of the node, or of none."""
    cpu: CpuPower | None = None
    dram: DramPower | None = None
    link: LinkPower | None = None
    nic: NicPower | None = None
    storage: StoragePower | None = None
    pim: PimPower | None = None
    """Needs ``cpu_mem.pim_config``."""
    cxl: CxlPower | None = None
    """Needs ``cxl_mem``; over all nodes no more devices than it has."""
