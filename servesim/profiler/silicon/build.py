"""One bundle from public kernel measurements: which layer takes which formula."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import NotSupportedError
from servesim.profiler import grids
from servesim.profiler.bundle_writer import BundleContent, Row
from servesim.profiler.shapes import RankShapes, block_windows, rank_shapes
from servesim.profiler.silicon import comm
from servesim.profiler.silicon.attention import AttentionShape, AttentionTimes, attention_times
from servesim.profiler.silicon.elementwise import head_norm_us, moved_us
from servesim.profiler.silicon.gemm import gemm_times
from servesim.profiler.silicon.gpus import silicon_gpu
from servesim.profiler.silicon.moe import moe_times
from servesim.profiler.silicon.provenance import Sources, describe
from servesim.profiler.silicon.skew import skew_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.job import ProfileJob
    from servesim.profiler.silicon.gemm import GemmTimes
    from servesim.profiler.silicon.moe import MoeTimes
    from servesim.profiler.silicon.tables import Gpu

Windows = tuple[tuple[int | None, float], ...]
"""Attention windows of a model's blocks (None: the whole context), each with its share of them."""
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SAMPLER_START_US = 24.0
"""The sampler is a dozen small kernels (greedy: arg-max over the vocabulary and bookkeeping)."""
GRID_HISTORY = 8192
"""History at which the chunk grid is fitted to the steps of the prefill kernel."""


def _refuse_unsupported(job: ProfileJob) -> None:
    model = job.model
    if model.kv_lora_rank is not None:
        raise NotSupportedError(
            f"{model.name}: multi-head latent attention is not supported by the silicon source yet"
        )
    for name, dtype in (("--dtype", job.dtype), ("--kv-cache-dtype", job.kv_dtype)):
        if dtype not in ("bfloat16", "float16", "fp8"):
            raise NotSupportedError(
                f"{name} {dtype} is not supported by the silicon source: the public measurements cover "
                "bfloat16 (float16 runs alike) and fp8"
            )


def _table_dtype(dtype: str) -> str:
    """Name in the measured tables; both 16-bit formats run at the same speed."""
    return "fp8" if dtype == "fp8" else "bfloat16"


def _weight_dtype(job: ProfileJob) -> str:
    """Name in the measured tables of products with the job's weights."""
    return "fp8_block" if job.dtype == "fp8" and job.fp8_scaling == "block" else _table_dtype(job.dtype)


@lru_cache(maxsize=4)
def _gemm(gpu: Gpu, dtype: str) -> GemmTimes:
    return gemm_times(gpu, dtype)


@lru_cache(maxsize=32)
def _attention(gpu: Gpu, shape: AttentionShape) -> AttentionTimes:
    return attention_times(gpu, shape)


@lru_cache(maxsize=32)
def _attention_rows(
    gpu: Gpu, shape: AttentionShape, limits: tuple[int, int, int], windows: Windows
) -> tuple[AttentionTimes, list[Row]]:
    """Attention does not depend on the weights' dtype, so that variants and models share these rows.

    A row is the average block's time: blocks with a window read no more than the window's KV.
    """
    times = _attention(gpu, shape)
    grid = grids.attention_grid(*limits, lambda chunk: times.prefill_us(chunk, GRID_HISTORY))
    edges = {window for window, _ in windows if window is not None and 16 < window < limits[2]}
    if edges:  # the time bends where the window is full
        lengths, histories = ({*axis, *edges} for axis in (grid.lengths, grid.histories))
        grid = replace(grid, lengths=sorted(lengths), histories=sorted(histories))
    if windows == ((None, 1.0),):
        return times, [(*point, times.mixed_us(*point)) for point in grid.rows()]
    return times, [(*point, _windowed_us(times, windows, point)) for point in grid.rows()]


def _windowed_us(times: AttentionTimes, windows: Windows, point: tuple[int, int, int, int]) -> float:
    chunk, history, decodes, kv = point
    total = 0.0
    for window, share in windows:
        seen = window or max(history, kv)
        total += share * times.mixed_us(chunk, min(history, seen), decodes, min(kv, seen))
    return total


@lru_cache(maxsize=32)
def _skew_rows(gpu: Gpu, shape: AttentionShape, limits: tuple[int, int, int]) -> list[Row]:
    times = _attention(gpu, shape)
    return skew_rows(times, limits[0], limits[1]) if times.single_launch else []


