"""What the expert layers of a pipeline stage take when the experts are spread over ranks.

Every rank of an expert-parallel group holds whole experts. A layer takes as long as its slowest rank does,
which works on the (token, expert) pairs that routing sends it: counted in tokens of k experts each, so that
BALANCED over R ranks gives each 1/R of the tokens. Before and after it, members of a data-parallel group
exchange tokens. Within one member, all tensor-parallel ranks know every token and nothing is exchanged; the
member's usual all-reduce adds up what its ranks computed. Where members of several ranks exchange, most
models give each rank a chunk of its member's tokens (:func:`servesim.specs.vllm_versions.experts_by_chunk`):
all ranks exchange, nothing is left to all-reduce, and a member's ranks gather each other's chunks at the end.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from servesim.cost.step_terms import ACTIVATION_BYTES
from servesim.cost.terms import LayerCost
from servesim.memory.traffic import expected_distinct_experts
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from servesim.cost.bundle import RankTables
    from servesim.cost.tables import Curve, Floats, Surface
    from servesim.network.topology import RankGroup
    from servesim.specs.model import ModelSpec


ONE_WAY = 1.75
"""An exchange runs at so many times the bandwidth of an all-reduce, which is what ``link_bw`` was fitted to.

Fitted on a recorded run of two ranks that share experts over PCIe (Qwen3-30B-A3B, vLLM 0.19, RTX PRO 6000).
By the reading of ``link_bw`` and the host's constants, its mean TPOT is simulated 0.3 % too short to 0.3 %
too long; with 1.5, 1.2 to 1.4 % too long, with 2, 0.5 to 1.6 % too short. Measured collectives need none."""


class ExpertLoads(NamedTuple):
    """What routing gives each rank to do, both of shape (layers, ranks)."""

    tokens: Floats
    """(token, expert) pairs divided by the experts of a token."""
    activated: Floats
    """Experts of the rank that at least one token chose."""


class ExpertRouting(Protocol):
    """How tokens choose experts; see :mod:`servesim.engine.experts`."""

    @property
    def varies(self) -> bool:
        """Whether loads depend on anything but the number of tokens."""

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        """The loads of ``tokens`` tokens in each of the transformer blocks ``layers``.

        ``wave`` tells one wave from another: the same numbers give the same loads, whatever was asked before.
        """


class TokenExchange:
    """Dispatch and combine between the members of a data-parallel group, per expert layer."""

    def __init__(
        self,
        model: ModelSpec,
        ranks: int,
        group: RankGroup,
        tables: RankTables,
        member: RankGroup | None = None,
        measured: Mapping[str, Curve] | None = None,
    ) -> None:
        """
        Args:
            model: gives the sizes.
            ranks: of the expert-parallel group; each holds 1/ranks of the experts.
            group: those that exchange: one rank of each member, or all of them, each with a chunk.
            tables: measured collectives, which win over the links where the members are on one node.
            member: the ranks of a member where each takes a chunk of its tokens.
            measured: backend with kernels of its own → dispatch and combine over the tokens of a rank, in µs.
        """
        self._group = group
        self._member = member
        self._measured = measured or {}
        _, nodes = group.spans[-1]
        self._tables = tables
        self._one_node = nodes == 1
        self._row_bytes = model.hidden_size * ACTIVATION_BYTES
        self._logit_bytes = model.num_experts * ACTIVATION_BYTES
        elsewhere = model.num_experts - model.num_experts // ranks
        chosen = model.num_experts_per_tok
        self._chance = 1.0 - comb(elsewhere, chosen) / comb(model.num_experts, chosen)
        """That a token has an expert on a given rank."""

    def allgather_reducescatter_ns(self, tokens: int) -> float:
        """One all-gather of hidden states and router logits, then a reduce-scatter of hidden states.

        vLLM hands both tensors of the all-gather to NCCL as a group, which launches them as one: one latency.
        ``tokens``: of the member that has most; the others wait for it.
        """
        rows = self._group.ranks * self._chunk(tokens)
        dispatch_ns = self._ns("all_gather", rows * (self._row_bytes + self._logit_bytes))
        return dispatch_ns + self._ns("reduce_scatter", rows * self._row_bytes) + self._gather_ns(tokens)

    def all_to_all_ns(self, tokens: int) -> float:
        """Each token travels to the members that have one of its experts, and its results travel back.

        Each rank sends the rank of the same number on every other member the tokens that have an expert
        there, ``1 - C(E - E/R, k) / C(E, k)`` of them when experts are equally popular. With chunks it sends
        those of its own to all others.
        """
        rows = self._group.ranks * self._chunk(tokens)
        return 2 * self._ns("all_to_all", rows * self._chance * self._row_bytes) + self._gather_ns(tokens)

    def deepep_high_throughput_ns(self, tokens: int) -> float:
        """DeepEP's kernels for long prompts, as measured."""
        return self._deepep_ns("deepep_high_throughput", tokens)

    def deepep_low_latency_ns(self, tokens: int) -> float:
        """DeepEP's kernels for decodes, as measured."""
        return self._deepep_ns("deepep_low_latency", tokens)

    def _deepep_ns(self, backend: str, tokens: int) -> float:
        rows = max(self._chunk(tokens), 1)
        return float(self._measured[backend].at(rows)[0]) * 1000.0 + self._gather_ns(tokens)

    def _chunk(self, tokens: int) -> int:
        """What a rank brings of a member's tokens; vLLM pads them to whole chunks."""
        return tokens if self._member is None else -(-tokens // self._member.ranks)

    def _gather_ns(self, tokens: int) -> float:
        """The ranks of a member gather the results of each other's chunks."""
        if self._member is None:
            return 0.0
        rows = self._member.ranks * self._chunk(tokens)
        return self._ns("all_gather", rows * self._row_bytes, self._member)

    def _ns(self, collective: str, payload_bytes: float, group: RankGroup | None = None) -> float:
        measured = None
        if group is not None or self._one_node:
            measured = self._tables.collective(collective, (group or self._group).ranks)
        if measured:
            return float(measured.at(payload_bytes)[0]) * 1000.0
        formula = getattr(group or self._group, f"{collective}_ns")
        return float(formula(payload_bytes / ONE_WAY))


class ExpertStage:
    """All expert layers of a stage, for one expert-parallel group."""

    def __init__(
        self,
        routing: ExpertRouting,
        layers: Sequence[int],
        tables: Sequence[MoeTable],
        replicas: int,
        exchange: TokenExchange | None,
        backend: str,
        block_copy: bool,
    ) -> None:
        """
        Args:
            routing: of tokens to the ranks.
            layers: the stage's transformer blocks that have experts.
            tables: of every rank.
            replicas: ranks that hold the same experts and share the tokens.
            exchange: between members; None: one member holds all experts.
            backend: the exchange's kind, ``moe_backend`` of the cluster config.
            block_copy: whether one layer stands for all.
        """
        self._routing = routing
        self._layers = list(layers[:1]) if block_copy else list(layers)
        self._stands_for = len(layers) if block_copy else 1
        self._num_layers = len(layers)
        self._replicas = replicas
        self._backend = getattr(exchange, f"{backend}_ns") if exchange else None
        ranks: dict[int, list[int]] = {}
        for rank, table in enumerate(tables):
            ranks.setdefault(id(table), []).append(rank)
        self._tables = [(tables[which[0]], np.array(which)) for which in ranks.values()]
        self._experts_ns: dict[int, float] = {}
        self._exchange_ns: dict[int, float] = {}

    def ns(self, total: int, most: int, wave: int) -> float:
        """ns of all layers for a wave of ``total`` tokens, ``most`` of them on one member."""
        if not self._num_layers:
            return 0.0
        tokens = -(-total // self._replicas)
        if self._routing.varies:
            experts_ns = self._slowest_ranks_ns(tokens, wave)
        else:
            cached = self._experts_ns.get(tokens)
            if cached is None:
                cached = self._experts_ns[tokens] = self._slowest_ranks_ns(tokens, wave)
            experts_ns = cached
        if self._backend is None:
            return experts_ns
        exchange_ns = self._exchange_ns.get(most)
        if exchange_ns is None:
            exchange_ns = self._exchange_ns[most] = self._num_layers * self._backend(most)
        return experts_ns + exchange_ns

    def explain(self, total: int, most: int, wave: int) -> list[LayerCost]:
        """:meth:`ns` as lines for people: exchange between members, then the experts."""
        if not self._num_layers:
            return []
        both_us = self.ns(total, most, wave) / 1000.0
        exchange_us = self._exchange_ns.get(most, 0.0) / 1000.0
        calls = self._num_layers
        origin = f"slowest rank of {total} tokens, routed {'by chance' if self._routing.varies else 'evenly'}"
        lines = [LayerCost("experts", calls, (both_us - exchange_us) / calls, origin)]
        if exchange_us:
            lines.insert(
                0, LayerCost("expert exchange", calls, exchange_us / calls, f"{most} tokens a member")
            )
        return lines

    def _slowest_ranks_ns(self, tokens: int, wave: int) -> float:
        """Σ over layers of the slowest rank's time."""
        loads = self._routing.loads(tokens, self._layers, wave)
        slowest = np.zeros(len(self._layers))
        for table, ranks in self._tables:
            asked = loads.tokens[:, ranks], loads.activated[:, ranks]
            us = table.surface.at(asked[0].ravel(), asked[1].ravel()).reshape(asked[0].shape)
            us = np.where(asked[0] > 0, us, 0.0)  # a rank that nobody chose has nothing to run
            slowest = np.maximum(slowest, us.max(axis=1))
        return float(slowest.sum()) * 1000.0 * self._stands_for


@dataclass(slots=True, frozen=True)
class MoeTable:
    """moe.csv of one bundle as a dense surface over (tokens, activated experts), and how to ask it."""

    surface: Surface
    source: str
    """Where the rows come from, for people: ``tp1/moe.csv``."""
    split: int
    """Ranks that share every expert although rows are of whole ones; 1 if measured as it runs."""

    def coordinates(
        self, tokens: NDArray[np.int64], num_experts: int, experts_per_token: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(tokens, activated experts) to look up for each token count, shapes (T,).

        Tensor parallelism without expert parallelism cuts every expert into ``split`` slices: a rank then
        reads ``activated`` slices of 1/split each and does 1/split of the arithmetic. That is the weight
        traffic and the arithmetic of ``tokens / split`` tokens on ``activated / split`` whole experts, which
        is what is looked up. A ``tp<N>/moe.csv`` measured with sliced experts makes the approximation
        unnecessary.
        """
        activated = expected_distinct_experts(tokens, num_experts, experts_per_token)
        return tokens / self.split, activated / self.split

    def layer_us(
        self, tokens: NDArray[np.int64], num_experts: int, experts_per_token: int
    ) -> NDArray[np.float64]:
        """µs of one layer for each token count, shape (T,)."""
        return self.surface.at(*self.coordinates(tokens, num_experts, experts_per_token))
