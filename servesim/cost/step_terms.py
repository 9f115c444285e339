"""The layers of a step whose time depends on its token count or its sequence count alone.

Each layer knows its µs for an array of counts, how often a step pays it, and where its number comes from.
:class:`servesim.cost.count_term.CountTerm` adds a set of them up into one term of a step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.tables import Curve, describe_lookup
from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.block_layers import all_reduces
from servesim.specs.dtypes import EIGHT_BIT
from servesim.specs.rank_shapes import GEMM_LAYERS, rank_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from servesim.cost.bundle import RankTables
    from servesim.cost.count_term import CountLayer
    from servesim.cost.expert_stage import MoeTable
    from servesim.cost.terms import Stage
    from servesim.network.topology import Dimension
    from servesim.specs.architecture import Architecture
    from servesim.specs.hardware import EngineSpec
    from servesim.specs.model import ModelSpec

ACTIVATION_BYTES = 2  # hidden states travel between ranks in 16 bit, whatever the weights are
TILE_ROWS = 16
"""Rows that a tensor core multiplies at a time; no GEMM takes fewer (NVIDIA PTX ISA, ``mma``)."""
SMOOTH_ROWS = {"none": 0, "tile": TILE_ROWS, "all": 1 << 30}
"""``engine.smooth_gemms`` -> rows up to which times are made to rise."""
_ALL_REDUCE = "all_reduce"


@dataclass(slots=True, frozen=True)
class LayerTerm:
    """A layer with a measured curve over tokens or sequences."""

    name: str
    calls: int
    curve: Curve
    unit: str
    source: str
    tiled: bool = False
    """Whether it is a GEMM over tokens, which computes whole tiles of rows.

    The measured curve then has a step between two of its points; a line through them would give the first
    rows of a new tile nearly the time of the old one.
    """
    row_us: float = 0.0
    """µs that a row takes at the rate that GEMMs sustain; 0: the curve alone decides."""
    peak_us: float = 0.0
    """µs that a row takes at the GPU's peak rate, which bounds what lies beyond the last measured one; 0: not
    known. Up to there a GEMM may only have read its weights, so that its rows tell no rate."""

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        if not self.tiled:
            return self._bounded(counts, self.curve.at(counts))
        rows = gemm_rows(counts)
        sustained: NDArray[np.float64] = np.maximum(self.curve.at(rows), rows * self.row_us)
        return sustained

    def _bounded(self, counts: NDArray[np.int64], us: NDArray[np.float64]) -> NDArray[np.float64]:
        beyond = counts > self.curve.points[-1]
        if not self.peak_us or not beyond.any():
            return us
        return np.where(beyond, np.maximum(us, counts * self.peak_us), us)

    def origin(self, count: int) -> str:
        if count > self.curve.points[-1] and count * self.peak_us > float(self.curve.at(count)[0]):
            return f"{count} rows at the GPU's peak rate (peak_tflops)"
        rows = int(gemm_rows(np.array([count]))[0]) if self.tiled else count
        whole = f", tiles of {TILE_ROWS} rows" if rows != count else ""
        if rows * self.row_us > float(self.curve.at(rows)[0]):
            return f"{rows} rows at the rate that GEMMs sustain (engine.sustained_tflops_*){whole}"
        return f"{describe_lookup(self.curve.points, rows, self.unit)} in {self.source}{whole}"


def gemm_rows(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows that a GEMM computes for ``tokens``: whole tiles; up to a single tile, as measured."""
    return np.where(tokens > TILE_ROWS, -(-tokens // TILE_ROWS) * TILE_ROWS, tokens)


@dataclass(slots=True, frozen=True)
class Gemms:
    """How the measured times of GEMMs are read."""

    smooth_rows: int = 0
    """Up to so many rows one takes at most what a larger one takes: fewer rows can be padded to more."""
    row_us: Mapping[str, float] = field(default_factory=dict)
    """Layer -> µs of a row at the sustained rate; none for a layer without a known one."""
    head_us: float = 0.0
    """µs of a row of the output head at the peak rate of 16-bit arithmetic; 0: not known."""

    @classmethod
    def of(
        cls, engine: EngineSpec, model: ModelSpec, dtype: str, tp: int, peak_tflops: float | None = None
    ) -> Gemms:
        """What the engine's constants say; ``dtype`` of the weights, ``tp`` ranks that share them, and the
        peak rate of 16-bit arithmetic."""
        smooth_rows = SMOOTH_ROWS[engine.smooth_gemms]
        head_us = 2e-6 * (model.vocab_size // tp) * model.hidden_size / peak_tflops if peak_tflops else 0.0
        rate = engine.sustained_tflops_8bit if dtype in EIGHT_BIT else engine.sustained_tflops_16bit
        if rate is None:
            return cls(smooth_rows, head_us=head_us)
        shapes = rank_shapes(model, tp)
        sizes = {layer: shapes.gemm(layer) for layer in GEMM_LAYERS}
        return cls(smooth_rows, {layer: 2e-6 * n * k / rate for layer, (n, k) in sizes.items()}, head_us)

    def term(self, layer: str, calls: int, curve: Curve, source: str) -> LayerTerm:
        """The layer whose GEMMs over tokens were measured as ``curve``."""
        read = curve.rising(self.smooth_rows) if self.smooth_rows else curve
        return LayerTerm(layer, calls, read, "tokens", source, True, self.row_us.get(layer, 0.0))


AS_MEASURED = Gemms()


@dataclass(slots=True, frozen=True)
class MoeTerm:
    """The expert layer under balanced routing."""

    name: str
    calls: int
    table: MoeTable
    num_experts: int
    experts_per_token: int

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.table.layer_us(counts, self.num_experts, self.experts_per_token)

    def origin(self, count: int) -> str:
        tokens, activated = self.table.coordinates(
            np.array([count]), self.num_experts, self.experts_per_token
        )
        where = describe_lookup(self.table.surface.axes[0], float(tokens[0]), "tokens")
        split = f", equal work of one of {self.table.split} ranks" if self.table.split > 1 else ""
        return f"{where}, {activated[0]:.1f} experts in {self.table.source}{split}"


@dataclass(slots=True, frozen=True)
class LinkAllReduceTerm:
    """All-reduce of the hidden states, from the cluster's links."""

    name: str
    calls: int
    ranks: int
    hidden_size: int
    link: Dimension

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        payloads = (counts * (self.hidden_size * ACTIVATION_BYTES)).tolist()
        return np.array([2 * self.link.pass_ns(self.ranks, payload) / 1000.0 for payload in payloads])

    def origin(self, count: int) -> str:
        payload = count * self.hidden_size * ACTIVATION_BYTES
        wiring = self.link.wiring.replace("_", " ")
        return (
            f"formula: {wiring} all-reduce of {payload} bytes over {self.ranks} ranks "
            f"({self.link.describe()})"
        )


@dataclass(slots=True, frozen=True)
class MeasuredAllReduceTerm:
    """All-reduce of the hidden states, measured over payload bytes."""

    name: str
    calls: int
    hidden_size: int
    curve: Curve
    source: str

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.curve.at(counts * (self.hidden_size * ACTIVATION_BYTES))

    def origin(self, count: int) -> str:
        payload = count * self.hidden_size * ACTIVATION_BYTES
        return f"{describe_lookup(self.curve.points, payload, 'bytes')} in {self.source}"


@dataclass(slots=True, frozen=True)
class StageTerms:
    """The layers of a stage but attention, by what they depend on."""

    blocks: list[CountLayer]
    """By tokens, in the transformer blocks: dense layers, experts, all-reduces."""
    once: list[CountLayer]
    """By tokens, once a step: embedding, final norm."""
    sequences: list[CountLayer]
    """By sequences, once a step: output logits, sampling."""


def stage_terms(
    architecture: Architecture,
    stage: Stage,
    tables: RankTables,
    tp: int = 1,
    link: Dimension | None = None,
    *,
    experts: bool = True,
    by_chunk: bool = False,
    gemms: Gemms = AS_MEASURED,
) -> StageTerms:
    """All layers of a stage but attention; ``experts``: the expert layers among them.

    ``by_chunk``: ranks take chunks of the tokens to the experts, which leaves nothing to all-reduce.
    ``link`` connects the ``tp`` ranks of the instance, a measured all-reduce of the bundle wins; None: no
    all-reduces.

    Raises:
        InputError: a layer of the architecture has no rows in the bundle.
    """
    model, calls = stage.model, _block_calls(architecture, stage)
    calls.pop(architecture.attention_layer, None)
    if not experts:
        calls = Counter({layer: n for layer, n in calls.items() if architecture.kind(layer) != "moe"})
    in_blocks = [_token_term(layer, n, architecture, model, tables, gemms) for layer, n in calls.items()]
    if tp > 1 and link is not None:
        reduces = sum(all_reduces(layer) for layer in stage.layers)
        reduces -= len(stage.expert_blocks) if by_chunk else 0
        in_blocks.append(all_reduce_term(tables, model, tp, link, reduces))
    outside = [
        *(architecture.sequence.prologue if stage.is_first else ()),
        *(architecture.sequence.head if stage.is_last else ()),
    ]
    once = Counter(layer for layer in outside if architecture.kind(layer) != "per_sequence")
    heads = Counter(layer for layer in outside if architecture.kind(layer) == "per_sequence")
    source = f"{tables.folder.name}/per_sequence.csv"
    return StageTerms(
        in_blocks,
        [_token_term(layer, n, architecture, model, tables, gemms) for layer, n in once.items()],
        [
            LayerTerm(
                *(layer, n, tables.layer("per_sequence", layer), "sequences", source),
                peak_us=gemms.head_us if layer == "lm_head" else 0.0,
            )
            for layer, n in heads.items()
        ],
    )


def _block_calls(architecture: Architecture, stage: Stage) -> Counter[str]:
    """How often the blocks of a stage run each of their layers."""
    calls, num_moe = Counter[str](), len(stage.expert_blocks)
    if architecture.blocks:
        for block in stage.blocks:
            calls.update(architecture.layers_of(block, moe=False))
        return calls
    for is_moe, blocks in ((False, stage.num_blocks - num_moe), (True, num_moe)):
        if blocks:
            for layer in architecture.block_layers(is_moe):
                calls[layer] += blocks
    return calls


def _token_term(
    layer: str,
    calls: int,
    architecture: Architecture,
    model: ModelSpec,
    tables: RankTables,
    gemms: Gemms,
) -> CountLayer:
    if architecture.kind(layer) != "moe":
        source = f"{tables.folder.name}/dense.csv"
        curve = tables.layer("dense", layer)
        if architecture.is_gemm(layer):
            return gemms.term(layer, calls, curve, source)
        return LayerTerm(layer, calls, curve, "tokens", source)
    if tables.moe is None:
        raise InputError(
            f"{tables.folder / 'moe.csv'}: no such file, nor one in tp1: layer {layer} of the architecture "
            "has no rows; profile it again with this layer"
        )
    return MoeTerm(layer, calls, tables.moe, model.num_experts, model.num_experts_per_tok)


def all_reduce_term(
    tables: RankTables, model: ModelSpec, ranks: int, link: Dimension, calls: int
) -> CountLayer:
    """The all-reduces of tensor parallelism: measured if the bundle has them, else over ``link``."""
    measured = tables.collective("all_reduce", ranks)
    if measured is not None:
        source = f"{tables.folder.name}/comm.csv"
        return MeasuredAllReduceTerm(_ALL_REDUCE, calls, model.hidden_size, measured, source)
    return LinkAllReduceTerm(_ALL_REDUCE, calls, ranks, model.hidden_size, link)
