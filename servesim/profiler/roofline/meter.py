"""The meter of the ``roofline`` source: times from peak rates, on the same grids as the silicon source's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.profiler import grids
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
from servesim.profiler.roofline.provenance import FAST_LINK_GBS, provenance
from servesim.profiler.shapes import block_windows, rank_shapes
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.job import ProfileJob
    from servesim.profiler.meter import AttentionBatch, Provenance
    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.specs.architecture import LayerEntry

LARGEST_PAYLOAD = 1 << 28
"""Bytes of the largest all-reduce in comm.csv."""


class RooflineMeter:
    """One rank of a model on an accelerator that its hardware file describes."""

    computes = True

    def __init__(self, job: ProfileJob, efficiency: Efficiency | None = None) -> None:
        """``efficiency`` None: the hardware's own.

        Raises:
            InputError: the hardware file lacks a fact that the formulas need.
        """
        self._job = job
        self._acc = accelerator(job.hardware, efficiency)
        self._windows = tuple(block_windows(job.model))
        self._shapes = rank_shapes(job.model, 1)

    @property
    def conditions(self) -> dict[str, Any]:
        return {"source": "roofline"}

    def start_rank(self, tp: int) -> None:
        """
        Raises:
            InputError: the model's heads cannot be split so.
        """
        self._shapes = rank_shapes(self._job.model, tp)

    def grid(self) -> grids.ComputedGrid:
        job = self._job
        limits = (job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)
        payloads = grids.doubling(1024, LARGEST_PAYLOAD) if self._comm_wanted() else []
        return grids.ComputedGrid(job, grids.attention_batches(limits, self._windows), payloads)

    def kv_capacity_tokens(self) -> int:
        return 1 << 62

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        return self._times(self._job.architecture.catalog.dense, layers, tokens)

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        return self._times(self._job.architecture.catalog.per_sequence, layers, sequences)

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        """Of the average block: a step pays it once a block, so that sliding blocks add up right."""
        points = np.array([batch.point for batch in batches], dtype=np.int64)
        chunk, history, decodes, kv = points.T
        shapes, acc = self._shapes, self._acc
        time: NDArray[np.float64] = np.zeros(len(points))
        for window, share in self._windows:
            shape = AttentionShape(
                shapes.heads, shapes.kv_heads, shapes.head_dim, dtype_bytes(self._job.kv_dtype), window
            )
            prefill = prefill_us(acc, shape, np.maximum(chunk, 1), history)
            decode = decode_us(acc, shape, np.maximum(decodes, 1), kv)
            time += share * (np.where(chunk > 0, prefill, 0.0) + np.where(decodes > 0, decode, 0.0))
        return list(map(float, time))

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        """On one of the ranks without expert parallelism: a slice of each expert."""
        model = self._job.model
        width = max(1, model.moe_intermediate_size // self._shapes.tp)
        shape = ExpertShape(model.hidden_size, width, model.num_experts_per_tok, self._job.dtype)
        return list(map(float, moe_us(self._acc, shape, *np.array(points).T)))

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        return list(map(float, all_reduce_us(self._acc, self._shapes.tp, payloads)))

    def skew_rows(self) -> list[Row]:
        """None: decodes of unequal length cost what their mean costs."""
        return []

    def provenance(self, content: BundleContent) -> Provenance:
        return provenance(self._job, self._acc, content)

    def close(self) -> None:
        """Nothing is held."""

    def _times(
        self, catalog: Mapping[str, LayerEntry], layers: Sequence[str], counts: Sequence[int]
    ) -> dict[str, list[float]]:
        where = f"profiler/models/{self._job.architecture.model_type}.yaml"
        at = np.array(counts, dtype=np.int64)
        return {
            name: layer_us(
                layer_kind(name, catalog[name], where), self._acc, self._shapes, at, self._job.dtype
            ).tolist()
            for name in layers
        }

    def _comm_wanted(self) -> bool:
        """Whether the bundle says what an all-reduce costs; of slow links the cluster file knows more."""
        link = self._job.hardware.link
        if self._shapes.tp == 1 or link is None or self._job.collectives == "none":
            return False
        return self._job.collectives == "measured" or link.bandwidth_gbs > FAST_LINK_GBS
