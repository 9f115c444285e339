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

from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from servesim.memory.placement import NPU
from servesim.memory.traffic import expected_distinct_experts, reaches_of
from servesim.slotted import dataclass
from servesim.specs.kv_formats import head_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.cost.step_terms import StageTerms
    from servesim.memory.ledger import Memory
    from servesim.memory.placement import PlacedLayer
    from servesim.specs.model import ModelSpec
    from servesim.specs.pim import AttentionCost

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
        self,
        tokens: int,
        sequences: int,
        attention_ns: float,
        kv_tokens: Mapping[str, int],
        within: Mapping[int, int] | None = None,
    ) -> float:
        """Time that a step takes longer than it computes.

        Args:
            tokens: that the dense layers compute, padding included.
            sequences: that get an output.
            attention_ns: of all blocks of the stage.
            kv_tokens: tokens of KV that the attention of a block reads that sees all, by place.
            within: the same, wherever it is, of blocks that see so many tokens.
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
                own = kv_tokens.get(queue.place, 0)
                late = queue.arrival_ns(arrival, own, within or {}) - computed[queue.layers]
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
        seen, reaches = np.array(kv, dtype=float)[self.layers], reaches_of(model)
        window = np.array([reaches.get(-1 if layer.block is None else layer.block, 0) for layer, _ in mine])
        self._kv_reads = {
            int(reach): np.cumsum(np.where(window == reach, seen, 0.0)) for reach in sorted({0, *window})
        }
        """Tokens that a layer sees (0: all) -> such layers up to and including each."""
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

    def arrival_ns(
        self, weights_ns: NDArray[np.float64], kv_tokens: int, within: Mapping[int, int]
    ) -> NDArray[np.float64]:
        """The same with the KV of ``kv_tokens`` tokens read in every block, or of those ``within`` what the
        block sees."""
        if not kv_tokens:
            return weights_ns
        for reach, reads in self._kv_reads.items():
            tokens = within[reach] if reach else kv_tokens
            read_ns = self._memory.latency_ns + tokens * self._kv_bytes / self._memory.bandwidth_gbs
            weights_ns = weights_ns + reads * read_ns
        return weights_ns


_REFERENCE_HEADS = 32 * 128
"""Query heads times head size of the shape that slope and intercept are of, Llama-3.1-8B's."""
_REFERENCE_KV_BYTES = 8 * 128 * 2
"""Bytes of its keys of one token in one block."""


@dataclass(slots=True, frozen=True)
class PimAttention:
    """Attention of one block on the channels that an instance has; ns.

    A decode with L tokens of KV takes ``(slope · gqa · L + intercept · kv_scale) / split`` on one channel:

    - ``gqa`` = query heads × head size, over the reference's 32 × 128. A channel passes over the KV of a
      group once for every query head in it, so the time per token goes with query heads, not KV heads.
    - ``kv_scale`` = KV heads × head size × bytes of the KV dtype, over the reference's 8 × 128 × 2.
    - ``split`` = tensor-parallel ranks: each has its own heads, on its own channels.
    """

    slope_ns: float
    """Per token of KV, gqa and split included."""
    intercept_ns: float
    """Per decode, kv_scale and split included."""
    channels: int
    """Of one rank."""

    @classmethod
    def of(
        cls, cost: AttentionCost, model: ModelSpec, kv_dtype: str, channels: int, ranks: int
    ) -> PimAttention:
        """Of an instance's model on a device; ``channels`` are those of all its ``ranks``."""
        gqa = model.num_attention_heads * model.head_dim / _REFERENCE_HEADS
        key_bytes = head_bytes(kv_dtype, model.head_dim, model.head_dim) / 2
        kv_scale = model.num_key_value_heads * key_bytes / _REFERENCE_KV_BYTES
        return cls(cost.slope * gqa / ranks, cost.intercept * kv_scale / ranks, channels // ranks)

    def request_ns(self, kv_length: int) -> float:
        """One decode on one channel."""
        return self.slope_ns * kv_length + self.intercept_ns

    def block_ns(self, kv_lengths: Iterable[int]) -> float:
        """All decodes of a step: until the slowest channel is through; 0 without decodes.

        Longest first, each to the channel that is free first.
        """
        longest_first = sorted(kv_lengths, reverse=True)
        if not longest_first:
            return 0.0
        if len(longest_first) <= self.channels:
            return self.request_ns(longest_first[0])
        busy = [0.0] * self.channels
        heapify(busy)
        for length in longest_first:
            heapreplace(busy, busy[0] + self.request_ns(length))
        return max(busy)


class Half(NamedTuple):
    """Part of a batch."""

    chunks: list[tuple[int, int]]
    kv_lengths: list[int]
    """Of its decodes."""


def halves(
    chunks: Sequence[tuple[int, int]], kv_lengths: Iterable[int], pim: PimAttention
) -> tuple[Half, Half]:
    """A batch in two parts of equal work.

    Decodes go by their time in memory, longest first to the part that has less; then chunks by their tokens,
    to the part that has fewer. The first part wins a draw.
    """
    parts, work, tokens = (Half([], []), Half([], [])), [0.0, 0.0], [0, 0]
    for length in sorted(kv_lengths, reverse=True):
        least = 1 if work[1] < work[0] else 0
        parts[least].kv_lengths.append(length)
        work[least] += pim.request_ns(length)
        tokens[least] += 1
    for chunk in sorted(chunks, reverse=True):
        least = 1 if tokens[1] < tokens[0] else 0
        parts[least].chunks.append(chunk)
        tokens[least] += chunk[0]
    return parts


class HalfTimes(NamedTuple):
    """What one part of a batch takes in one block, ns."""

    before: float
    """On the NPU, before attention."""
    prefill: float
    """Attention of its chunks, on the NPU."""
    pim: float
    """Attention of its decodes, in memory; starts together with that of the chunks."""
    after: float
    """On the NPU, after both."""


def interleaved_ns(parts: Sequence[HalfTimes], blocks: int) -> float:
    """``blocks`` blocks of a batch whose parts take turns on the NPU and in memory.

    The NPU works on the parts in order; while one is in memory it goes on with the next. A part goes on to
    its next layers when its attention is done and the NPU is free.
    """
    npu = memory = 0.0
    ready = [0.0] * len(parts)
    for block in range(blocks):
        for index, part in enumerate(parts):
            npu = max(npu, ready[index]) + (part.after if block else 0.0) + part.before
            if part.pim:
                memory = max(memory, npu) + part.pim
            npu += part.prefill
            ready[index] = max(npu, memory) if part.pim else npu
    for index, part in enumerate(parts):
        npu = max(npu, ready[index]) + part.after
    return npu
