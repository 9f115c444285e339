"""Kernel times of the measured GPUs that the roofline formulas are fitted to and judged by.

They come through the silicon source, which corrects the public tables for warm caches, at the shapes of given
models; only rows that were measured, not derived, are kept where the two differ much.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import ServingError
from servesim.profiler.roofline import formulas
from servesim.profiler.roofline.formulas import AttentionShape, ExpertShape
from servesim.profiler.silicon import attention, comm, gemm, moe, tables
from servesim.specs import paths
from servesim.specs.block_layers import experts_of
from servesim.specs.dtypes import dtype_bytes
from servesim.specs.hardware import load_hardware
from servesim.specs.model import known_models, load_model
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from servesim.profiler.roofline.formulas import Accelerator
    from servesim.profiler.silicon.tables import Gpu
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec

    Floats = NDArray[np.float64]

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
    """Times of one kernel family with one shape."""

    family: str
    time_us: Floats
    predicted: Callable[[Accelerator], Floats]
    """What the roofline formula says at the same points."""


def measured_hardware() -> list[HardwareSpec]:
    """The shipped hardware files whose GPU is in the public measurements."""
    names = [path.stem for path in paths.find_all("configs/hardware/*.yaml")]
    return [hardware for hardware in map(load_hardware, names) if hardware.silicon]


def samples_of(hardware: HardwareSpec, names: Iterable[str]) -> list[Samples]:
    """Everything that was measured on one GPU at the shapes of these models."""
    gpu = tables.silicon_gpu(hardware)
    models = [model for model in map(load_model, names) if model.kv_lora_rank is None]
    found: list[Samples] = []
    for dtype in DTYPES:
        found += _products(gpu, dtype, models)
        found += _attention(gpu, dtype, models)
        found += _experts(gpu, dtype, models)
    return found + (_all_reduces(gpu) if hardware.link else [])


def shipped_models() -> list[str]:
    """Every model with a config here, toys left out."""
    return [name for name in known_models() if not name.startswith("servesim/")]


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
    m, n, k = np.array([(count, n, k) for n, k in sorted(sizes) for count in TOKENS], dtype=np.float64).T
    time = np.concatenate([times.time_us(counts, n, k) for n, k in sorted(sizes)])
    return [Samples("product", time, lambda acc: formulas.gemm_us(acc, m, n, k, dtype))]


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
        found += [_decodes(times, shape), _chunks(times, shape)]
    return found


def _decodes(times: attention.AttentionTimes, shape: AttentionShape) -> Samples:
    points = [(b, kv) for b in SEQUENCES for kv in LENGTHS if b * kv <= MOST_KV]
    count, length = np.array(points, dtype=np.float64).T
    us = np.array([times.decode_us(*at) for at in points])
    return Samples("decode", us, lambda acc: formulas.decode_us(acc, shape, count, length))


def _chunks(times: attention.AttentionTimes, shape: AttentionShape) -> Samples:
    # History under FlashAttention-2 follows a rule derived for that kernel alone: nothing to learn from.
    histories = HISTORIES[:1] if times.single_launch else HISTORIES
    points = [(c, h) for c in CHUNKS for h in histories]
    chunk, history = np.array(points, dtype=np.float64).T
    us = np.array([times.prefill_us(*at) for at in points])
    return Samples("prefill", us, lambda acc: formulas.prefill_us(acc, shape, chunk, history))


def _experts(gpu: Gpu, dtype: str, models: list[ModelSpec]) -> list[Samples]:
    bits, found = 8.0 * dtype_bytes(dtype), []
    sizes = {(_expert_sizes(model), tp): None for model, tp in _ranks(models) if model.is_moe}
    for size, tp in sizes:
        try:
            times = moe.moe_times(gpu, dtype, bits, size, tp, "balanced")
        except ServingError:
            continue
        if not times.notes:  # else not this size, this degree, this format or this load
            shape = ExpertShape(size.hidden, size.inter // tp, size.top_k, dtype, matrices=size.matrices)
            found.append(_expert_layers(times, shape))
    return found


def _expert_sizes(model: ModelSpec) -> moe.ExpertSizes:
    experts = experts_of(model.layers)
    assert experts is not None
    sizes = (experts.latent or model.hidden_size, experts.width, experts.count, experts.top_k)
    return moe.ExpertSizes(*sizes, matrices=3 if experts.gated else 2)


def _expert_layers(times: moe.MoeTimes, shape: ExpertShape) -> Samples:
    points = [(tokens, min(times.sizes.experts, tokens * times.sizes.top_k)) for tokens in MOE_TOKENS]
    tokens, activated = np.array(points, dtype=np.float64).T
    us = np.array([times.time_us(*at) for at in points])
    return Samples("moe", us, lambda acc: formulas.moe_us(acc, shape, tokens, activated))


def _all_reduces(gpu: Gpu) -> list[Samples]:
    rows, _ = comm.all_reduce_rows(gpu)
    by_ranks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for _, ranks, size, time in rows:
        if size >= PAYLOADS_FROM:
            by_ranks[ranks].append((size, time))
    return [_all_reduce(ranks, found) for ranks, found in sorted(by_ranks.items())]


def _all_reduce(ranks: int, found: list[tuple[float, float]]) -> Samples:
    payload, us = np.array(found).T
    return Samples("all_reduce", us, lambda acc: formulas.all_reduce_us(acc, ranks, payload))


def log_errors(samples: list[Samples], acc: Accelerator) -> Floats:
    """``ln(predicted / measured)`` of every sample."""
    return np.concatenate([np.log(some.predicted(acc) / some.time_us) for some in samples])
