"""From a hardware file to the facts the derivations need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.profiler.silicon import tables
from servesim.profiler.silicon.tables import Gpu

if TYPE_CHECKING:
    from servesim.specs.hardware import HardwareSpec


ALSO_STATED_GBS = {"rtx_pro_6000_server": 1597.0}
"""Memory bandwidths that a maker's data sheet gives and the package does not: of the Server Edition (the
package has the Workstation Edition's)."""
SAME = 0.01
"""Data sheets round their figures by up to this share."""


def other_rates(hardware: HardwareSpec) -> list[str]:
    """Rates of the hardware file that the measured GPU does not have, one each; empty: it is that GPU.

    Kernels were measured on one GPU. They are not those of an accelerator that a file describes otherwise, by
    an edited bandwidth for one.

    Raises:
        InputError: the package is not there.
    """
    gpu = hardware.silicon or ""
    stated = [("memory_bandwidth_gbs", hardware.memory_bandwidth_gbs, tables.nominal_bandwidth(gpu) / 1e9)]
    if gpu in ALSO_STATED_GBS and _same(hardware.memory_bandwidth_gbs, ALSO_STATED_GBS[gpu]):
        stated = []
    measured = tables.nominal_tflops(gpu)
    stated += [
        (f"peak_tflops.{dtype}", tflops, measured[dtype])
        for dtype, tflops in hardware.peak_tflops.items()
        if dtype in measured
    ]
    if hardware.link is not None and tables.has_fast_links(gpu):
        stated.append(("link.bandwidth_gbs", hardware.link.bandwidth_gbs, tables.link_bandwidth(gpu) / 1e9))
    return [
        f"{name} {here:g}, measured GPU {there:g}"
        for name, here, there in stated
        if here is not None and not _same(here, there)
    ]


def _same(here: float | None, there: float) -> bool:
    return here is not None and abs(here / there - 1) <= SAME


def silicon_gpu(hardware: HardwareSpec) -> Gpu:
    """The GPU's facts, or an InputError naming the field of the hardware file that is missing or is another
    GPU's."""
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
    if others := other_rates(hardware):
        raise InputError(
            f"{where}: {', '.join(others)}: kernels were measured on {hardware.silicon} as it is, and "
            "are not scaled to other rates; use --source roofline for this file, or correct it"
        )
    return Gpu(
        folder=hardware.silicon,
        bandwidth_bytes_s=tables.nominal_bandwidth(hardware.silicon),
        l2_bytes=hardware.l2_mib * 2**20,
        sm_count=hardware.sm_count,
        peak_flops_s=tuple((dtype, 1e12 * rate) for dtype, rate in sorted(hardware.peak_tflops.items())),
    )
