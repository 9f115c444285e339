"""From a hardware file to the facts the derivations need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.profiler.silicon import tables
from servesim.profiler.silicon.tables import Gpu

if TYPE_CHECKING:
    from servesim.specs.hardware import HardwareSpec


def silicon_gpu(hardware: HardwareSpec) -> Gpu:
    """The GPU's facts, or an InputError naming the field of the hardware file that is missing."""
    tables.package_version()
    where = f"configs/hardware/{hardware.name}.yaml"
    if hardware.silicon is None:
        raise InputError(
            f"{where}: silicon: is missing; it names the GPU in the public kernel measurements "
            f"(there are {', '.join(tables.available_gpus())})"
        )
    if hardware.l2_mib is None or hardware.sm_count is None:
        missing = "l2_mib" if hardware.l2_mib is None else "sm_count"
        raise InputError(f"{where}: {missing}: is missing; kernel times are derived from it")
    return Gpu(
        folder=hardware.silicon,
        bandwidth_bytes_s=tables.nominal_bandwidth(hardware.silicon),
        l2_bytes=hardware.l2_mib * 2**20,
        sm_count=hardware.sm_count,
    )
