"""Decode attention computed in memory: what it takes, and how a step goes that overlaps it with the NPUs."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, NamedTuple

from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from servesim.specs.model import ModelSpec
    from servesim.specs.pim import AttentionCost

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
        width = model.num_key_value_heads * model.head_dim
        kv_scale = width * dtype_bytes(kv_dtype) / _REFERENCE_KV_BYTES
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
