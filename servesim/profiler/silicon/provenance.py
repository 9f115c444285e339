"""What a silicon bundle may claim: where every table is from and how far to trust it, for ``meta.yaml``."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from servesim.profiler.meter import Provenance
from servesim.profiler.provenance import attention_axes, attention_kinds, stated_rates
from servesim.profiler.silicon import DERIVATION, comm, tables
from servesim.profiler.silicon.attention import AttentionTimes
from servesim.profiler.silicon.gemm import SLOW_US, smallest_us
from servesim.profiler.silicon.kv_narrow import ScaledTimes
from servesim.profiler.silicon.skew import BUCKET_AXES, skew_summary
from servesim.slotted import dataclass
from servesim.specs.block_layers import attention_groups, block_layers
from servesim.specs.dtypes import KV_CACHE_SIZED
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.silicon.decode_grid import AttentionKernels
    from servesim.profiler.silicon.gemm import GemmTimes
    from servesim.profiler.silicon.moe import MoeTimes
    from servesim.profiler.silicon.tables import Gpu, KernelTable

CHECKED_GPU = "rtx_pro_6000_server"
"""The GPU of which independent layerwise measurements exist: fitted to, and compared with."""


@dataclass(slots=True)
class Sources:
    """The kernel tables a bundle was made from; attention and experts once per tensor-parallel degree."""

    gemm: GemmTimes
    """Of the format that most weights have."""
    attention: list[list[AttentionKernels]]
    """Of every group of layers."""
    comm: KernelTable | None
    experts: list[MoeTimes]
    product_notes: list[str] = field(default_factory=list)
    """Which products are not as measured."""

    @property
    def first(self) -> AttentionKernels:
        """Of the group whose table is attention.csv."""
        return self.attention[0][0]

    @property
    def all_kernels(self) -> list[AttentionKernels]:
        return [kernels for degree in self.attention for kernels in degree]


def _interpolated(job: ProfileJob, gemm: GemmTimes) -> list[str]:
    """GEMMs that were not measured in their own size."""
    found = []
    told = block_layers(job.model.layers).dense
    for tp in job.tp_degrees:
        for layer in job.architecture.catalog.dense:
            if job.architecture.blocks and layer in told and told[layer].tensors:
                n, k = told[layer].gemm(tp)
            elif layer.endswith("_proj"):
                n, k = rank_shapes(job.model, tp).gemm(layer)
            else:
                continue
            found += [] if gemm.measured(n, k) else [f"tp{tp} {layer} {n}x{k}"]
    return found


def _kernels(sources: Sources) -> dict[str, Any]:
    gemm = sources.gemm.table.where(gemm_dtype=sources.gemm.dtype)
    found: dict[str, Any] = {
        "gemm": gemm.values("kernel_source"),
        "decode": sources.first.decode_kernels,
        "prefill": sources.first.prefill_kernels,
    }
    for kernels in sources.attention[0][1:]:
        found["decode"] = [*dict.fromkeys((*found["decode"], *kernels.decode_kernels))]
        found["prefill"] = [*dict.fromkeys((*found["prefill"], *kernels.prefill_kernels))]
    if sources.experts:
        found["moe"] = sources.experts[0].kernels
    if sources.comm is not None:
        found["all_reduce"] = sources.comm.values("kernel_source")
    return found


def _history_claim(gpu: Gpu, sources: Sources) -> tuple[str, str]:
    """How far to trust prefill with history, in a few words and in full."""
    first = sources.first
    if not isinstance(first, AttentionTimes):
        return "derived", "derived from how the longest prompts grow"
    errors = ", ".join(
        f"{degree[0].history_error():+.0%}".replace("%", " %")
        for degree in sources.attention
        if isinstance(degree[0], AttentionTimes)
    )
    if first.single_launch:
        how = "derived from the slope of long prompts, tile by tile"
        if gpu.folder == CHECKED_GPU:
            return "derived, checked on this GPU", f"{how}; checked against layerwise measurements"
        return "derived", how
    how = "derived from the slope of long prompts, never below a decode over the same KV"
    full = f"{how}; a prompt of 16384 in chunks of 2048 takes {errors} of the measured whole one's time"
    return "derived, checked against whole prompts", full


def _mixed_claim(gpu: Gpu, times: AttentionKernels) -> tuple[str, str]:
    """How far to trust chunks beside decodes, in a few words and in full."""
    if not isinstance(times, AttentionTimes):
        return "the sum of both launches", "derived: prefill and decodes have launches of their own"
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
    claims = {
        "dense": f"matrix products measured ({_slow_gemms(sources) or 'cold weights'}), "
        "elementwise layers derived from bytes moved",
        "per_sequence": "lm_head measured, sampler derived",
        "attention decodes": "measured, corrected for what the measurement's replays still found in L2 "
        f"(fitted on {CHECKED_GPU})"
        if isinstance(sources.first, AttentionTimes)
        else "measured as a module with its matrix products, or as kernels of a state",
        "attention prefill": f"measured without history; history {_history_claim(gpu, sources)[1]}",
        "attention mixed": _mixed_claim(gpu, sources.first)[1],
    }
    if sources.product_notes:
        claims["products"] = f"derived: {'; '.join(sources.product_notes)}"
    if heads := _derived_heads(sources):
        claims["attention heads"] = f"derived: {'; '.join(heads)}"
    groups = attention_groups(job.model.layers)
    for group, kernels in zip(groups[1:], sources.attention[0][1:], strict=True):
        told = "; ".join(kernels.notes)
        how = f"derived: {told}" if told else f"measured with vLLM {kernels.version}"
        claims[group.label.replace("_", " ")] = (
            f"{len(group.blocks)} of {len(job.model.layers.layers)} blocks, {how}"
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
    if "exchange.csv" in names:
        claims["exchange"] = "DeepEP's dispatch (tokens in fp8) and combine, measured with SGLang"
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
    prompt = min(times.longest_prompt for times in sources.all_kernels)
    longest = {times.longest_decode for times in sources.all_kernels if times.longest_decode < 1 << 30}
    longest = longest or {1 << 30}
    if job.max_kv > min(prompt, *longest):
        claims["beyond the measurements"] = (
            f"prompts over {prompt} tokens and decodes over more than "
            f"{' to '.join(map(str, sorted({min(longest), max(longest)})))} tokens of KV (by tp, see "
            "measured_up_to) are extrapolated"
        )
    return claims


def _derived_heads(sources: Sources) -> list[str]:
    return [note for degree in sources.attention for note in degree[0].notes]


def _slow_gemms(sources: Sources) -> str:
    """What is wrong with the table of GEMMs, empty if nothing.

    Some were measured together with the program that launches the kernels, tens to hundreds of microseconds
    for each GEMM, where a kernel of the smallest takes 4 to 8.
    """
    us = smallest_us(sources.gemm)
    return f"with the {us:.0f} us that even the smallest took, so all read slow" if us > SLOW_US else ""


def _confidence(job: ProfileJob, gpu: Gpu, sources: Sources) -> str:
    """One line for a run's banner."""
    told = "products read slow, " if _slow_gemms(sources) else ""
    if sources.product_notes:
        told += "products partly derived, "
    if any(note.startswith("derived") for times in sources.experts for note in times.notes):
        told += "experts derived, "
    return told + _of_attention(job, gpu, sources)


