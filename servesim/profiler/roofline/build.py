"""One bundle from peak rates: the same tables on the same grids as the silicon source's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import NotSupportedError
from servesim.profiler import grids
from servesim.profiler.bundle_writer import BundleContent, Row
from servesim.profiler.roofline.formulas import (
    AttentionShape,
    ExpertShape,
    accelerator,
    all_reduce_us,
    decode_us,
    moe_us,
    prefill_us,
)
from servesim.profiler.roofline.layers import layer_kind, layer_us
from servesim.profiler.roofline.provenance import FAST_LINK_GBS, describe
from servesim.profiler.shapes import RankShapes, block_windows, rank_shapes
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from servesim.profiler.job import ProfileJob
    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.profiler.roofline.formulas import Accelerator
    from servesim.specs.architecture import LayerEntry

LARGEST_PAYLOAD = 1 << 28
"""Bytes of the largest all-reduce in comm.csv."""


def build_bundle(job: ProfileJob, efficiency: Efficiency | None = None) -> BundleContent:
    """All tables of one variant for every tensor-parallel degree asked for.

    ``efficiency`` None: the hardware's own.

    Raises:
        InputError: the hardware file lacks a fact that the formulas need, or a degree does not fit the model.
        NotSupportedError: the model's attention or one of its layers is of no kind the formulas know.
    """
    if job.model.kv_lora_rank is not None:
        raise NotSupportedError(
            f"{job.model.name}: multi-head latent attention is not supported by the roofline source yet"
        )
    acc = accelerator(job.hardware, efficiency)
    content = BundleContent(meta={})
    catalog = job.architecture.catalog
    tokens, sequences = (grids.token_grid(most) for most in (job.max_num_batched_tokens, job.max_num_seqs))
    for tp in job.tp_degrees:
        shapes = rank_shapes(job.model, tp)
        content.tables[tp, "dense.csv"] = _count_rows(catalog.dense, tokens, job, acc, shapes)
        content.tables[tp, "per_sequence.csv"] = _count_rows(
            catalog.per_sequence, sequences, job, acc, shapes
        )
        content.tables[tp, "attention.csv"] = _attention_rows(job, acc, shapes)
        if job.model.is_moe:
            content.tables[tp, "moe.csv"] = _moe_rows(job, acc, tp)
        if tp > 1 and _comm_wanted(job):
            content.tables[tp, "comm.csv"] = _comm_rows(acc, tp)
    content.meta = describe(job, acc, content)
    return content


def _count_rows(
    layers: Mapping[str, LayerEntry], counts: list[int], job: ProfileJob, acc: Accelerator, shapes: RankShapes
) -> list[Row]:
    where = f"profiler/models/{job.architecture.model_type}.yaml"
    at = np.array(counts, dtype=np.int64)
    rows: list[Row] = []
    for name, entry in sorted(layers.items()):
        times = layer_us(layer_kind(name, entry, where), acc, shapes, at, job.dtype)
        rows += [(name, count, float(time)) for count, time in zip(counts, times, strict=True)]
    return rows


def _attention_rows(job: ProfileJob, acc: Accelerator, shapes: RankShapes) -> list[Row]:
    """Attention of the average block: a step pays it once a block, so that sliding blocks add up right."""
    grid = grids.attention_grid(job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)
    windows = block_windows(job.model)
    edges = {window for window, _ in windows if window is not None and 16 < window < job.max_kv}
    if edges:  # the time bends where the window is full
        grid = replace(
            grid, lengths=sorted({*grid.lengths, *edges}), histories=sorted({*grid.histories, *edges})
        )
    points = np.array(grid.rows(), dtype=np.int64)
    chunk, history, decodes, kv = points.T
    time: NDArray[np.float64] = np.zeros(len(points))
    for window, share in windows:
        shape = AttentionShape(
            shapes.heads, shapes.kv_heads, shapes.head_dim, dtype_bytes(job.kv_dtype), window
        )
        prefill = prefill_us(acc, shape, np.maximum(chunk, 1), history)
        decode = decode_us(acc, shape, np.maximum(decodes, 1), kv)
        time += share * (np.where(chunk > 0, prefill, 0.0) + np.where(decodes > 0, decode, 0.0))
    return [(*point, at) for point, at in zip(points.tolist(), time.tolist(), strict=True)]


def _moe_rows(job: ProfileJob, acc: Accelerator, tp: int) -> list[Row]:
    """Experts on one of ``tp`` ranks without expert parallelism: a slice of each."""
    model = job.model
    shape = ExpertShape(
        model.hidden_size, max(1, model.moe_intermediate_size // tp), model.num_experts_per_tok, job.dtype
    )
    points = [
        (tokens, activated)
        for tokens in grids.doubling(1, job.max_num_batched_tokens)
        for activated in grids.doubling(
            model.num_experts_per_tok, min(model.num_experts, tokens * model.num_experts_per_tok)
        )
    ]
    times = moe_us(acc, shape, *np.array(points).T)
    return [(*point, float(time)) for point, time in zip(points, times, strict=True)]


def _comm_wanted(job: ProfileJob) -> bool:
    """Whether the bundle says what an all-reduce costs; of slow links the cluster file knows more."""
    link = job.hardware.link
    if link is None or job.collectives == "none":
        return False
    return job.collectives == "measured" or link.bandwidth_gbs > FAST_LINK_GBS


def _comm_rows(acc: Accelerator, ranks: int) -> list[Row]:
    payloads = grids.doubling(1024, LARGEST_PAYLOAD)
    times = all_reduce_us(acc, ranks, payloads)
    return [("all_reduce", ranks, size, float(time)) for size, time in zip(payloads, times, strict=True)]
