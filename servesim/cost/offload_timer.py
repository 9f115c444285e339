"""What transformer blocks take when weights or KV are elsewhere, or attention is computed in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.memory_reads import StageReads
from servesim.cost.pim import HalfTimes, PimAttention, halves, interleaved_ns
from servesim.memory.placement import NPU, PIM, kv_bytes_per_layer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servesim.cost.step_timer import StepTimer
    from servesim.cost.wave_timer import BatchShape
    from servesim.memory.memory_map import MemoryPort, Resident
    from servesim.specs.architecture import Architecture
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions


@dataclass(slots=True, frozen=True)
class Offload:
    """What one instance keeps elsewhere and lets memory compute."""

    resident: Resident
    ports: Mapping[str, MemoryPort]
    architecture: Architecture
    pim: PimAttention | None
    interleaved: bool
    """Whether halves of a batch take turns on the NPU and in memory."""
    local: bool
    """Whether weights on the NPU are streamed again."""

    @classmethod
    def of(
        cls,
        resident: Resident,
        ports: Mapping[str, MemoryPort],
        channels: int,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
        architecture: Architecture,
    ) -> Offload:
        """Of an instance that has so many PIM ``channels``."""
        pim = None
        if resident.pim is not None:
            ranks, cost = instance.tp_size, resident.pim.attention
            pim = PimAttention.of(cost, model, options.kv_dtype, channels // instance.pp_size, ranks)
        interleaved = options.enable_sub_batch_interleaving
        return cls(resident, ports, architecture, pim, interleaved, options.enable_local_offloading)

    def timer(
        self,
        stage: int,
        steps: StepTimer,
        whole: StepTimer,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
    ) -> OffloadTimer:
        """The timer of one pipeline stage.

        Args:
            stage: its index.
            steps: the stage as it runs with everything on the NPUs.
            whole: the same with the time of its experts, which ``steps`` leaves out where they are shared.
            instance, model, options: whose it is.
        """
        layers = self.resident.stages[stage]
        kv_layer_bytes = kv_bytes_per_layer(model, options, instance.tp_size)
        reads = StageReads(
            layers, whole.terms, self.ports, model, instance.tp_size, kv_layer_bytes, local=self.local
        )
        return OffloadTimer(steps, self, reads, {layer.kv_place for layer in layers})


class OffloadTimer:
    """The blocks of one stage of one instance."""

    def __init__(
        self, steps: StepTimer, offload: Offload, reads: StageReads, kv_places: set[str | None]
    ) -> None:
        self._steps = steps
        self._reads = reads
        self._pim = offload.pim
        self._interleaved = offload.interleaved
        self._before = offload.architecture.sequence.pre_attn
        self._kv_places = sorted(place for place in kv_places if place and place not in (NPU, PIM))
        self._parts_of_tokens: dict[int, tuple[float, float]] = {}

    def blocks_ns(self, batch: BatchShape | None, tokens: int) -> float:
        """All blocks of the stage, attention included, and waiting for reads of any of its layers.

        Args:
            batch: None for a member of a group without work, which runs its dense layers alone.
            tokens: that dense layers compute, padding included.
        """
        dense = self._steps.in_blocks.ns(tokens)
        if batch is None:
            return dense + self._reads.wait_ns(tokens, 0, 0.0, {})
        sequences = batch.num_decodes + len(batch.chunks)
        history = sum(history for _, history in batch.chunks)
        if self._pim is None:
            lengths = batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max
            attention = self._steps.attention_ns(batch.chunks, *lengths)
            kv_tokens = dict.fromkeys(self._kv_places, history + batch.kv_sum)
        else:
            assert batch.kv_lengths is not None
            attention = self._pim_attention_ns(self._pim, batch.chunks, batch.kv_lengths, dense)
            kv_tokens = {PIM: history}
        return dense + attention + self._reads.wait_ns(tokens, sequences, attention, kv_tokens)

    def _pim_attention_ns(
        self, pim: PimAttention, chunks: Sequence[tuple[int, int]], kv_lengths: Sequence[int], dense: float
    ) -> float:
        """What attention adds to the ``dense`` layers of the batch; below 0 if halves gain that much."""
        if self._interleaved and kv_lengths and len(chunks) + len(kv_lengths) > 1:
            parts = [
                self._half(pim, part.chunks, part.kv_lengths) for part in halves(chunks, kv_lengths, pim)
            ]
            return interleaved_ns(parts, self._steps.blocks) - dense
        return max(self._prefill_ns(chunks), self._steps.blocks * pim.block_ns(kv_lengths))

    def _half(
        self, pim: PimAttention, chunks: Sequence[tuple[int, int]], kv_lengths: Sequence[int]
    ) -> HalfTimes:
        tokens = len(kv_lengths) + sum(tokens for tokens, _ in chunks)
        before, after = self._dense_parts(tokens)
        prefill = self._prefill_ns(chunks) / self._steps.blocks
        return HalfTimes(before, prefill, pim.block_ns(kv_lengths), after)

    def _prefill_ns(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self._steps.attention_ns(chunks, 0, 0, 0, 0) if chunks else 0.0

    def _dense_parts(self, tokens: int) -> tuple[float, float]:
        """ns of one block before and after attention for so many tokens, of the mean block."""
        if tokens not in self._parts_of_tokens:
            padded = self._steps.padded(np.array([tokens]))
            us = {term.name: float(term.us(padded)[0]) for term in self._steps.terms.blocks}
            before = 1000.0 * sum(us.get(name, 0.0) for name in self._before)
            block = self._steps.in_blocks.ns(int(padded[0])) / self._steps.blocks
            self._parts_of_tokens[tokens] = before, max(block - before, 0.0)
        return self._parts_of_tokens[tokens]