def _of_attention(job: ProfileJob, gpu: Gpu, sources: Sources) -> str:
    decode = "derived from other head counts" if _derived_heads(sources) else "measured"
    if not isinstance(sources.first, AttentionTimes) and _derived_heads(sources):
        decode = "derived"
        if job.kv_dtype in KV_CACHE_SIZED and isinstance(sources.first, ScaledTimes):
            decode = f"with {job.kv_dtype} KV derived (30 % off or more)"
    longest = min(times.longest_decode for times in sources.all_kernels)
    if job.max_kv > longest:
        decode += f" up to {longest:,} tokens"
    history, mixed = _history_claim(gpu, sources)[0], _mixed_claim(gpu, sources.first)[0]
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
    return stated_rates(facts) | {
        "link": {"bandwidth_gbs": facts.link.bandwidth_gbs} if facts.link else None,
    }


def _measured_up_to(content: BundleContent, sources: Sources) -> dict[str, Any]:
    """The largest sizes that were measured; what the bundle's tables have beyond is extrapolated."""
    degrees = sorted({tp for tp, _ in content.tables})
    reach: dict[str, Any] = {
        "tokens": int(sources.gemm.table.integers("m").max()),
        "prompt_tokens": min(times.longest_prompt for times in sources.all_kernels),
        "decode_kv": {
            tp: min(times.longest_decode for times in kernels)
            for tp, kernels in zip(degrees, sources.attention, strict=True)
        },
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


def _version(sources: Sources) -> str:
    """Of vLLM, that attention was measured with."""
    return next((kernels.version for kernels in sources.attention[0] if kernels.version), "")


def _versions(sources: Sources) -> dict[str, list[str]]:
    """Version of vLLM -> the tables that were measured with it."""
    found: dict[str, list[str]] = {}
    named = [("products", sources.gemm.table.version)]
    named += [("attention", kernels.version) for kernels in sources.attention[0] if kernels.version]
    named += [("experts", times.table.version) for times in sources.experts[:1]]
    named += [("all_reduce", sources.comm.version)] if sources.comm is not None else []
    for name, version in named:
        if name not in found.setdefault(version, []):
            found[version].append(name)
    return found


def provenance(job: ProfileJob, gpu: Gpu, content: BundleContent, sources: Sources) -> Provenance:
    """No time of making is in it, so that the same inputs give the same file."""
    choices = _choices(job, sources)
    version = tables.package_version()
    origin = {
        "derivation": DERIVATION,
        "confidence": _confidence(job, gpu, sources),
        "data_package": tables.package_name(),
        "data_version": version,
        "data_licence": tables.LICENCE,
        "data_gpu": gpu.folder,
        "vllm_version": _version(sources),
        "gpu": job.hardware.gpu or gpu.folder,
    }
    claims = {
        "kernels": _kernels(sources),
        "kernels_of_vllm": _versions(sources),
        **choices,
        "tables": _table_claims(job, gpu, sources, content),
        "products_interpolated": _interpolated(job, sources.gemm),
        "attention_grid": attention_axes(job, content),
        **_measured_up_to(content, sources),
        **_collectives(gpu, content),
        **attention_kinds(job.model.layers),
        "skew_fit": _skew(content),
    }
    derivation = {"revision": DERIVATION, "data_version": version, **choices}
    return Provenance("silicon", origin, claims, _hardware(job), derivation)
