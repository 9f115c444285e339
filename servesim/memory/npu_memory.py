"""The memory of an instance's NPUs: what the cluster config says of it, else the hardware file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.memory.ledger import Memory
from servesim.memory.sizing import GIB

if TYPE_CHECKING:
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.hardware import HardwareSpec

_SIZE_TOLERANCE = 0.002
_SPEED_TOLERANCE = 0.01


def npu_bytes(instance: InstanceSpec, hardware: HardwareSpec) -> int:
    """Memory of one NPU in bytes; that somebody says it was checked with the cluster."""
    stated = instance.npu_mem.mem_size
    size_gib = hardware.memory_gib if stated is None else stated
    assert size_gib is not None
    return int(size_gib * GIB)


def npu_memory(instance: InstanceSpec, hardware: HardwareSpec, where: str) -> Memory:
    """The memory of one NPU, where its speed counts.

    Raises:
        InputError: nobody says its bandwidth.
    """
    npu = instance.npu_mem
    bandwidth_gbs = hardware.memory_bandwidth_gbs if npu.mem_bw is None else npu.mem_bw
    if bandwidth_gbs is None:
        raise InputError(
            f"{where}: npu_mem.mem_bw: is missing; required where weights are streamed, as "
            f"configs/hardware/{instance.hardware}.yaml does not say memory_bandwidth_gbs"
        )
    return Memory(
        f"memory of an NPU of {where}", "rank", npu_bytes(instance, hardware), bandwidth_gbs, npu.mem_latency
    )


def differences(instance: InstanceSpec, hardware: HardwareSpec) -> list[str]:
    """Lines about what the cluster config says of the memory and the hardware file does not."""
    lines = []
    stated, known = instance.npu_mem.mem_size, hardware.memory_gib
    if stated is not None and known is not None and abs(stated / known - 1) > _SIZE_TOLERANCE:
        lines.append(
            f"npu_mem.mem_size is {stated:g} GiB, and an {instance.hardware} has {known:.2f} (its hardware "
            "file)"
        )
    if (priced := priced_hardware(instance, hardware)) is not hardware:
        lines.append(
            f"npu_mem.mem_bw is {priced.memory_bandwidth_gbs:g} GB/s, and an {instance.hardware} has "
            f"{hardware.memory_bandwidth_gbs:g} (its hardware file): kernel times are computed for the former"
        )
    return lines


def priced_hardware(instance: InstanceSpec, hardware: HardwareSpec) -> HardwareSpec:
    """The hardware that an instance's kernel times are of.

    That of its file; where nobody measured it, so that kernel times are computed from peak rates, with the
    memory bandwidth of the cluster config.
    """
    stated = instance.npu_mem.mem_bw
    if hardware.silicon is not None or stated is None or not _differs(stated, hardware):
        return hardware
    name = f"{hardware.name}-{stated:g}GBs"
    return hardware.model_copy(update={"name": name, "memory_bandwidth_gbs": stated})


def _differs(bandwidth_gbs: float, hardware: HardwareSpec) -> bool:
    known = hardware.memory_bandwidth_gbs
    return known is not None and abs(bandwidth_gbs / known - 1) > _SPEED_TOLERANCE


def check_speed(instance: InstanceSpec, hardware: HardwareSpec, where: str) -> None:
    """Refuse a bandwidth or latency that no time would follow: measured kernel times are of the hardware as
    its file describes it. To be asked of instances that keep everything on their NPUs.

    Raises:
        InputError: one of them differs from the hardware file.
    """
    npu, known = instance.npu_mem, hardware.memory_bandwidth_gbs
    why = f"kernel times are those of a bundle for {instance.hardware}"
    way_out = (
        "leave it out, or describe the other memory in a hardware file of its own and make a bundle for it "
        "with `servesim profile --source roofline`"
    )
    if npu.mem_bw is not None and hardware.silicon is not None and _differs(npu.mem_bw, hardware):
        raise InputError(
            f"{where}: npu_mem.mem_bw: {npu.mem_bw:g} is not allowed; must be {known:g} GB/s, as {why} "
            f"and do not follow it; {way_out}"
        )
    if npu.mem_latency and known is not None:
        raise InputError(
            f"{where}: npu_mem.mem_latency: {npu.mem_latency:g} is not allowed; must be 0, as {why}, "
            f"which hold the latency of its memory; {way_out}"
        )
