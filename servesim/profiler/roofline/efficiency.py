"""How close kernels come to an accelerator's peak rates.

Every constant comes from the first of: the hardware file's ``roofline:``, the fit to the accelerator's own
kernel measurements, the median of the fits to all measured GPUs. ``fitted.json`` holds those fits;
``benchmarks/fit_roofline.py`` writes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.profiler.meter import Provenance
from servesim.profiler.provenance import attention_axes, attention_kinds, stated_rates
from servesim.profiler.roofline import DERIVATION
from servesim.slotted import dataclass
from servesim.specs.block_layers import attention_groups
from servesim.specs.shape import digest

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import ArrayLike, NDArray

    from servesim.specs.hardware import HardwareSpec, RooflineSpec

LAUNCH_US = 1.5
"""Time from one kernel to the next that the fitted starts include."""

Curve = float | tuple[tuple[float, float], ...]
"""A share of a peak rate: a number, or (size, share) points."""

FITTED = Path(__file__).with_name("fitted.json")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Starts in us and shares of peak rates; the fields of ``RooflineSpec``, every one settled.

    The defaults are for what the public measurements do not contain.
    """

    product_start_us: float
    product_compute: Curve
    product_compute_8bit: Curve
    product_stream: Curve
    decode_start_us: float
    decode_block_us: float
    decode_stream: Curve
    decode_stream_8bit: Curve
    prefill_start_us: float
    prefill_compute: Curve
    prefill_compute_8bit: Curve
    prefill_tail: float
    moe_compute: Curve
    moe_compute_8bit: Curve
    link_share: Curve
    moe_start_us: float = 28.0  # router, top-k, sort by expert, two grouped GEMMs, combine
    moe_stream: Curve = 0.85
    moved_start_us: float = 2.3
    moved_stream: Curve = 0.85


def share_at(curve: Curve, size: ArrayLike) -> NDArray[np.float64]:
    """The share at each size: linear in the size's logarithm between points, constant outside them."""
    sizes = np.maximum(np.asarray(size, dtype=np.float64), 1.0)
    if not isinstance(curve, tuple):
        return np.full(sizes.shape, float(curve))
    points = np.array(sorted(curve), dtype=np.float64)
    return np.interp(np.log(sizes), np.log(np.maximum(points[:, 0], 1.0)), points[:, 1])


@lru_cache(maxsize=1)
def fits() -> dict[str, Any]:
    """``fitted.json``: provenance, and ``gpus``: folder in the public measurements -> constant -> value."""
    found: dict[str, Any] = json.loads(FITTED.read_text(encoding="utf-8"))
    return found


def typical(without: Collection[str] = ()) -> Efficiency:
    """The medians over all measured GPUs that have the constant, but those in ``without``."""
    known = [gpu for folder, gpu in sorted(fits()["gpus"].items()) if folder not in without]
    names = sorted({name for gpu in known for name in gpu})
    middle = {name: median(gpu[name] for gpu in known if name in gpu) for name in names}
    return Efficiency(**{name: float(f"{value:.4g}") for name, value in middle.items()})


def efficiency_of(hardware: HardwareSpec) -> Efficiency:
    """The constants of one accelerator."""
    own = fits()["gpus"].get(hardware.silicon, {})
    return with_overrides(replace(typical(), **own), hardware.roofline)


def with_overrides(efficiency: Efficiency, stated: RooflineSpec) -> Efficiency:
    """``efficiency`` with what a hardware file states; ``launch_us`` moves the starts it does not state."""
    changes: dict[str, Any] = {}
    if stated.launch_us is not None:
        later_us = stated.launch_us - LAUNCH_US
        starts = [field.name for field in fields(Efficiency) if field.name.endswith("_start_us")]
        changes = {name: max(0.0, getattr(efficiency, name) + later_us) for name in starts}
    for field in fields(Efficiency):
        value = getattr(stated, field.name)
        if value is not None:
            changes[field.name] = value
    return replace(efficiency, **changes)


FAST_LINK_GBS = 100.0
"""Above it accelerators have links of their own, the same in every machine; PCIe is not."""

