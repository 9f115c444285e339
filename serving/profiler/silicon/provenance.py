"""What a silicon bundle may claim: where every table is from and how far to trust it, for ``meta.yaml``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.profiler import grids
from serving.profiler.shapes import rank_shapes
from serving.profiler.silicon import tables
from serving.profiler.silicon.skew import BUCKET_AXES, skew_summary
from serving.specs import paths

if TYPE_CHECKING:
    from serving.profiler.bundle_writer import BundleContent
    from serving.profiler.job import ProfileJob
    from serving.profiler.silicon.attention import AttentionTimes
    from serving.profiler.silicon.gemm import GemmTimes
    from serving.profiler.silicon.tables import Gpu, KernelTable

FA2_MIXED = "derived (one FlashAttention-2 launch, thread blocks list-scheduled on the SMs)"
TWO_LAUNCHES = "derived (two launches: prefill + decode)"
CHECKED_GPU = "rtx_pro_6000_server"


@dataclass(slots=True)
class Sources:
    """The kernel tables a bundle was made from."""

    gemm: GemmTimes
    attention: AttentionTimes
    comm: KernelTable | None
    moe_kernels: list[str]


def _interpolated(job: ProfileJob, gemm: GemmTimes) -> list[str]:
    """Matrix products that were not measured in their own size."""
    found = []
    for tp in job.tp_degrees:
        for layer in job.architecture.catalog.dense:
            if layer.endswith("_proj"):
                n, k = rank_shapes(job.model, tp).product(layer)
                found += [] if gemm.measured(n, k) else [f"tp{tp} {layer} {n}x{k}"]
    return found


def _kernels(sources: Sources) -> dict[str, Any]:
    gemm = sources.gemm.table.where(gemm_dtype=sources.gemm.dtype)
    found: dict[str, Any] = {
        "gemm": gemm.values("kernel_source"),
        "decode": sources.attention.decode_kernels,
        "prefill": sources.attention.prefill_kernels,
    }
    if sources.moe_kernels:
        found["moe"] = sources.moe_kernels
    if sources.comm is not None:
        found["all_reduce"] = sources.comm.values("kernel_source")
    return found


def _table_claims(job: ProfileJob, sources: Sources, content: BundleContent) -> dict[str, str]:
    names = {name for _, name in content.tables}
    claims = {
        "dense": "matrix products measured (cold weights), elementwise layers derived from bytes moved",
        "per_sequence": "lm_head measured, sampler derived",
        "attention decodes": "measured where KV exceeds 4 x L2, else corrected for the measurement's warm L2",
        "attention prefill": "measured without history; history derived from the slope of long prompts",
        "attention mixed": FA2_MIXED if sources.attention.single_launch else TWO_LAUNCHES,
    }
    if "moe.csv" in names:
        claims["moe"] = (
            "measured with all experts active from 64 tokens; fewer tokens or experts derived from weight "
            "bytes. tp<N> holds a slice of every expert; with expert parallelism tp1 applies"
        )
    claims["comm"] = (
        "all_reduce measured inside CUDA graphs"
        if "comm.csv" in names
        else "none: computed from the cluster's link_bw and link_latency"
    )
    claims["skew_fit"] = (
        "derived from the same thread-block model"
        if "skew_fit.csv" in names
        else "none: the decode kernel cuts the KV of all sequences in equal pieces"
    )
    if job.max_kv > 16384:
        claims["beyond the measurements"] = (
            "prompts over 16384 tokens and the longest contexts are extrapolated"
        )
    return claims


def _confidence(gpu: Gpu, sources: Sources) -> str:
    decode = sources.attention.decode_kernels
    if sources.attention.single_launch and gpu.folder == CHECKED_GPU:
        return "decode measured, history and mixed steps derived and checked on this GPU"
    if sources.attention.single_launch or not any("trtllm" in kernel or "fa3" in kernel for kernel in decode):
        return "decode measured, history and mixed steps derived"
    return "decode measured, history and mixed steps derived, unvalidated for this kernel"


def _architecture(job: ProfileJob) -> dict[str, str]:
    path = paths.find(f"profiler/models/{job.architecture.model_type}.yaml")
    digest = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    return {"architecture": job.architecture.model_type, "architecture_sha256": digest}


def _skew(content: BundleContent) -> dict[str, Any]:
    fits = {tp: rows for (tp, name), rows in sorted(content.tables.items()) if name == "skew_fit.csv"}
    if not fits:
        return {"enabled": False}
    per_tp = {tp: {"bucket_table": f"tp{tp}/skew_fit.csv", **skew_summary(rows)} for tp, rows in fits.items()}
    return {"enabled": True, "bucket_axes": BUCKET_AXES, "per_tp": per_tp}


def describe(job: ProfileJob, gpu: Gpu, content: BundleContent, sources: Sources) -> dict[str, Any]:
    """``meta.yaml`` of a bundle; it holds no time of making, so that the same inputs give the same file."""
    first = min(job.tp_degrees)
    grid = content.tables[first, "attention.csv"]
    return {
        "source": "silicon",
        "confidence": _confidence(gpu, sources),
        "data_package": tables.PACKAGE,
        "data_version": tables.package_version(),
        "data_licence": tables.LICENCE,
        "data_gpu": gpu.folder,
        "vllm_version": sources.attention.generation.version,
        "gpu": job.hardware.gpu or gpu.folder,
        "hardware": job.hardware.name,
        **_architecture(job),
        "model": job.model.name,
        "variant": job.variant,
        "kv_dtype": job.kv_dtype,
        "tp_degrees": list(job.tp_degrees),
        "engine_effective": {
            "max_num_batched_tokens": job.max_num_batched_tokens,
            "max_num_seqs": job.max_num_seqs,
        },
        "kernels": _kernels(sources),
        "tables": _table_claims(job, sources, content),
        "products_interpolated": _interpolated(job, sources.gemm),
        "attention_grid": {
            "max_kv": job.max_kv,
            "chunks": sorted({row[0] for row in grid}),
            "histories": sorted({row[1] for row in grid}),
            "n_decode": sorted({row[2] for row in grid}),
            "kv": sorted({row[3] for row in grid}),
            "max_decode_tokens": grids.MAX_DECODE_TOKENS,
        },
        "skew_fit": _skew(content),
    }
