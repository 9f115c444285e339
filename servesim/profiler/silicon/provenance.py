"""What a silicon bundle may claim: where every table is from and how far to trust it, for ``meta.yaml``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.profiler.meter import Provenance
from servesim.profiler.provenance import attention_axes
from servesim.profiler.shapes import rank_shapes
from servesim.profiler.silicon import DERIVATION, comm, tables
from servesim.profiler.silicon.gemm import smallest_us
from servesim.profiler.silicon.skew import BUCKET_AXES, skew_summary
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.silicon.attention import AttentionTimes
    from servesim.profiler.silicon.gemm import GemmTimes
    from servesim.profiler.silicon.moe import MoeTimes
    from servesim.profiler.silicon.tables import Gpu, KernelTable

SLOW_US = 40.0
"""A table whose quickest GEMM took longer measured more than kernels."""
CHECKED_GPU = "rtx_pro_6000_server"
"""The GPU of which independent layerwise measurements exist: fitted to, and compared with."""


@dataclass(slots=True)
class Sources:
    """The kernel tables a bundle was made from; attention and experts once per tensor-parallel degree."""

    gemm: GemmTimes
    attention: list[AttentionTimes]
    comm: KernelTable | None
    experts: list[MoeTimes]


def _interpolated(job: ProfileJob, gemm: GemmTimes) -> list[str]:
    """GEMMs that were not measured in their own size."""
    found = []
    for tp in job.tp_degrees:
        for layer in job.architecture.catalog.dense:
            if layer.endswith("_proj"):
                n, k = rank_shapes(job.model, tp).gemm(layer)
                found += [] if gemm.measured(n, k) else [f"tp{tp} {layer} {n}x{k}"]
    return found


def _kernels(sources: Sources) -> dict[str, Any]:
    gemm = sources.gemm.table.where(gemm_dtype=sources.gemm.dtype)
    found: dict[str, Any] = {
        "gemm": gemm.values("kernel_source"),
        "decode": sources.attention[0].decode_kernels,
        "prefill": sources.attention[0].prefill_kernels,
    }
    if sources.experts:
        found["moe"] = sources.experts[0].kernels
    if sources.comm is not None:
        found["all_reduce"] = sources.comm.values("kernel_source")
    return found


def _history_claim(gpu: Gpu, sources: Sources) -> tuple[str, str]:
    """How far to trust prefill with history, in a few words and in full."""
    errors = ", ".join(f"{times.history_error():+.0%}".replace("%", " %") for times in sources.attention)
    if sources.attention[0].single_launch:
        how = "derived from the slope of long prompts, tile by tile"
        if gpu.folder == CHECKED_GPU:
            return "derived, checked on this GPU", f"{how}; checked against layerwise measurements"
        return "derived", how
    how = "derived from the slope of long prompts, never below a decode over the same KV"
    full = f"{how}; a prompt of 16384 in chunks of 2048 takes {errors} of the measured whole one's time"
    return "derived, checked against whole prompts", full


def _mixed_claim(gpu: Gpu, times: AttentionTimes) -> tuple[str, str]:
    """How far to trust chunks beside decodes, in a few words and in full."""
    if times.single_launch:
        how = "derived: one launch, thread blocks list-scheduled on the SMs"
        if gpu.folder == CHECKED_GPU:
            return "derived, fitted on this GPU", f"{how}; re-reads fitted to layerwise measurements"
        if any("fa2" in kernel for kernel in times.decode_kernels):
            return "derived, fitted on another GPU", f"{how}; re-reads fitted on {CHECKED_GPU}"
        return "derived, unvalidated", f"{how}; unvalidated for this kernel"
    if times.shared_launch:
        return (
            "derived, unvalidated",
            "derived: one launch takes the work of both; unvalidated, an upper bound",
        )
    how = "derived: two launches, prefill then decode, as this backend runs them"
    return "the sum of both launches", how


def _table_claims(job: ProfileJob, gpu: Gpu, sources: Sources, content: BundleContent) -> dict[str, str]:
    names = {name for _, name in content.tables}
    model = job.model
    claims = {
        "dense": f"matrix products measured ({_slow_gemms(sources) or 'cold weights'}), "
        "elementwise layers derived from bytes moved",
        "per_sequence": "lm_head measured, sampler derived",
        "attention decodes": "measured, corrected for what the measurement's replays still found in L2 "
        f"(fitted on {CHECKED_GPU})",
        "attention prefill": f"measured without history; history {_history_claim(gpu, sources)[1]}",
        "attention mixed": _mixed_claim(gpu, sources.attention[0])[1],
    }
    if heads := _derived_heads(sources):
        claims["attention heads"] = f"derived: {'; '.join(heads)}"
    if model.num_sliding_layers:
        claims["attention sliding"] = (
            f"derived: {model.num_sliding_layers} of {model.num_hidden_layers} blocks read no more than "
            f"{model.sliding_window} tokens; the table holds the average block"
        )
    if "moe.csv" in names:
        notes = list(dict.fromkeys(note for times in sources.experts for note in times.notes))
        claims["moe"] = "; ".join(
            [
                "measured with all experts active from 64 tokens",
                "fewer tokens or experts derived from weight bytes",
                *(f"derived: {note}" for note in notes),
                "tp<N> holds a slice of every expert; with expert parallelism tp1 applies",
            ]
        )
    claims["comm"] = (
        f"all_reduce measured over {comm.link_of(gpu)}"
        if "comm.csv" in names
        else "none: computed from the cluster's link_bw and link_latency"
    )
    claims["skew_fit"] = (
        "derived from the same thread-block model"
        if "skew_fit.csv" in names
        else "none: the decode kernel cuts the KV of all sequences in equal pieces"
    )
    prompt = min(times.longest_prompt for times in sources.attention)
    longest = {times.longest_decode for times in sources.attention}
    if job.max_kv > min(prompt, *longest):
        claims["beyond the measurements"] = (
            f"prompts over {prompt} tokens and decodes over more than "
            f"{' to '.join(map(str, sorted({min(longest), max(longest)})))} tokens of KV (by tp, see "
            "measured_up_to) are extrapolated"
        )
    return claims


def _derived_heads(sources: Sources) -> list[str]:
    return [times.derived_heads for times in sources.attention if times.derived_heads]


def _slow_gemms(sources: Sources) -> str:
    """What is wrong with the table of GEMMs, empty if nothing.

    Some were measured together with the program that launches the kernels, tens to hundreds of microseconds
    for each GEMM, where a kernel of the smallest takes 4 to 8.
    """
    us = smallest_us(sources.gemm)
    return f"with the {us:.0f} us that even the smallest took, so all read slow" if us > SLOW_US else ""


def _confidence(job: ProfileJob, gpu: Gpu, sources: Sources) -> str:
    """One line for a run's banner."""
    if _slow_gemms(sources):
        return f"products read slow, {_of_attention(job, gpu, sources)}"
    return _of_attention(job, gpu, sources)


