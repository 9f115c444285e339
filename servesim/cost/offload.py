"""Terms of an instance that keeps weights or KV elsewhere, or lets memory compute its decode attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cost.batch_shape import Shape
from servesim.cost.memory_reads import HalfTimes, PimAttention, StageReads, halves, interleaved_ns
from servesim.cost.terms import LayerCost, Role
from servesim.memory.placement import NPU, PIM, kv_bytes_per_layer
from servesim.memory.traffic import reaches_of, tokens_within
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.stage_cost import StageCost
    from servesim.cost.step_terms import StageTerms
    from servesim.cost.terms import Term
    from servesim.memory.ledger import Memory
    from servesim.memory.memory_map import Resident
    from servesim.specs.architecture import Architecture
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec


@dataclass(slots=True, frozen=True)
class Offload:
    """What one instance keeps elsewhere and lets memory compute."""

    resident: Resident
    ports: Mapping[str, Memory]
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
        ports: Mapping[str, Memory],
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

    def terms(
        self,
        stage: int,
        cost: StageCost,
        layers: StageTerms,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
    ) -> tuple[Term, ...]:
        """The terms of pipeline stage ``stage`` in place of ``cost.terms``.

        ``layers``: what the stage computes, with the experts that ``cost`` leaves out where they are shared.
        """
        placed = self.resident.stages[stage]
        kv_layer_bytes = kv_bytes_per_layer(model, options, instance.tp_size)
        reads = StageReads(
            placed, layers, self.ports, model, instance.tp_size, kv_layer_bytes, local=self.local
        )
        attention: Term = cost.attention
        if self.pim is not None:
            own = reaches_of(model)
            windows = [own[layer.block] for layer in placed if layer.kv_place and layer.block in own]
            attention = PimTerm(
                cost, self.pim, self.interleaved, self.architecture.sequence.pre_attn, tuple(windows)
            )
        places = {layer.kv_place for layer in placed}
        kv_places = sorted(place for place in places if place and place not in (NPU, PIM))
        reaches = tuple(sorted(set(reaches_of(model).values())))
        wait = ReadTerm(reads, attention, kv_places, pim=self.pim is not None, reaches=reaches)
        return (*(attention if term is cost.attention else term for term in cost.terms), wait)


class PimTerm:
    """Attention of decodes in memory, that of prefill chunks on the NPU at the same time."""

    def __init__(
        self,
        cost: StageCost,
        pim: PimAttention,
        interleaved: bool,
        before: Sequence[str],
        windows: Sequence[int] = (),
    ) -> None:
        """
        Args:
            cost: the stage with everything on the NPUs.
            pim: what a decode takes in memory.
            interleaved: whether halves of a batch take turns on the NPU and in memory.
            before: the layers of a block before attention.
            windows: tokens that each block sees that does not see all.
        """
        self.role = Role.BLOCKS
        self._cost = cost
        self._pim = pim
        self._interleaved = interleaved
        self._before = before
        self._windows = {reach: windows.count(reach) for reach in sorted(set(windows))}
        self._parts_of_tokens: dict[int, tuple[float, float]] = {}

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """See :class:`servesim.cost.terms.Term`: what attention adds to the dense layers; below 0 if halves
        gain that much."""
        if not batch.chunks and not batch.num_decodes:
            return 0.0
        assert batch.kv_lengths is not None
        if self._takes_turns(batch):
            parts = [
                self._half(part.chunks, part.kv_lengths)
                for part in halves(batch.chunks, batch.kv_lengths, self._pim)
            ]
            return interleaved_ns(parts, self._cost.blocks) - self._cost.dense.of(tokens)
        return max(self._prefill_ns(batch.chunks), self._cost.blocks * self._in_memory_ns(batch.kv_lengths))

    def _in_memory_ns(self, kv_lengths: Collection[int]) -> float:
        """Decodes of the mean block; one with a window passes over what it sees."""
        whole = mean = self._pim.block_ns(kv_lengths)
        for reach, count in self._windows.items():
            own = self._pim.block_ns(min(length, reach - 1) for length in kv_lengths)
            mean -= count / self._cost.blocks * (whole - own)
        return mean

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        if not batch.chunks and not batch.num_decodes:
            return []
        blocks = self._cost.blocks
        us = self.ns(batch, tokens) / (1000.0 * blocks)
        lengths = batch.kv_lengths or ()
        if self._takes_turns(batch):
            origin = "two halves take turns on the NPU and in memory; what that adds to the dense layers"
            return [LayerCost("attention: halves", blocks, us, origin)]
        in_memory_us = self._in_memory_ns(lengths) / 1000.0
        on_npu_us = self._prefill_ns(batch.chunks) / (1000.0 * blocks)
        origin = (
            f"the longer of decodes in memory ({in_memory_us:.3f} us a block on {self._pim.channels} "
            f"channels) and prefill on the NPU ({on_npu_us:.3f} us)"
        )
        return [LayerCost("attention in memory", blocks, us, origin)]

    def _takes_turns(self, batch: BatchShape) -> bool:
        lengths = batch.kv_lengths or ()
        return self._interleaved and bool(lengths) and len(batch.chunks) + len(lengths) > 1

    def _half(self, chunks: Sequence[tuple[int, int]], kv_lengths: Sequence[int]) -> HalfTimes:
        before, after = self._dense_parts(len(kv_lengths) + sum(tokens for tokens, _ in chunks))
        prefill = self._prefill_ns(chunks) / self._cost.blocks
        return HalfTimes(before, prefill, self._in_memory_ns(kv_lengths), after)

    def _prefill_ns(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self._cost.attention.ns(Shape(chunks), 0) if chunks else 0.0

    def _dense_parts(self, tokens: int) -> tuple[float, float]:
        """ns of one block before and after attention for so many tokens, of the mean block."""
        if tokens not in self._parts_of_tokens:
            import numpy as np

            padded = self._cost.padding.of(tokens)
            us = {layer.name: float(layer.us(np.array([padded]))[0]) for layer in self._cost.layers.blocks}
            before = 1000.0 * sum(us.get(name, 0.0) for name in self._before)
            block = self._cost.dense.of(padded) / self._cost.blocks
            self._parts_of_tokens[tokens] = before, max(block - before, 0.0)
        return self._parts_of_tokens[tokens]


class ReadTerm:
    """What a step waits longer than it computes, for weights and KV that other memories deliver."""

    def __init__(
        self,
        reads: StageReads,
        attention: Term,
        kv_places: Sequence[str],
        *,
        pim: bool,
        reaches: Sequence[int] = (),
    ) -> None:
        """
        Args:
            reads: of the stage.
            attention: its attention, during which reads go on.
            kv_places: memories whose KV the NPUs read.
            pim: whether decodes are computed in memory, which then delivers the history of chunks only.
            reaches: tokens that some blocks see, of those that do not see all.
        """
        self.role = Role.BLOCKS
        self._reads = reads
        self._attention = attention
        self._kv_places = kv_places
        self._pim = pim
        self._reaches = reaches

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """See :class:`servesim.cost.terms.Term`."""
        sequences = batch.num_decodes + len(batch.chunks)
        if not sequences:
            return self._reads.wait_ns(tokens, 0, 0.0, {})
        history = sum(history for _, history in batch.chunks)
        kv_tokens = {PIM: history} if self._pim else dict.fromkeys(self._kv_places, history + batch.kv_sum)
        within = None
        if self._reaches:
            histories = [history for _, history in batch.chunks]
            decodes, kv_sum = (0, 0) if self._pim else (batch.num_decodes, batch.kv_sum)
            within = {reach: tokens_within(reach, histories, decodes, kv_sum) for reach in self._reaches}
        return self._reads.wait_ns(tokens, sequences, self._attention.ns(batch, tokens), kv_tokens, within)

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        us = self.ns(batch, tokens) / 1000.0
        origin = f"reads from {self._reads.describe()} end later than the layers that need them could"
        return [LayerCost("waiting for memory", 1, us, origin)] if us else []
