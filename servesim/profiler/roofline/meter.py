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
    ExpertShape,
    accelerator,
    all_reduce_us,
    gemm_us,
    moe_us,
    moved_us,
)
from servesim.profiler.roofline.kinds import Formats, kind_us
from servesim.profiler.silicon.kv_narrow import ADA
from servesim.specs.block_layers import attention_groups, block_layers, expert_format, experts_of
from servesim.specs.dtypes import KV_CACHE_SIZED, dtype_bytes
from servesim.specs.kv_formats import format_bytes
from servesim.specs.layers import Attention
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch, ProfileJob, Provenance
    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.profiler.roofline.formulas import Accelerator
    from servesim.specs.architecture import LayerEntry
    from servesim.specs.block_layers import AttentionGroup, DenseLayer
    from servesim.specs.formats import WeightFormat
    from servesim.specs.rank_shapes import RankShapes

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
        self._groups = attention_groups(job.model.layers)
        self._layers = block_layers(job.model.layers)
        self._stored = job.model.stored_as(job.dtype).formats
        self._shapes = rank_shapes(job.model, 1)
        self._limits = (job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)

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
        payloads = grids.doubling(1024, LARGEST_PAYLOAD) if self._comm_wanted() else []
        batches = grids.kind_batches(self._limits, self._groups[0].attention)
        return grids.ComputedGrid(self._job, batches, payloads)

    def kv_capacity_tokens(self) -> int:
        return 1 << 62

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        return self._times(self._job.architecture.catalog.dense, layers, tokens)

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        return self._times(self._job.architecture.catalog.per_sequence, layers, sequences)

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        return self._group_us(self._groups[0], batches)

    def other_attention(self) -> dict[str, list[Row]]:
        """Rows of the groups of layers beside the first."""
        found: dict[str, list[Row]] = {}
        for group in self._groups[1:]:
            batches = grids.kind_batches(self._limits, group.attention)
            times = self._group_us(group, batches)
            found[group.label] = [(*batch.point, us) for batch, us in zip(batches, times, strict=True)]
        return found

    def _group_us(self, group: AttentionGroup, batches: Sequence[AttentionBatch]) -> list[float]:
        matrices = [tensor for tensor in group.tensors if tensor.matrix]
        dtype, bits = (
            self._weights(self._stored.of(group.prefix + matrices[0].name)) if matrices else ("", 16.0)
        )
        kv = self._job.kv_dtype_of(group.attention)
        formats = Formats(dtype, bits, kv, self._kv_element_bytes(group))
        return kind_us(self._acc, group, self._shapes.tp, formats, batches)

    def _kv_element_bytes(self, group: AttentionGroup) -> float:
        """Bytes of an element of keys and values, scales included; two where an fp8 cache is converted by the
        kernel, which takes as long as reading 16 bit."""
        kv, a = self._job.kv_dtype_of(group.attention), group.attention
        if kv == "fp8" and float(self._job.hardware.compute_capability or ADA) < ADA:
            return 2.0
        if kv in KV_CACHE_SIZED and isinstance(a, Attention):
            return format_bytes(kv, a) / (a.kv_heads * (a.head_dim + a.value_dim))
        return 1.0 if kv in KV_CACHE_SIZED else float(dtype_bytes(kv))

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        """On one of the ranks without expert parallelism: a slice of each expert."""
        model = self._job.model
        experts, stored = experts_of(model.layers), expert_format(model.layers, self._stored)
        assert experts is not None
        assert stored is not None
        dtype, bits = self._weights(stored)
        width = max(1, experts.width // self._shapes.tp)
        hidden, matrices = experts.latent or model.hidden_size, 3 if experts.gated else 2
        shape = ExpertShape(hidden, width, experts.top_k, dtype, bits, matrices)
        return list(map(float, moe_us(self._acc, shape, *np.array(points).T)))

    def _weights(self, stored: WeightFormat) -> tuple[str, float | None]:
        """The dtype that products with these weights compute in, and the bits of a weight; None: its own."""
        if stored.bits >= 8:
            return {"mxfp8": "fp8"}.get(stored.element, stored.element), None
        bits = stored.matrix_bytes(4096, 4096) * 8 / 4096**2
        wide = "fp8" if stored.element == "nvfp4" and self._acc.computes_4_bit else "bfloat16"
        return wide, bits

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        return list(map(float, all_reduce_us(self._acc, self._shapes.tp, payloads)))

    def exchange_rows(self) -> list[Row]:
        """None."""
        return []

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
        at = np.array(counts, dtype=np.int64)
        return {name: self._layer_us(name, catalog[name], at).tolist() for name in layers}

    def _layer_us(self, name: str, entry: LayerEntry, at: NDArray[np.int64]) -> NDArray[np.float64]:
        job, acc, tp = self._job, self._acc, self._shapes.tp
        told = self._layers.dense.get(name)
        if told is not None and told.tensors:
            dtype, bits = self._weights(told.format(self._stored))
            if job.architecture.blocks:
                return gemm_us(acc, at.astype(np.float64), *told.gemm(tp), dtype, bits)
            if bits is not None:
                return gemm_us(acc, at.astype(np.float64), *self._shapes.gemm(name), dtype, bits)
        elif told is not None and job.architecture.blocks:
            return told_layer_us(told, acc, tp, at)
        where = f"profiler/models/{job.architecture.model_type}.yaml"
        return layer_us(layer_kind(name, entry, where), acc, self._shapes, at, job.dtype)

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


_MOVED = {"norm": 4, "rotary": 2, "activation": 3, "plain_activation": 2, "gated_norm": 3, "hyper": 7}
"""Kind of a layer that its config tells of -> elements read and written for each of its width."""


def told_layer_us(
    layer: DenseLayer, acc: Accelerator, tp: int, count: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Time of a layer without a product, as a model's config tells of it."""
    wide = count.astype(np.float64)
    width = layer.width if layer.kind in ("norm", "hyper") else max(layer.width // tp, 1)
    if layer.kind == "head_norm":
        return np.asarray(acc.efficiency.moved_start_us + wide * width * HEAD_NORM_US / acc.units)
    return moved_us(acc, wide * width * _MOVED[layer.kind] * ACTIVATION_BYTES)
