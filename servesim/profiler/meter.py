"""The meter protocol: what a source of kernel times answers, whether it measures, derives or computes.

A sweep asks a meter for the times of a table's grid points, one rank after the other. A meter that
``computes`` gets a whole table in one call; one that measures gets one point a call, so that rows can be
saved as they come.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from servesim.slotted import dataclass
from servesim.specs.dtypes import resolve_kv_dtype, variant_name
from servesim.specs.kv_skip import variant_with, wide_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.measure.grid import SkewShot
    from servesim.specs.architecture import Architecture
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.layers import AnyAttention
    from servesim.specs.model import ModelSpec


class AttentionBatch(NamedTuple):
    """The sequences one attention call works on.

    A KV length, and a chunk's history, count the tokens in the cache before the step: a decode of KV length k
    reads k + 1 keys, its own among them.
    """

    chunk: int = 0
    """Tokens of the one prefill chunk; 0: there is none."""
    history: int = 0
    """Tokens of the chunk's sequence that are in the cache already."""
    decodes: tuple[tuple[int, int], ...] = ()
    """Runs of equal decodes: (how many, KV length)."""

    @property
    def point(self) -> tuple[int, int, int, int]:
        """The row of attention.csv: chunk, history, decodes, KV length; of decodes that are all alike."""
        return (self.chunk, self.history, *(self.decodes[0] if self.decodes else (0, 0)))

    @property
    def num_decodes(self) -> int:
        return sum(count for count, _ in self.decodes)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the cache once the step is over."""
        return self.chunk + self.history + sum(count * (kv + 1) for count, kv in self.decodes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence once the step is over."""
        return max([self.chunk + self.history, *(kv + 1 for _, kv in self.decodes)])


class Grid(Protocol):
    """Where the tables of one rank are sampled."""

    def tokens(self) -> list[int]:
        """Token counts of dense.csv."""

    def sequences(self) -> list[int]:
        """Sequence counts of per_sequence.csv."""

    def attention(self, kv_tokens: int) -> Sequence[AttentionBatch]:
        """Batches of attention.csv that fit ``kv_tokens`` tokens of KV."""

    def experts(self, model: ModelSpec) -> list[tuple[int, int]]:
        """(tokens, activated experts) of moe.csv."""

    def skews(self, kv_tokens: int) -> list[SkewShot]:
        """Shots of skew.csv; empty: none."""

    def payloads(self) -> Sequence[int]:
        """Bytes of the all-reduces of comm.csv; empty: none."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What ``meta.yaml`` says of a bundle beside what is said of every bundle alike."""

    source: str
    origin: dict[str, Any]
    """Ahead of the job: data, device, versions, how far to trust the whole."""
    claims: dict[str, Any]
    """After the job: where each table is from, how far it reaches."""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the hardware file that the times depend on; empty where they were measured."""
    derivation: Mapping[str, Any] = field(default_factory=dict)
    """Revision of the formulas, their data, and the choices that change their numbers."""


class Meter(Protocol):
    """A source of kernel times at work on one job. All times are µs of one rank."""

    @property
    def computes(self) -> bool:
        """Whether times come from formulas: a table is one shot, and needs no device."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What all rows of a bundle have in common: source, device, versions, how time is taken."""

    def start_rank(self, tp: int) -> None:
        """Get ready for one rank of ``tp``; whatever was ready before may go."""

    def grid(self) -> Grid:
        """The points of the rank that was started, where nobody chose others."""

    def kv_capacity_tokens(self) -> int:
        """KV tokens that fit the device beside everything else."""

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        """Times of each of the dense ``layers``, one for each number of tokens."""

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        """Times of each of the per-sequence ``layers``, one for each number of sequences."""

    def attention_us(self, batches: Sequence[AttentionBatch]) -> Sequence[float]:
        """Times of the average block's attention, one for each batch."""

    def experts_us(self, points: Sequence[tuple[int, int]]) -> Sequence[float]:
        """Times of one expert layer, for each (tokens, different experts that they touch)."""

    def all_reduce_us(self, payloads: Sequence[int]) -> Sequence[float]:
        """Times of one all-reduce among the ranks, for each number of bytes a rank brings in."""

    def other_attention(self) -> dict[str, list[Row]]:
        """Stem of a table -> its rows, for layers whose attention is of another kind than attention.csv has;
        empty where that holds the average block."""

    def exchange_rows(self) -> list[Row]:
        """Rows of exchange.csv, what ranks that share experts take to exchange tokens; empty: not known."""

    def skew_rows(self) -> list[Row]:
        """Rows of skew_fit.csv where the source derives them; empty: they are fitted to skew.csv, if any."""

    def provenance(self, content: BundleContent) -> Provenance:
        """Where the tables of ``content`` are from and how far to trust them."""

    def close(self) -> None:
        """Give the device back."""


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """One bundle to make."""

    model: ModelSpec
    architecture: Architecture
    hardware: HardwareSpec
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    tp_degrees: tuple[int, ...] = (1,)
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_kv: int = 131072
    collectives: str = "auto"
    """Whether comm.csv is made: none, measured, or auto, which leaves it to the source."""
    fp8_scaling: str = "tensor"
    """Scales of fp8 weights: one per ``tensor`` (or channel), or one per ``block`` of 128 x 128."""
    expert_load: str = "balanced"
    """How evenly the gate spreads tokens: balanced, power_law_1.01 or power_law_1.2."""

    @property
    def variant(self) -> str:
        """Folder name of the dtype combination."""
        layers = self.model.layers
        return variant_with(variant_name(self.dtype, self.kv_cache_dtype), layers, wide_layers(layers))

    @property
    def kv_dtype(self) -> str:
        """What the KV cache is stored in."""
        return resolve_kv_dtype(self.dtype, self.kv_cache_dtype)

    def kv_dtype_of(self, attention: AnyAttention) -> str:
        """What the cache of one kind of layers is stored in."""
        return getattr(attention, "kv_format", None) or self.kv_dtype
