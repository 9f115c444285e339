"""What ``meta.yaml`` says about every bundle alike, wherever its times come from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from servesim.profiler import grids
from servesim.specs import paths
from servesim.specs.block_layers import ATTENTION_KINDS, attention_groups
from servesim.specs.shape import digest, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.meter import ProfileJob, Provenance
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.layers import ModelLayers


def described(job: ProfileJob, provenance: Provenance) -> dict[str, Any]:
    """``meta.yaml`` of a bundle: its source, the job, what the times were made for, and the claims."""
    return {
        "source": provenance.source,
        **provenance.origin,
        **profiled(job),
        **made_for(job, provenance.hardware, {"source": provenance.source, **provenance.derivation}),
        **provenance.claims,
    }


def profiled(job: ProfileJob) -> dict[str, Any]:
    """Of what the times are: the job's hardware, model, formats, degrees and limits."""
    return {
        "hardware": job.hardware.name,
        "architecture": job.architecture.model_type,
        "architecture_sha256": _architecture_sha256(job),
        "model": job.model.name,
        "variant": job.variant,
        "kv_dtype": job.kv_dtype,
        "tp_degrees": list(job.tp_degrees),
        "engine_effective": {
            "max_num_batched_tokens": job.max_num_batched_tokens,
            "max_num_seqs": job.max_num_seqs,
        },
    }


def made_for(job: ProfileJob, hardware: Mapping[str, Any], derivation: Mapping[str, Any]) -> dict[str, Any]:
    """``made_for`` of meta.yaml: the identity of a bundle, and a fingerprint of it.

    A run compares ``model`` with the shape it simulates and ``hardware`` with its hardware file, field by
    field, so that it can name what differs.

    Args:
        job: what the bundle is of.
        hardware: fields of the hardware file that the times depend on; empty where they were measured.
        derivation: source, revision of its formulas, its data and the choices that change its numbers.
    """
    about = {"model": shape_of(job.model), "hardware": dict(hardware), "derivation": dict(derivation)}
    return {"made_for": {"fingerprint": digest(about), **about}}


def measured_reach(content: BundleContent) -> dict[str, Any]:
    """``measured_up_to`` of a bundle whose every row was measured: the ends of its own tables."""
    attention = [
        (tp, row) for (tp, name), rows in content.tables.items() if name == "attention.csv" for row in rows
    ]
    lengths: dict[int, int] = {}
    for tp, row in attention:
        lengths[tp] = max(lengths.get(tp, 0), int(row[3]))
    prompts = max((int(row[0]) + int(row[1]) for _, row in attention if int(row[0])), default=0)
    return {"measured_up_to": {"prompt_tokens": prompts, "decode_kv": lengths}}


def attention_kinds(model: ModelLayers) -> dict[str, Any]:
    """For meta.yaml of a bundle whose blocks differ in their attention: each table with the share of blocks
    that it is of, and their kind; nothing where all are alike."""
    groups = attention_groups(model)
    of = len(model.layers)
    if len(groups) == 1 and len(groups[0].blocks) == of:
        return {}
    kinds = {group.label: {"kind": group.attention.kind, "share": float(group.share(of))} for group in groups}
    return {ATTENTION_KINDS: kinds}


def _architecture_sha256(job: ProfileJob) -> str:
    """Of the file's text, its lines ended by line feeds as in a checkout anywhere; of what was read from a
    config, of the layers."""
    if job.architecture.blocks:
        catalog = job.architecture.catalog.model_dump(mode="json")
        return digest([catalog, job.architecture.blocks], 64)
    path = paths.find(f"profiler/models/{job.architecture.model_type}.yaml")
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def attention_axes(job: ProfileJob, content: BundleContent) -> dict[str, Any]:
    """The points of a computed bundle's attention table."""
    rows = content.tables[min(job.tp_degrees), "attention.csv"]
    return {
        "max_kv": job.max_kv,
        "chunks": sorted({row[0] for row in rows}),
        "histories": sorted({row[1] for row in rows}),
        "n_decode": sorted({row[2] for row in rows}),
        "kv": sorted({row[3] for row in rows}),
        "max_decode_tokens": grids.MAX_DECODE_TOKENS,
    }


def stated_rates(hardware: HardwareSpec) -> dict[str, Any]:
    """Rates and sizes of the hardware file that every computed bundle depends on."""
    return {
        "silicon": hardware.silicon,
        "memory_bandwidth_gbs": hardware.memory_bandwidth_gbs,
        "l2_mib": hardware.l2_mib,
        "sm_count": hardware.sm_count,
        "peak_tflops": dict(hardware.peak_tflops),
    }
