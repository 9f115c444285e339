"""The parts of a step's time that depend on its token count or its sequence count alone.

Each term knows its µs for an array of counts, how often a step pays it, and where its number comes from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from serving.errors import InputError
from serving.latency.tables import Curve, describe_lookup
from serving.network.collectives import ring_all_reduce_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from serving.latency.bundle import RankTables
    from serving.latency.moe import MoeTable
    from serving.specs.architecture import Architecture
    from serving.specs.model import ModelSpec

ACTIVATION_BYTES = 2  # hidden states travel between ranks in 16 bit, whatever the weights are


class Term(Protocol):
    """One layer or collective of a step."""

    @property
    def name(self) -> str: ...

    @property
    def calls(self) -> int:
        """How often a step runs it."""

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """µs of one call for each token (or sequence) count, shape (counts,)."""

    def origin(self, count: int) -> str:
        """Where the number for ``count`` comes from, for people."""


@dataclass(slots=True, frozen=True)
class LayerTerm:
    """A layer with a measured curve over tokens or sequences."""

    name: str
    calls: int
    curve: Curve
    unit: str
    source: str

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.curve.at(counts)

    def origin(self, count: int) -> str:
        return f"{describe_lookup(self.curve.points, count, self.unit)} in {self.source}"


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
class RingAllReduceTerm:
    """All-reduce of the hidden states, from the cluster's links."""

    name: str
    calls: int
    ranks: int
    hidden_size: int
    bandwidth_gbs: float
    latency_ns: float

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        payloads = (counts * (self.hidden_size * ACTIVATION_BYTES)).tolist()
        return np.array(
            [
                ring_all_reduce_ns(self.ranks, b, self.bandwidth_gbs, self.latency_ns) / 1000.0
                for b in payloads
            ]
        )

    def origin(self, count: int) -> str:
        payload = count * self.hidden_size * ACTIVATION_BYTES
        return (
            f"formula: ring all-reduce of {payload} bytes over {self.ranks} ranks "
            f"({self.bandwidth_gbs:g} GB/s, {self.latency_ns:g} ns a hop)"
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


def total_ns(terms: Sequence[Term], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """ns that a step pays for all terms together, for each count."""
    total = np.zeros(len(counts))
    for term in terms:
        total += term.us(counts) * (1000.0 * term.calls)
    return total


def layer_terms(
    architecture: Architecture, model: ModelSpec, tables: RankTables
) -> tuple[list[Term], list[Term]]:
    """All layers of a step but attention: those that go by tokens, and those that go by sequences.

    Raises:
        InputError: a layer of the architecture has no rows in the bundle.
    """
    calls: Counter[str] = Counter()
    experts = model.num_moe_layers
    for is_moe, blocks in ((False, model.num_hidden_layers - experts), (True, experts)):
        if blocks:
            for layer in architecture.block_layers(is_moe):
                calls[layer] += blocks
    del calls[architecture.attention_layer]
    calls.update(architecture.layers_outside_blocks())
    by_tokens = [_token_term(layer, n, architecture, model, tables) for layer, n in calls.items()]
    source = f"{tables.folder.name}/per_sequence.csv"
    by_sequences: list[Term] = [
        LayerTerm(layer, n, tables.layer("per_sequence", layer), "sequences", source)
        for layer, n in Counter(architecture.head_layers()).items()
    ]
    return by_tokens, by_sequences


def _token_term(
    layer: str, calls: int, architecture: Architecture, model: ModelSpec, tables: RankTables
) -> Term:
    if architecture.kind(layer) != "moe":
        source = f"{tables.folder.name}/dense.csv"
        return LayerTerm(layer, calls, tables.layer("dense", layer), "tokens", source)
    if tables.moe is None:
        raise InputError(
            f"{tables.folder / 'moe.csv'}: no such file, nor one in tp1: layer {layer} of the architecture "
            "has no rows; profile it again with this layer"
        )
    return MoeTerm(layer, calls, tables.moe, model.num_experts, model.num_experts_per_tok)


def all_reduce_term(
    tables: RankTables, model: ModelSpec, ranks: int, bandwidth_gbs: float, latency_ns: float
) -> Term | None:
    """The all-reduces of tensor parallelism, two a block: measured if the bundle has them, else a ring.

    None for a single rank. ``bandwidth_gbs`` in GB/s and ``latency_ns`` describe one link of the ring.
    """
    if ranks == 1:
        return None
    calls = 2 * model.num_hidden_layers
    if tables.all_reduce is not None:
        source = f"{tables.folder.name}/comm.csv"
        return MeasuredAllReduceTerm("all_reduce", calls, model.hidden_size, tables.all_reduce, source)
    return RingAllReduceTerm("all_reduce", calls, ranks, model.hidden_size, bandwidth_gbs, latency_ns)
