"""The meter of the ``roofline`` source: times from peak rates, on the same grids as the silicon source's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from servesim.errors import NotSupportedError
from servesim.profiler import grids
from servesim.profiler.roofline.efficiency import FAST_LINK_GBS, provenance
from servesim.profiler.roofline.formulas import (
    ACTIVATION_BYTES,
    AttentionShape,
    ExpertShape,
    accelerator,
    all_reduce_us,
    decode_us,
    gemm_us,
    moe_us,
    moved_us,
    prefill_us,
)
from servesim.profiler.shapes import block_windows, rank_shapes
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch, ProfileJob, Provenance
    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.profiler.roofline.formulas import Accelerator
    from servesim.profiler.shapes import RankShapes
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


Kind = Literal[
    "embedding",
    "norm",
    "head_norm",
    "rotary",
    "activation",
    "plain_activation",
    "qkv_proj",
    "o_proj",
    "gate_up_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "sampler",
]
BY_NAME: dict[str, Kind] = {
    "embedding": "embedding",
    "layernorm": "norm",
    "final_layernorm": "norm",
    "qk_norm": "head_norm",
    "rotary_emb": "rotary",
    "act_fn": "activation",
    "qkv_proj": "qkv_proj",
    "o_proj": "o_proj",
    "gate_up_proj": "gate_up_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "lm_head": "lm_head",
    "sampler": "sampler",
}
BY_CLASS: tuple[tuple[str, Kind], ...] = (
    (r"Rotary", "rotary"),
    (r"Embedding$", "embedding"),
    (r"Norm", "norm"),
    (r"AndMul$", "activation"),
    (r"(GELU|Gelu|SiLU|ReLU)", "plain_activation"),
    (r"^QKV.*Linear$", "qkv_proj"),
    (r"^MergedColumn.*Linear$", "gate_up_proj"),
    (r"^Column.*Linear$", "up_proj"),
    (r"^(LogitsProcessor|ParallelLMHead)$", "lm_head"),
    (r"Sampler$", "sampler"),
)
SAMPLER_START_US = 24.0
"""A dozen small kernels: arg-max over the vocabulary and bookkeeping."""
HEAD_NORM_US = 0.058
"""One unit's time to normalise one head of one token: so short a row is bound by issue, not by bytes."""


def layer_kind(name: str, entry: LayerEntry, where: str) -> Kind:
    """What a catalog entry computes.

    Raises:
        NotSupportedError: neither its name nor its class is of a standard kind; ``where`` names the file.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if re.search(r"^RowParallel.*Linear$", entry.class_name):
        return "o_proj" if "Attention" in (entry.within or "") else "down_proj"
    for pattern, kind in BY_CLASS:
        if re.search(pattern, entry.class_name):
            return kind
    raise NotSupportedError(
        f"{where}: catalog: layer {name!r} of class {entry.class_name} is of no kind that the roofline "
        f"source knows; known layers: {', '.join(BY_NAME)}, and vLLM's norm, linear, activation and "
        "embedding classes"
    )


def layer_us(
    kind: Kind, acc: Accelerator, shapes: RankShapes, count: NDArray[np.int64], dtype: str
) -> NDArray[np.float64]:
    """Time of one layer over so many tokens or sequences; activations are 16 bit."""
    wide = count.astype(np.float64)
    if kind == "up_proj":
        return gemm_us(acc, wide, shapes.intermediate, shapes.hidden, dtype)
    if kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        return gemm_us(acc, wide, *shapes.gemm(kind), dtype)
    if kind == "lm_head":  # a quantised checkpoint keeps its head in 16 bit
        return gemm_us(acc, wide, *shapes.gemm(kind), "float32" if dtype == "float32" else "bfloat16")
    heads = shapes.heads + shapes.kv_heads
    if kind == "head_norm":
        start_us = acc.efficiency.moved_start_us
        return np.asarray(start_us + wide * heads * HEAD_NORM_US / acc.units)
    elements = {  # read and written per token
        "embedding": 2 * shapes.hidden,
        "norm": 4 * shapes.hidden,  # with the residual
        "rotary": 2 * heads * shapes.head_dim,
        "activation": 3 * shapes.intermediate,
        "plain_activation": 2 * shapes.intermediate,
        "sampler": 3 * shapes.full_vocab,
    }[kind]
    start = SAMPLER_START_US if kind == "sampler" else None
    return moved_us(acc, wide * elements * ACTIVATION_BYTES, start)
