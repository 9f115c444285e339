"""How long a step waits for weights and KV cache that it reads from memories outside of its NPUs.

Every memory delivers what a step reads from it in the order in which layers run, one read after the other,
from the step's start on; different memories work at the same time. A read takes ``latency + bytes /
bandwidth``. A layer works while its weights stream in, and ends when it has computed and they have arrived:
it takes as long as the slower of its computation and what is left of its reads. So with c_k the time that
layers 1 to k compute and R_k the time at which a memory has delivered layer k's bytes, the step takes longer
than it computes by

    max(0, max over k and memories of R_k - c_k)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.memory.placement import NPU
from servesim.memory.traffic import expected_distinct_experts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.cost.step_terms import StageTerms
    from servesim.memory.ledger import Memory
    from servesim.memory.placement import PlacedLayer
    from servesim.specs.model import ModelSpec

_ALL_REDUCE = "all_reduce"
_MOST_KEPT = 4096
"""Token counts of which arrivals and computation are kept."""


class StageReads:
    """The reads of one pipeline stage of one instance.

    ``layers``: in running order. ``terms``: what they compute. ``ports``: the memory at every place, as this
    instance reads it. ``kv_layer_bytes``: KV of one token in one block on one rank. ``local``: weights on the
    NPU are read again, too.
    """

    def __init__(
        self,
        layers: Sequence[PlacedLayer],
        terms: StageTerms,
        ports: Mapping[str, Memory],
        model: ModelSpec,
        ranks: int,
        kv_layer_bytes: int,
        *,
        local: bool,
    ) -> None:
        self._layers = layers
        self._model = model
        self._terms = {term.name: term for term in (*terms.blocks, *terms.once)}
        self._heads = {term.name: term for term in terms.sequences}
        self._attention = np.cumsum([layer.kv_place is not None for layer in layers])
        """Attention layers up to and including each layer."""
        self._queues = [
            _Queue(layers, place, memory, model, 1 if place == NPU else ranks, kv_layer_bytes)
            for place, memory in ports.items()
            if place != NPU or local
        ]
        self._kept: dict[int, tuple[NDArray[np.float64], list[NDArray[np.float64]]]] = {}

    def describe(self) -> str:
        """The memories that are read, for people."""
        return ", ".join(queue.place for queue in self._queues if not queue.is_empty) or "nothing"

    def wait_ns(
        self, tokens: int, sequences: int, attention_ns: float, kv_tokens: Mapping[str, int]
    ) -> float:
        """Time that a step takes longer than it computes.

        Args:
            tokens: that the dense layers compute, padding included.
            sequences: that get an output.
            attention_ns: of all blocks of the stage.
            kv_tokens: tokens of KV that the attention of a block reads, by place.
        """
        if tokens not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[tokens] = (
                self._computed_ns(tokens),
                [queue.weights_ns(tokens) for queue in self._queues],
            )
        computed, arrivals = self._kept[tokens]
        if blocks := int(self._attention[-1]):
            computed = computed + self._attention * (attention_ns / blocks)
        if self._heads and sequences:
            computed = computed + self._head_ns(sequences)
        wait = 0.0
        for queue, arrival in zip(self._queues, arrivals, strict=True):
            if not queue.is_empty:
                late = queue.arrival_ns(arrival, kv_tokens.get(queue.place, 0)) - computed[queue.layers]
                wait = max(wait, float(late.max()))
        return wait

    def _computed_ns(self, tokens: int) -> NDArray[np.float64]:
        """Time until each layer is done, without attention and output heads.

        An all-reduce comes after the layer behind attention and after the last of a block.
        """
        counts = np.array([tokens])
        us = {name: float(term.us(counts)[0]) for name, term in self._terms.items()}
        own = [us.get(layer.name, 0.0) for layer in self._layers]
        if reduce_us := us.get(_ALL_REDUCE):
            following = [*(layer.block for layer in self._layers[1:]), None]
            for index, layer in enumerate(self._layers):
                if layer.kv_place is not None:
                    own[index + 1] += reduce_us
                if layer.block is not None and layer.block != following[index]:
                    own[index] += reduce_us
        return np.cumsum(own) * 1000.0

    def _head_ns(self, sequences: int) -> NDArray[np.float64]:
        """The same, of the output heads alone."""
        counts = np.array([sequences])
        us = {name: float(term.us(counts)[0]) for name, term in self._heads.items()}
        return np.cumsum([us.get(layer.name, 0.0) for layer in self._layers]) * 1000.0


class _Queue:
    """What a stage reads from one memory."""

    def __init__(
        self,
        layers: Sequence[PlacedLayer],
        place: str,
        memory: Memory,
        model: ModelSpec,
        ranks: int,
        kv_layer_bytes: int,
    ) -> None:
        self.place = place
        self._memory = memory
        self._model = model
        kv = [layer.kv_place == place and place != NPU for layer in layers]
        weights = [
            layer.place == place and bool(layer.read_bytes or layer.expert_bytes or layer.bytes_per_token)
            for layer in layers
        ]
        self.layers = np.flatnonzero([one or other for one, other in zip(kv, weights, strict=True)])
        """Indices of the layers that read from it."""
        mine = [(layers[k], weights[k]) for k in self.layers.tolist()]

        def column(name: str) -> NDArray[np.float64]:
            return np.array(
                [getattr(layer, name) * ranks if reads else 0 for layer, reads in mine], dtype=float
            )

        self._bytes, self._expert_bytes = column("read_bytes"), column("expert_bytes")
        self._bytes_per_token = column("bytes_per_token")
        self._reads = np.array([reads for _, reads in mine], dtype=float)
        self._kv_reads = np.cumsum(np.array(kv, dtype=float)[self.layers])
        self._kv_bytes = kv_layer_bytes * ranks

    @property
    def is_empty(self) -> bool:
        return not len(self.layers)

    def weights_ns(self, tokens: int) -> NDArray[np.float64]:
        """When the weights of each of its layers have been delivered, if there is no KV to read."""
        sizes = self._bytes + self._bytes_per_token * tokens
        if self._expert_bytes.any():
            experts, chosen = self._model.num_experts, self._model.num_experts_per_tok
            distinct = float(expected_distinct_experts(np.array([tokens]), experts, chosen)[0])
            sizes = sizes + self._expert_bytes * (distinct / experts)
        return np.cumsum(sizes / self._memory.bandwidth_gbs + self._reads * self._memory.latency_ns)

    def arrival_ns(self, weights_ns: NDArray[np.float64], kv_tokens: int) -> NDArray[np.float64]:
        """The same with the KV of ``kv_tokens`` tokens read in every block."""
        if not kv_tokens:
            return weights_ns
        read_ns = self._memory.latency_ns + kv_tokens * self._kv_bytes / self._memory.bandwidth_gbs
        return weights_ns + self._kv_reads * read_ns
