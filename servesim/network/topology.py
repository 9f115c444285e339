"""The links between NPUs: four dimensions, and what collectives over them take.

Dimension by dimension, innermost first: ``tp`` (ranks of a tensor-parallel group), ``pp`` (stages of a
pipeline), ``dp`` (members of a data-parallel group) and ``nodes``. Each is wired in one of three ways, N
ranks with links of one bandwidth and latency:

- ``ring``: every rank has one link to the next. A pass takes N-1 hops of 1/N of the payload each.
- ``fully_connected``: every rank has a link to every other. A pass sends N-1 pieces of 1/N at once.
- ``switch``: every rank has one link to a switch that keeps up with all of them. A pass sends N-1 pieces of
  1/N one behind the other, and pays the latency once.

A *pass* is what an all-gather, a reduce-scatter or an all-to-all is; an all-reduce is two (Thakur et al.,
"Optimization of Collective Communication Operations in MPICH", 2005). ``payload_bytes`` is always the full
buffer: what every rank ends up with (all-gather), starts with (all-reduce, reduce-scatter) or spreads over
its peers (all-to-all).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.specs.cluster import ClusterSpec

Wiring = Literal["ring", "fully_connected", "switch"]
DIMENSIONS = ("tp", "pp", "dp", "nodes")
_T = TypeVar("_T")


@dataclass(slots=True, frozen=True)
class Dimension:
    """One dimension of the topology: links of ``bandwidth_gbs`` GB/s (1e9 bytes/s) and ``latency_ns``."""

    name: str
    wiring: Wiring
    bandwidth_gbs: float
    latency_ns: float

    def pass_ns(self, ranks: int, payload_bytes: float) -> float:
        """Every one of N ``ranks`` sends 1/N of the payload to (or on behalf of) each of the others.

        Ring ``(N-1) (latency + B/N/bw)``, fully connected ``latency + B/N/bw``, switch
        ``latency + (N-1) B/N/bw``; 0 for a single rank.
        """
        if ranks == 1:
            return 0.0
        if self.wiring == "ring":
            return ring_all_gather_ns(ranks, payload_bytes, self.bandwidth_gbs, self.latency_ns)
        piece_ns = payload_bytes / ranks / self.bandwidth_gbs
        return self.latency_ns + (piece_ns if self.wiring == "fully_connected" else (ranks - 1) * piece_ns)

    def send_ns(self, payload_bytes: float) -> float:
        """One transfer to a neighbour: ``latency + B/bw``."""
        return send_ns(payload_bytes, self.bandwidth_gbs, self.latency_ns)

    def describe(self) -> str:
        """The links, for people."""
        return f"{self.bandwidth_gbs:g} GB/s, {self.latency_ns:g} ns a hop"


@dataclass(slots=True, frozen=True)
class RankGroup:
    """Ranks that take part in a collective: how many in each dimension, innermost first.

    A collective over several dimensions is done dimension by dimension. A reduce-scatter starts innermost and
    hands each outer dimension 1/(ranks so far) of the payload; an all-gather goes the same way back. An
    all-to-all moves the whole payload in every dimension, as each piece travels along one after the other.
    """

    spans: tuple[tuple[Dimension, int], ...]

    @property
    def ranks(self) -> int:
        """All ranks of the group."""
        total = 1
        for _, ranks in self.spans:
            total *= ranks
        return total

    def all_gather_ns(self, payload_bytes: float) -> float:
        """Σ over dimensions of a pass with B / (ranks of the inner dimensions)."""
        total, inner = 0.0, 1
        for dimension, ranks in self.spans:
            total += dimension.pass_ns(ranks, payload_bytes / inner)
            inner *= ranks
        return total

    def reduce_scatter_ns(self, payload_bytes: float) -> float:
        """The all-gather, backwards."""
        return self.all_gather_ns(payload_bytes)

    def all_reduce_ns(self, payload_bytes: float) -> float:
        """A reduce-scatter and an all-gather."""
        return 2 * self.all_gather_ns(payload_bytes)

    def all_to_all_ns(self, payload_bytes: float) -> float:
        """Σ over dimensions of a pass with B."""
        return sum(dimension.pass_ns(ranks, payload_bytes) for dimension, ranks in self.spans)


@dataclass(slots=True, frozen=True)
class Topology:
    """The four dimensions of a cluster's links."""

    tp: Dimension
    pp: Dimension
    dp: Dimension
    nodes: Dimension

    @classmethod
    def of(cls, cluster: ClusterSpec) -> Topology:
        """The links of a cluster config; where a list is shorter than four, its last entry goes on."""
        wirings, bandwidths, latencies = (
            cluster.link_wirings,
            cluster.link_bandwidths_gbs,
            cluster.link_latencies_ns,
        )
        return cls(
            *(
                Dimension(name, _entry(wirings, i), _entry(bandwidths, i), _entry(latencies, i))
                for i, name in enumerate(DIMENSIONS)
            )
        )

    def data_parallel(self, nodes: Sequence[int], tp: int = 1) -> RankGroup:
        """``tp`` ranks of each member of a data-parallel group; ``nodes``: the node each of them is on.

        With unequal numbers of members on the nodes, the fullest node sets the pace.
        """
        counts = [nodes.count(node) for node in dict.fromkeys(nodes)]
        inner = ((self.tp, tp),) if tp > 1 else ()
        return RankGroup((*inner, (self.dp, max(counts)), (self.nodes, len(counts))))


def _entry(values: Sequence[_T], index: int) -> _T:
    return values[min(index, len(values) - 1)]


def ring_all_reduce_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``2 (N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return 2 * _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_all_gather_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_reduce_scatter_ns(
    ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float
) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_all_to_all_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def send_ns(payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """One transfer over one link: ``latency + payload / bandwidth``."""
    return latency_ns + payload_bytes / bandwidth_gbs


def _ring_pass_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """Once around the ring: N-1 hops of 1/N of the payload each."""
    return (ranks - 1) * (latency_ns + payload_bytes / ranks / bandwidth_gbs)
