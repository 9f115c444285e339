"""The meter of the ``silicon`` source: which layer takes which formula over public kernel measurements."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import NotSupportedError
from servesim.profiler import grids
from servesim.profiler.shapes import RankShapes, block_windows, rank_shapes
from servesim.profiler.silicon import comm
from servesim.profiler.silicon.attention import AttentionShape, AttentionTimes, attention_times
from servesim.profiler.silicon.gemm import gemm_times
from servesim.profiler.silicon.moe import moe_times
from servesim.profiler.silicon.provenance import Sources, provenance
from servesim.profiler.silicon.skew import skew_rows
from servesim.profiler.silicon.tables import silicon_gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.grids import Windows
    from servesim.profiler.meter import AttentionBatch, ProfileJob, Provenance
    from servesim.profiler.silicon.gemm import GemmTimes
    from servesim.profiler.silicon.tables import Gpu

GEMM_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SAMPLER_START_US = 24.0
"""The sampler is a dozen small kernels (greedy: arg-max over the vocabulary and bookkeeping)."""
GRID_HISTORY = 8192
"""History at which the chunk grid is fitted to the steps of the prefill kernel."""
L2_SPEEDUP = 3.5
L2_SHARE = 0.38
DRAM_EFFICIENCY = 0.85
HEAD_NORM_NS = 58.0
"""SM time of normalising one head of one token: such short rows are bound by issue, not by bytes."""


def _table_dtype(dtype: str) -> str:
    """Name in the measured tables; both 16-bit formats run at the same speed."""
    return "fp8" if dtype == "fp8" else "bfloat16"


def _weight_dtype(job: ProfileJob) -> str:
    """Name in the measured tables of GEMMs with the job's weights."""
    return "fp8_block" if job.dtype == "fp8" and job.fp8_scaling == "block" else _table_dtype(job.dtype)


@lru_cache(maxsize=4)
def _gemm(gpu: Gpu, dtype: str) -> GemmTimes:
    return gemm_times(gpu, dtype)


@lru_cache(maxsize=32)
def _attention(gpu: Gpu, shape: AttentionShape) -> AttentionTimes:
    return attention_times(gpu, shape)


@lru_cache(maxsize=32)
def _attention_batches(
    gpu: Gpu, shape: AttentionShape, limits: tuple[int, int, int], windows: Windows
) -> tuple[AttentionBatch, ...]:
    times = _attention(gpu, shape)
    return grids.attention_batches(limits, windows, lambda chunk: times.prefill_us(chunk, GRID_HISTORY))


@lru_cache(maxsize=32)
def _attention_us(
    gpu: Gpu, shape: AttentionShape, windows: Windows, batches: tuple[AttentionBatch, ...]
) -> list[float]:
    """Attention does not depend on the weights' dtype, so that variants and models share these times.

    They are the average block's: blocks with a window read no more than the window's KV.
    """
    times = _attention(gpu, shape)
    if windows == ((None, 1.0),):
        return [times.mixed_us(*batch.point) for batch in batches]
    return [_windowed_us(times, windows, batch.point) for batch in batches]


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
    if layer in GEMM_LAYERS:
        return _gemm(gpu, _weight_dtype(job)).time_us(count, *shapes.gemm(layer))
    if layer == "lm_head":  # a quantised checkpoint keeps its head in 16 bit
        return _gemm(gpu, "bfloat16").time_us(count, *shapes.gemm(layer))
    try:
        return _elementwise_us(layer, gpu, shapes, count)
    except KeyError:
        raise NotSupportedError(
            f"profiler/models/{job.architecture.model_type}.yaml: the silicon source has no formula for "
            f"layer {layer!r}"
        ) from None


class SiliconMeter:
    """One rank of a model on a GPU whose kernels were measured and published."""

    computes = True

    def __init__(self, job: ProfileJob) -> None:
        """
        Raises:
            InputError: the package is not there, or the GPU, a shape or a dtype was not measured.
        """
        self._job = job
        self._gpu = silicon_gpu(job.hardware)
        self._windows = tuple(block_windows(job.model))
        self._limits = (job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)
        rows, table = comm.all_reduce_rows(self._gpu) if job.collectives != "none" else ([], None)
        self._all_reduce = {(ranks, payload): time for _, ranks, payload, time in rows}
        self._sources = Sources(_gemm(self._gpu, _weight_dtype(job)), [], table, [])

    @property
    def conditions(self) -> dict[str, Any]:
        return {"source": "silicon"}

    def start_rank(self, tp: int) -> None:
        """
        Raises:
            InputError: the model's heads cannot be split so, or attention or experts of this shape and format
            were not measured.
        """
        job = self._job
        self._shapes = shapes = rank_shapes(job.model, tp)
        self._shape = AttentionShape(
            shapes.heads, shapes.kv_heads, shapes.head_dim, _table_dtype(job.kv_dtype)
        )
        self._sources.attention.append(_attention(self._gpu, self._shape))
        if job.model.is_moe:
            load = job.expert_load
            self._sources.experts.append(moe_times(self._gpu, _weight_dtype(job), job.model, tp, load))

    def grid(self) -> grids.ComputedGrid:
        return grids.ComputedGrid(
            self._job,
            _attention_batches(self._gpu, self._shape, self._limits, self._windows),
            [payload for ranks, payload in self._all_reduce if ranks == self._shapes.tp],
        )

    def kv_capacity_tokens(self) -> int:
        return 1 << 62

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        at = np.asarray(tokens, dtype=np.int64)
        return {layer: _layer_us(layer, self._job, self._gpu, self._shapes, at).tolist() for layer in layers}

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        return self.layers_us(layers, sequences)

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        return _attention_us(self._gpu, self._shape, self._windows, tuple(batches))

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        """On one of the ranks without expert parallelism: a slice of each expert."""
        times = self._sources.experts[-1]
        return [times.time_us(tokens, activated) for tokens, activated in points]

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        return [self._all_reduce[self._shapes.tp, payload] for payload in payloads]

    def skew_rows(self) -> list[Row]:
        return list(_skew_rows(self._gpu, self._shape, self._limits))

    def provenance(self, content: BundleContent) -> Provenance:
        return provenance(self._job, self._gpu, content, self._sources)

    def close(self) -> None:
        """Nothing is held."""


def moved_us(gpu: Gpu, moved_bytes: NDArray[np.float64], start_us: float) -> NDArray[np.float64]:
    """Time of a kernel that reads and writes ``moved_bytes`` B in all and starts in ``start_us`` t0.

    ``t = t0 + min(B, 0.38·L2) / (3.5·BW) + rest / (0.85·BW)``: what fits a share of L2 (left there by the
    layer before) moves at L2 speed, the rest at DRAM speed.
    """
    near = np.minimum(moved_bytes, L2_SHARE * gpu.l2_bytes)
    near_us = near / (L2_SPEEDUP * gpu.bandwidth_bytes_s) * 1e6
    far_us = (moved_bytes - near) / (DRAM_EFFICIENCY * gpu.bandwidth_bytes_s) * 1e6
    return start_us + near_us + far_us


def head_norm_us(gpu: Gpu, rows: NDArray[np.float64], start_us: float) -> NDArray[np.float64]:
    """Time of normalising ``rows`` vectors of one head's width (query or key heads times tokens)."""
    return start_us + rows * HEAD_NORM_NS * 1e-3 / gpu.sm_count