if TYPE_CHECKING:
    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.roofline.formulas import Accelerator

TYPICAL = (
    "computed from peak rates and other GPUs' efficiencies, nothing measured: steps typically 3-20 % off"
)
OWN = "computed from peak rates, efficiencies fitted to this GPU's kernels: steps typically 2-10 % off"


def confidence(job: ProfileJob) -> str:
    """How far to trust the bundle, in a line."""
    return OWN if job.hardware.silicon in fits()["gpus"] else TYPICAL


def _hardware(job: ProfileJob) -> dict[str, Any]:
    """Every figure of the hardware file that the formulas read."""
    facts = job.hardware
    return stated_rates(facts) | {
        "link": facts.link.model_dump(mode="json") if facts.link else None,
        "roofline": facts.roofline.model_dump(mode="json", exclude_none=True),
    }


def provenance(job: ProfileJob, acc: Accelerator, content: BundleContent) -> Provenance:
    """No time of making is in it, so that the same inputs give the same file."""
    fitted = fits()
    origin = {
        "derivation": DERIVATION,
        "confidence": confidence(job),
        "gpu": job.hardware.gpu or job.hardware.name,
    }
    claims = {
        "accelerator": {
            "memory_bandwidth_gbs": job.hardware.memory_bandwidth_gbs,
            "peak_tflops": dict(job.hardware.peak_tflops),
            "sm_count": job.hardware.sm_count,
            "l2_mib": job.hardware.l2_mib,
        },
        "efficiency": {name: _plain(value) for name, value in asdict(acc.efficiency).items()},
        "efficiency_from": {
            "fitted_to": job.hardware.silicon
            if job.hardware.silicon in fitted["gpus"]
            else "all measured GPUs",
            "data_package": fitted["data_package"],
            "data_version": fitted["data_version"],
            "data_licence": fitted["data_licence"],
            "launch_us_included": LAUNCH_US,
            "stated_in_hardware_file": sorted(job.hardware.roofline.model_fields_set),
        },
        "tables": _claims(job, content),
        "attention_grid": attention_axes(job, content),
        **_collectives(job, content),
        **attention_kinds(job.model.layers),
        "skew_fit": {"enabled": False},
    }
    derivation = {"revision": DERIVATION, "constants": digest(fitted)}
    return Provenance("roofline", origin, claims, _hardware(job), derivation)


def _collectives(job: ProfileJob, content: BundleContent) -> dict[str, Any]:
    """What kind of links comm.csv is about, where there is one."""
    link = job.hardware.link
    if link is None or all(name != "comm.csv" for _, name in content.tables):
        return {}
    return {"collectives": {"link": "nvlink" if link.bandwidth_gbs > FAST_LINK_GBS else "pcie"}}


def _plain(value: Any) -> Any:
    return [list(point) for point in value] if isinstance(value, tuple) else value


def _claims(job: ProfileJob, content: BundleContent) -> dict[str, str]:
    names = {name for _, name in content.tables}
    claims = {
        "dense": "computed: matrix products from arithmetic and bytes, other layers from bytes",
        "per_sequence": "computed",
        "attention decodes": "computed: KV bytes over the memory's speed",
        "attention prefill": "computed: arithmetic of the query-key pairs",
        "attention mixed": "computed (two launches: prefill + decode)",
    }
    for group in attention_groups(job.model.layers)[1:]:
        claims[group.label.replace("_", " ")] = (
            f"computed: {len(group.blocks)} of {len(job.model.layers.layers)} blocks"
        )
    if "moe.csv" in names:
        claims["moe"] = (
            "computed: activated experts' bytes, padded rows' arithmetic; tp<N> holds slices of experts"
        )
    if "comm.csv" in names:
        claims["comm"] = (
            "all_reduce computed from the hardware file's link; `collectives: links` in a cluster config "
            "computes it from the cluster's link_bw and link_latency"
        )
    else:
        claims["comm"] = "none: computed from the cluster's link_bw and link_latency"
    claims["skew_fit"] = "none: decodes of unequal length cost what their mean costs"
    return claims
