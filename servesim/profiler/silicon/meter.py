"""The meter of the ``silicon`` source: which layer takes which formula over public kernel measurements."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError, NotSupportedError
from servesim.profiler import grids
from servesim.profiler.silicon import comm
from servesim.profiler.silicon.attention import AttentionShape, AttentionTimes, attention_times
from servesim.profiler.silicon.gemm import products
from servesim.profiler.silicon.kv_narrow import ADA, ConvertedTimes, ScaledTimes
from servesim.profiler.silicon.modules import hyper_us, module_times
from servesim.profiler.silicon.moe import ExpertSizes, moe_times
from servesim.profiler.silicon.provenance import Sources, provenance
from servesim.profiler.silicon.skew import skew_rows
from servesim.profiler.silicon.states import state_times
from servesim.profiler.silicon.tables import silicon_gpu
from servesim.profiler.silicon.windows import WindowTimes, window_times
from servesim.specs.block_layers import (
    attention_groups,
    block_layers,
    expert_format,
    experts_of,
    is_module,
)
from servesim.specs.kv_formats import format_bytes
from servesim.specs.layers import Attention, Recurrent
from servesim.specs.rank_shapes import RankShapes, rank_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch, ProfileJob, Provenance
    from servesim.profiler.silicon.decode_grid import AttentionKernels
    from servesim.profiler.silicon.gemm import GemmTimes, Products
    from servesim.profiler.silicon.tables import Gpu
    from servesim.specs.block_layers import AttentionGroup, DenseLayer
    from servesim.specs.formats import WeightFormat

SAMPLER_START_US = 24.0
"""The sampler is a dozen small kernels (greedy: arg-max over the vocabulary and bookkeeping)."""
GRID_HISTORY = 8192
"""History at which the chunk grid is fitted to the steps of the prefill kernel."""
L2_SPEEDUP = 3.5
L2_SHARE = 0.38
DRAM_EFFICIENCY = 0.85
HEAD_NORM_NS = 58.0
"""SM time of normalising one head of one token: such short rows are bound by issue, not by bytes."""


def element_of(stored: WeightFormat, fp8_scaling: str = "tensor") -> str:
    """A weight format by the tables' name; both 16-bit formats, and what is wider, run as one."""
    if stored.element == "fp8":
        in_blocks = stored.group is not None and min(stored.group) > 1
        return "fp8_block" if in_blocks or fp8_scaling == "block" else "fp8"
    return "bfloat16" if stored.bits >= 16 else stored.element


def bits_of(stored: WeightFormat) -> float:
    """Bits of a weight, with the scales of its group where it has fewer than eight."""
    if stored.bits >= 8:
        return float(stored.bits)
    return round(stored.matrix_bytes(4096, 4096) * 8 / 4096**2, 3)


@lru_cache(maxsize=32)
def _attention(gpu: Gpu, shape: AttentionShape) -> AttentionTimes:
    return attention_times(gpu, shape)


@lru_cache(maxsize=32)
def _window(gpu: Gpu, shape: AttentionShape, window: int) -> WindowTimes:
    return window_times(gpu, shape, window)


@lru_cache(maxsize=32)
def _attention_batches(
    gpu: Gpu, shape: AttentionShape, limits: tuple[int, int, int]
) -> tuple[AttentionBatch, ...]:
    times = _attention(gpu, shape)
    return grids.attention_batches(limits, (), lambda chunk: times.prefill_us(chunk, GRID_HISTORY))


@lru_cache(maxsize=32)
def _attention_us(gpu: Gpu, shape: AttentionShape, batches: tuple[AttentionBatch, ...]) -> list[float]:
    """Attention does not depend on the weights' dtype, so that variants and models share these times."""
    times = _attention(gpu, shape)
    return [times.mixed_us(*batch.point) for batch in batches]


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


_MOVED = {"norm": 8.0, "rotary": 4.0, "activation": 6.0, "plain_activation": 4.0, "gated_norm": 6.0,
          "hyper": 14.0}  # fmt: skip
"""Kind of a layer that its config tells of -> bytes of one element read and written, 16 bit."""