def _elementwise_us(
    layer: str, gpu: Gpu, shapes: RankShapes, count: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Bytes read and written per token (16-bit activations) over the memory's speed."""
    hidden, wide = shapes.hidden, count.astype(np.float64)
    if layer == "qk_norm":
        return head_norm_us(gpu, wide * (shapes.heads + shapes.kv_heads), 2.0)
    per_token, start_us = {
        "embedding": (4.0 * hidden, 2.7),
        "layernorm": (8.0 * hidden, 2.3),
        "final_layernorm": (8.0 * hidden, 2.4),
        "rotary_emb": (4.0 * (shapes.heads + shapes.kv_heads) * shapes.head_dim, 2.3),
        "act_fn": (6.0 * shapes.intermediate, 2.3),
        "sampler": (6.0 * shapes.full_vocab, SAMPLER_START_US),
    }[layer]
    return moved_us(gpu, wide * per_token, start_us)


def _layer_us(
    layer: str, job: ProfileJob, gpu: Gpu, shapes: RankShapes, count: NDArray[np.int64]
) -> NDArray[np.float64]:
    if layer in PRODUCTS:
        return _gemm(gpu, _weight_dtype(job)).time_us(count, *shapes.product(layer))
    if layer == "lm_head":  # a quantised checkpoint keeps its head in 16 bit
        return _gemm(gpu, "bfloat16").time_us(count, *shapes.product(layer))
    try:
        return _elementwise_us(layer, gpu, shapes, count)
    except KeyError:
        raise NotSupportedError(
            f"profiler/models/{job.architecture.model_type}.yaml: the silicon source has no formula for "
            f"layer {layer!r}"
        ) from None


def _count_rows(
    layers: list[str], counts: list[int], job: ProfileJob, gpu: Gpu, shapes: RankShapes
) -> list[Row]:
    at = np.asarray(counts, dtype=np.int64)
    rows: list[Row] = []
    for layer in sorted(layers):
        times = _layer_us(layer, job, gpu, shapes, at)
        rows += [(layer, count, float(time)) for count, time in zip(counts, times, strict=True)]
    return rows


def _moe_rows(job: ProfileJob, gpu: Gpu, tp: int) -> tuple[list[Row], MoeTimes]:
    """Experts on one of ``tp`` ranks without expert parallelism: a slice of each."""
    model = job.model
    times = moe_times(gpu, _weight_dtype(job), model, tp, job.expert_load)
    rows: list[Row] = []
    for tokens in grids.doubling(1, job.max_num_batched_tokens):
        most = min(model.num_experts, tokens * model.num_experts_per_tok)
        for activated in grids.doubling(model.num_experts_per_tok, most):
            rows.append((tokens, activated, times.time_us(tokens, activated)))
    return rows, times


def build_bundle(job: ProfileJob) -> BundleContent:
    """All tables of one variant for every tensor-parallel degree asked for.

    Raises:
        InputError: the package is not there, or the GPU, a shape or a dtype was not measured.
        NotSupportedError: the model has attention or layers this source cannot derive.
    """
    _refuse_unsupported(job)
    gpu = silicon_gpu(job.hardware)
    catalog = job.architecture.catalog
    limits = (job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)
    windows = tuple(block_windows(job.model))
    content = BundleContent(meta={})
    all_reduce, comm_table = comm.all_reduce_rows(gpu) if job.collectives != "none" else ([], None)
    experts: list[MoeTimes] = []
    attention: list[AttentionTimes] = []
    for tp in job.tp_degrees:
        shapes = rank_shapes(job.model, tp)
        tokens, sequences = grids.token_grid(job.max_num_batched_tokens), grids.token_grid(job.max_num_seqs)
        content.tables[tp, "dense.csv"] = _count_rows(list(catalog.dense), tokens, job, gpu, shapes)
        content.tables[tp, "per_sequence.csv"] = _count_rows(
            list(catalog.per_sequence), sequences, job, gpu, shapes
        )
        shape = AttentionShape(shapes.heads, shapes.kv_heads, shapes.head_dim, _table_dtype(job.kv_dtype))
        times, content.tables[tp, "attention.csv"] = _attention_rows(gpu, shape, limits, windows)
        attention.append(times)
        if skew := _skew_rows(gpu, shape, limits):
            content.tables[tp, "skew_fit.csv"] = skew
        if job.model.is_moe:
            content.tables[tp, "moe.csv"], slices = _moe_rows(job, gpu, tp)
            experts.append(slices)
        if peers := [row for row in all_reduce if row[1] == tp]:
            content.tables[tp, "comm.csv"] = list(peers)
    sources = Sources(_gemm(gpu, _weight_dtype(job)), attention, comm_table, experts)
    content.meta = describe(job, gpu, content, sources)
    return content
