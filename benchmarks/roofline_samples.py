"""Kernel times of the measured GPUs that the roofline formulas are fitted to and judged by.

They come through the silicon source, which corrects the public tables for warm caches, at the shapes of every
shipped model; only rows that were measured, not derived, are kept where the two differ much.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import ServingError
from servesim.profiler.roofline import formulas
from servesim.profiler.roofline.formulas import Accelerator, AttentionShape, ExpertShape
from servesim.profiler.silicon import attention, comm, gemm, moe, tables
from servesim.specs import paths
from servesim.specs.hardware import load_hardware
from servesim.specs.model import known_models, load_model
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec

DEGREES = (1, 2, 4, 8)
DTYPES = ("bfloat16", "fp8")
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LENGTHS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MOST_KV = 1 << 22
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HISTORIES = (0, 2048, 16384)
MOE_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PAYLOADS_FROM = 1 << 20
FAMILIES = ("product", "decode", "prefill", "moe", "all_reduce")


@dataclass(frozen=True)
class Samples:
    """Times of one kernel family with one shape key; ``at`` are the formula's arguments."""

    family: str
    shape: object
    at: tuple[NDArray[np.float64], ...]
    time_us: NDArray[np.float64]

    def predicted(self, acc: Accelerator) -> NDArray[np.float64]:
        """What the roofline formula says at the same points."""
        if self.family == "product":
            return formulas.gemm_us(acc, *self.at, str(self.shape))
        if self.family == "decode":
            return formulas.decode_us(acc, self.shape, *self.at)  # type: ignore[arg-type]
        if self.family == "prefill":
            return formulas.prefill_us(acc, self.shape, *self.at)  # type: ignore[arg-type]
        if self.family == "moe":
            return formulas.moe_us(acc, self.shape, *self.at)  # type: ignore[arg-type]
        return formulas.all_reduce_us(acc, int(str(self.shape)), *self.at)


def measured_hardware() -> list[HardwareSpec]:
    """The shipped hardware files whose GPU is in the public measurements."""
    names = [path.stem for path in paths.find_all("configs/hardware/*.yaml")]
    return [hardware for hardware in map(load_hardware, names) if hardware.silicon]


def samples_of(hardware: HardwareSpec) -> list[Samples]:
    """Everything that was measured on one GPU at the shapes of the shipped models."""
    gpu = tables.silicon_gpu(hardware)
    models = [load_model(name) for name in known_models() if not name.startswith("servesim/")]
    models = [model for model in models if model.kv_lora_rank is None]
    found: list[Samples] = []
    for dtype in DTYPES:
        found += _products(gpu, dtype, models)
        found += _attention(gpu, dtype, models)
        found += _experts(gpu, dtype, models)
    return found + (_all_reduces(gpu) if hardware.link else [])


def _ranks(models: list[ModelSpec]) -> Iterator[tuple[ModelSpec, int]]:
    for model in models:
        for tp in DEGREES:
            if model.num_attention_heads % tp == 0:
                yield model, tp


def _products(gpu: Gpu, dtype: str, models: list[ModelSpec]) -> list[Samples]:
    sizes = set()
    for model, tp in _ranks(models):
        shapes = rank_shapes(model, tp)
        layers = ["qkv_proj", "o_proj"] + ([] if model.is_moe else ["gate_up_proj", "down_proj"])
        sizes |= {shapes.gemm(layer) for layer in layers}
    try:
        times = gemm.gemm_times(gpu, dtype)
    except ServingError:
        return []
    counts = np.array(TOKENS)
    points = [(count, n, k) for n, k in sorted(sizes) for count in TOKENS]
    time = np.concatenate([times.time_us(counts, n, k) for n, k in sorted(sizes)])
    return [Samples("product", dtype, tuple(np.array(points, dtype=np.float64).T), time)]


def _attention(gpu: Gpu, dtype: str, models: list[ModelSpec]) -> list[Samples]:
    found = []
    heads = {(s.heads, s.kv_heads, s.head_dim) for s in (rank_shapes(m, tp) for m, tp in _ranks(models))}
    for key in sorted(heads):
        try:
            times = attention.attention_times(gpu, attention.AttentionShape(*key, dtype))
        except ServingError:
            continue
        if times.derived_heads:
            continue
        shape = AttentionShape(*key, kv_bytes=1 if dtype == "fp8" else 2)
        decodes = [(b, kv) for b in SEQUENCES for kv in LENGTHS if b * kv <= MOST_KV]
        found.append(_sampled("decode", shape, decodes, [times.decode_us(*at) for at in decodes]))
        # History under FlashAttention-2 follows a rule derived for that kernel alone: nothing to learn from.
        histories = HISTORIES[:1] if times.single_launch else HISTORIES
        chunks = [(c, h) for c in CHUNKS for h in histories]
        found.append(_sampled("prefill", shape, chunks, [times.prefill_us(*at) for at in chunks]))
    return found


def _experts(gpu: Gpu, dtype: str, models: list[ModelSpec]) -> list[Samples]:
    found = []
    for model, tp in _ranks([model for model in models if model.is_moe]):
        sizes = (model.hidden_size, model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok)
        try:
            times = moe.moe_times(gpu, dtype, model, tp, "balanced")
        except ServingError:
            continue
        if times.notes:  # not this size, this degree or this load
            continue
        points = [(tokens, min(sizes[2], tokens * sizes[3])) for tokens in MOE_TOKENS]
        shape = ExpertShape(sizes[0], sizes[1] // tp, sizes[3], dtype)
        found.append(_sampled("moe", shape, points, [times.time_us(*at) for at in points]))
    return found


def _all_reduces(gpu: Gpu) -> list[Samples]:
    rows, _ = comm.all_reduce_rows(gpu)
    by_ranks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for _, ranks, size, time in rows:
        if size >= PAYLOADS_FROM:
            by_ranks[ranks].append((size, time))
    return [
        _sampled("all_reduce", ranks, [(size,) for size, _ in found], [time for _, time in found])
        for ranks, found in sorted(by_ranks.items())
    ]


def _sampled(family: str, shape: object, points: list[tuple[float, ...]], times: list[float]) -> Samples:
    return Samples(family, shape, tuple(np.array(points, dtype=np.float64).T), np.array(times))


def log_errors(samples: list[Samples], acc: Accelerator) -> NDArray[np.float64]:
    """``ln(predicted / measured)`` of every sample."""
    return np.concatenate([np.log(some.predicted(acc) / some.time_us) for some in samples])