def _config_layer_us(layer: DenseLayer, gpu: Gpu, tp: int, count: NDArray[np.int64]) -> NDArray[np.float64]:
    """A layer without a product, as a model's config tells of it."""
    wide = count.astype(np.float64)
    width = layer.width if layer.kind in ("norm", "hyper") else max(layer.width // tp, 1)
    if layer.kind == "head_norm":
        return head_norm_us(gpu, wide * width, 2.0)
    return moved_us(gpu, wide * width * _MOVED[layer.kind], 2.3)


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
        self._limits = (job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)
        self._stored = job.model.stored_as(job.dtype).formats
        self._exchanged: ExpertSizes | None = None
        """Experts whose tokens travel as DeepEP was measured with."""
        self._layers = block_layers(job.model.layers)
        rows, table = comm.all_reduce_rows(self._gpu) if job.collectives != "none" else ([], None)
        self._all_reduce = {(ranks, payload): time for _, ranks, payload, time in rows}
        hyper = next((each for each in self._layers.dense.values() if each.kind == "hyper"), None)
        self._hyper = hyper_us(self._gpu, hyper.width, job.model.hidden_size) if hyper else None
        self._sources = Sources(self._usual_products(), [], table, [], self._product_notes())

    @property
    def conditions(self) -> dict[str, Any]:
        return {"source": "silicon"}

    def _usual_products(self) -> GemmTimes:
        """Rows of the format that most of the weights have; also what is not as measured in the others."""
        counts: dict[str, int] = {}
        for layer in self._layers.dense.values():
            if layer.tensors:
                of = self._products(layer)
                counts[of.element] = counts.get(of.element, 0) + sum(t.parameters for t in layer.tensors)
        known = {self._products(each).element: self._products(each) for each in self._layers.dense.values()
                 if each.tensors}  # fmt: skip
        if not counts:
            return products(self._gpu, "bfloat16", 16.0).table
        return known[max(sorted(counts), key=lambda name: counts[name])].table

    def _products(self, layer: DenseLayer) -> Products:
        stored = layer.format(self._stored)
        return products(self._gpu, element_of(stored, self._job.fp8_scaling), bits_of(stored))

    def _product_notes(self) -> list[str]:
        told = [self._products(layer).note for layer in self._layers.dense.values() if layer.tensors]
        if self._hyper is None and any(each.kind == "hyper" for each in self._layers.dense.values()):
            told.append("hyper-connections from the bytes they move")
        return [note for note in dict.fromkeys(told) if note]

    def start_rank(self, tp: int) -> None:
        """
        Raises:
            InputError: the model's heads cannot be split so, or attention or experts of this shape and format
            were not measured.
        """
        job = self._job
        self._shapes = rank_shapes(job.model, tp)
        self._kernels = [(group, self._kernels_of(group)) for group in attention_groups(job.model.layers)]
        self._sources.attention.append([kernels for _, kernels in self._kernels])
        if experts := experts_of(job.model.layers):
            sizes = ExpertSizes(
                *(experts.latent or job.model.hidden_size, experts.width, experts.count, experts.top_k),
                matrices=3 if experts.gated else 2,
            )
            stored = expert_format(job.model.layers, self._stored)
            assert stored is not None
            element = element_of(stored, job.fp8_scaling)
            self._exchanged = sizes if element == comm.EXCHANGE_ELEMENT else None
            times = moe_times(self._gpu, element, bits_of(stored), sizes, tp, job.expert_load)
            self._sources.experts.append(times)

    def _kernels_of(self, group: AttentionGroup) -> AttentionKernels:
        """The times of a group of layers on one rank, with the KV format of the job."""
        job, a = self._job, group.attention
        wanted = job.kv_dtype_of(a)
        if isinstance(a, Recurrent):
            return state_times(self._gpu, a, self._shapes.tp, job.model.hidden_size)
        if wanted in ("bfloat16", "float16"):
            return self._measured(group, "bfloat16")
        near: AttentionKernels
        near_format = "fp8"
        try:
            near = self._measured(group, "fp8")
        except InputError:
            wide = self._measured(group, "bfloat16")
            if float(job.hardware.compute_capability or ADA) < ADA:
                near = ConvertedTimes(wide, self._block_us(group))
            else:
                near, near_format = wide, "bfloat16"
        bytes_of = {name: format_bytes(name, a) for name in (wanted, near_format)}
        is_it = wanted == near_format or (wanted == "fp8_ds_mla" and near_format == "fp8")
        if is_it or not bytes_of[near_format]:
            return near
        return ScaledTimes(near, bytes_of[wanted] / bytes_of[near_format], wanted, near_format)

    def _block_us(self, group: AttentionGroup) -> Callable[[int], float]:
        """us of the other layers of a block of the group, for so many tokens; experts are left out."""
        architecture = self._job.architecture
        moe = self._job.model.has_experts(group.blocks[0])
        names = [name for name in architecture.layers_of(group.blocks[0], moe)
                 if name in architecture.catalog.dense]  # fmt: skip

        @cache
        def block_us(tokens: int) -> float:
            at = np.array([max(tokens, 1)])
            return sum(float(self._layer_us(name, at)[0]) for name in names)

        return block_us

    def _measured(self, group: AttentionGroup, kv_dtype: str) -> AttentionKernels:
        """Times with a KV format of the tables.

        Raises:
            InputError: they do not have it.
        """
        job, gpu, tp, a = self._job, self._gpu, self._shapes.tp, group.attention
        if is_module(a):
            matrices = [t for t in group.tensors if t.matrix]
            stored = self._stored.of(group.prefix + matrices[0].name)
            bits = bits_of(stored)

            def product_us(rows: int, size: tuple[int, int], element: str) -> float:
                of = products(gpu, element, 16.0 if element == "bfloat16" else bits).times
                return float(of.time_us(np.array([rows]), *size)[0])

            element = element_of(stored, job.fp8_scaling)
            return module_times(gpu, group, tp, job.model.hidden_size, kv_dtype, element, product_us)
        assert isinstance(a, Attention)
        shape = AttentionShape(-(-a.heads // tp), max(1, a.kv_heads // tp), a.head_dim, kv_dtype)
        return _attention(gpu, shape) if a.reach is None else _window(gpu, shape, a.reach)

    def grid(self) -> grids.ComputedGrid:
        return grids.ComputedGrid(
            self._job,
            self._batches(*self._kernels[0]),
            [payload for ranks, payload in self._all_reduce if ranks == self._shapes.tp],
        )

    def _batches(self, group: AttentionGroup, kernels: AttentionKernels) -> tuple[AttentionBatch, ...]:
        if isinstance(kernels, AttentionTimes):
            return _attention_batches(self._gpu, kernels.shape, self._limits)
        return grids.kind_batches(self._limits, group.attention, kernels.prefill_us)

    def kv_capacity_tokens(self) -> int:
        return 1 << 62

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        at = np.asarray(tokens, dtype=np.int64)
        return {layer: self._layer_us(layer, at).tolist() for layer in layers}

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        return self.layers_us(layers, sequences)

    def _layer_us(self, layer: str, count: NDArray[np.int64]) -> NDArray[np.float64]:
        gpu, shapes, architecture = self._gpu, self._shapes, self._job.architecture
        if layer == "lm_head":  # a quantised checkpoint keeps its head in 16 bit
            return products(gpu, "bfloat16", 16.0).times.time_us(count, *shapes.gemm(layer))
        told = self._layers.dense.get(layer)
        if told is not None and told.tensors:
            size = told.gemm(shapes.tp) if architecture.blocks else shapes.gemm(layer)
            return self._products(told).times.time_us(count, *size)
        if told is not None and told.kind == "hyper" and self._hyper is not None:
            return self._hyper(count)
        if told is not None and architecture.blocks:
            return _config_layer_us(told, gpu, shapes.tp, count)
        try:
            return _elementwise_us(layer, gpu, shapes, count)
        except KeyError:
            raise NotSupportedError(
                f"profiler/models/{architecture.model_type}.yaml: the silicon source has no formula for "
                f"layer {layer!r}"
            ) from None

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        kernels = self._kernels[0][1]
        if isinstance(kernels, AttentionTimes):
            return _attention_us(self._gpu, kernels.shape, tuple(batches))
        return [kernels.mixed_us(*batch.point) for batch in batches]

    def other_attention(self) -> dict[str, list[Row]]:
        """Rows of the groups of layers beside the first."""
        found: dict[str, list[Row]] = {}
        for group, kernels in self._kernels[1:]:
            batches = self._batches(group, kernels)
            found[group.label] = [(*batch.point, kernels.mixed_us(*batch.point)) for batch in batches]
        return found

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        """On one of the ranks without expert parallelism: a slice of each expert."""
        times = self._sources.experts[-1]
        return [times.time_us(tokens, activated) for tokens, activated in points]

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        return [self._all_reduce[self._shapes.tp, payload] for payload in payloads]

    def exchange_rows(self) -> list[Row]:
        """DeepEP's kernels, where they were measured with such experts; they belong to whole experts."""
        if self._shapes.tp > 1 or self._exchanged is None:
            return []
        return list(comm.exchange_rows(self._gpu, self._exchanged))

    def skew_rows(self) -> list[Row]:
        first = self._kernels[0][1]
        first = first.wide if isinstance(first, ConvertedTimes) else first
        if not isinstance(first, AttentionTimes):
            return []
        return list(_skew_rows(self._gpu, first.shape, self._limits))

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