def _of_attention(job: ProfileJob, gpu: Gpu, sources: Sources) -> str:
    decode = "derived from other head counts" if _derived_heads(sources) else "measured"
    longest = min(times.longest_decode for times in sources.attention)
    if job.max_kv > longest:
        decode += f" up to {longest:,} tokens"
    history, mixed = _history_claim(gpu, sources)[0], _mixed_claim(gpu, sources.attention[0])[0]
    if history == mixed:
        return f"decode {decode}, history and mixed steps {mixed}"
    return f"decode {decode}, history {history}, mixed steps {mixed}"


def _skew(content: BundleContent) -> dict[str, Any]:
    fits = {tp: rows for (tp, name), rows in sorted(content.tables.items()) if name == "skew_fit.csv"}
    if not fits:
        return {"enabled": False}
    per_tp = {tp: {"bucket_table": f"tp{tp}/skew_fit.csv", **skew_summary(rows)} for tp, rows in fits.items()}
    return {"enabled": True, "bucket_axes": BUCKET_AXES, "per_tp": per_tp}


def _choices(job: ProfileJob, sources: Sources) -> dict[str, Any]:
    """Flags of the profile that change its numbers."""
    chosen: dict[str, Any] = {"fp8_scaling": job.fp8_scaling} if job.dtype == "fp8" else {}
    return chosen | ({"expert_load": job.expert_load} if sources.experts else {})


def _hardware(job: ProfileJob) -> dict[str, Any]:
    """The hardware's rates, although the derivations read few of them: kernels were measured on the GPU that
    has them, and are not those of one that a file describes otherwise."""
    facts = job.hardware
    return {
        "silicon": facts.silicon,
        "memory_bandwidth_gbs": facts.memory_bandwidth_gbs,
        "l2_mib": facts.l2_mib,
        "sm_count": facts.sm_count,
        "peak_tflops": dict(facts.peak_tflops),
        "link": {"bandwidth_gbs": facts.link.bandwidth_gbs} if facts.link else None,
    }


def _measured_up_to(content: BundleContent, sources: Sources) -> dict[str, Any]:
    """The largest sizes that were measured; what the bundle's tables have beyond is extrapolated."""
    degrees = sorted({tp for tp, _ in content.tables})
    reach: dict[str, Any] = {
        "tokens": int(sources.gemm.table.integers("m").max()),
        "prompt_tokens": min(times.longest_prompt for times in sources.attention),
        "decode_kv": {tp: times.longest_decode for tp, times in zip(degrees, sources.attention, strict=True)},
    }
    if sources.experts:
        reach["expert_tokens"] = min(times.most_tokens for times in sources.experts)
    payloads = [row[2] for (_, name), rows in content.tables.items() if name == "comm.csv" for row in rows]
    if payloads:
        reach["all_reduce_bytes"] = max(payloads)
    return {"measured_up_to": reach}


def _collectives(gpu: Gpu, content: BundleContent) -> dict[str, Any]:
    """What comm.csv was measured over, by which a run decides whether it goes by it."""
    if all(name != "comm.csv" for _, name in content.tables):
        return {}
    return {"collectives": {"link": comm.link_of(gpu)}}


def provenance(job: ProfileJob, gpu: Gpu, content: BundleContent, sources: Sources) -> Provenance:
    """No time of making is in it, so that the same inputs give the same file."""
    choices = _choices(job, sources)
    version = tables.package_version()
    origin = {
        "derivation": DERIVATION,
        "confidence": _confidence(job, gpu, sources),
        "data_package": tables.PACKAGE,
        "data_version": version,
        "data_licence": tables.LICENCE,
        "data_gpu": gpu.folder,
        "vllm_version": sources.attention[0].generation.version,
        "gpu": job.hardware.gpu or gpu.folder,
    }
    claims = {
        "kernels": _kernels(sources),
        **choices,
        "tables": _table_claims(job, gpu, sources, content),
        "products_interpolated": _interpolated(job, sources.gemm),
        "attention_grid": attention_axes(job, content),
        **_measured_up_to(content, sources),
        **_collectives(gpu, content),
        "skew_fit": _skew(content),
    }
    derivation = {"revision": DERIVATION, "data_version": version, **choices}
    return Provenance("silicon", origin, claims, _hardware(job), derivation)
