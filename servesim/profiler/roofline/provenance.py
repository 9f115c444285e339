"""What a roofline bundle may claim, for ``meta.yaml``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from servesim.profiler.meter import Provenance
from servesim.profiler.provenance import attention_axes
from servesim.profiler.roofline import DERIVATION
from servesim.profiler.roofline.efficiency import LAUNCH_US, fits
from servesim.specs.shape import digest

FAST_LINK_GBS = 100.0
"""Above it accelerators have links of their own, the same in every machine; PCIe is not."""

if TYPE_CHECKING:
    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.job import ProfileJob
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
    return {
        "silicon": facts.silicon,
        "memory_bandwidth_gbs": facts.memory_bandwidth_gbs,
        "l2_mib": facts.l2_mib,
        "sm_count": facts.sm_count,
        "peak_tflops": dict(facts.peak_tflops),
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
    model = job.model
    claims = {
        "dense": "computed: matrix products from arithmetic and bytes, other layers from bytes",
        "per_sequence": "computed",
        "attention decodes": "computed: KV bytes over the memory's speed",
        "attention prefill": "computed: arithmetic of the query-key pairs",
        "attention mixed": "computed (two launches: prefill + decode)",
    }
    if model.num_sliding_layers:
        claims["attention sliding"] = (
            f"{model.num_sliding_layers} of {model.num_hidden_layers} blocks see {model.sliding_window} "
            "tokens; the table holds the average block"
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
