"""A step's time is a sum of terms, each evaluated on the shape of a batch.

A term is one part of a step: the dense layers, attention of one kind, the wait for memory reads, the host. It
tells its time (:meth:`Term.ns`) and takes it apart for people (:meth:`Term.explain`); both from the same
look-ups. A new cost is a class with these two methods, put into the list of a stage
(:class:`servesim.cost.stage_cost.StageCost`).

Where members of a data-parallel group share experts, they meet in every expert layer. The role of a term says
where its time falls between two meetings: what lies in the same place is that of the slowest member.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from servesim.slotted import dataclass
from servesim.specs.weights import stage_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.specs.hardware import EngineSpec
    from servesim.specs.layers import Layer
    from servesim.specs.model import ModelSpec


class BatchShape(Protocol):
    """The integers of a batch that decide how long it takes; see :class:`servesim.engine.batch.Batch`."""

    @property
    def step(self) -> int: ...
    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def kv_sum(self) -> int: ...
    @property
    def kv_min(self) -> int: ...
    @property
    def kv_max(self) -> int: ...
    @property
    def kv_lengths(self) -> Sequence[int] | None: ...


@dataclass(slots=True)  # not frozen: a run makes one for every step with a chunk
class Shape:
    """A batch shape by itself.

    Decodes are ``num_decodes`` requests of one token. Their KV lengths, in tokens, are those before the step.
    """

    chunks: Sequence[tuple[int, int]] = ()
    """(tokens > 1, tokens in the cache before) of every prefill chunk."""
    num_decodes: int = 0
    kv_sum: int = 0
    kv_min: int = 0
    kv_max: int = 0
    kv_lengths: Sequence[int] | None = None
    step: int = 0
    draft_tokens: int = 0
    """Drafts that the decodes verify beside their one token, all together."""


IDLE = Shape()
"""A member without work: it runs its dense layers on a dummy token; attention and output head do not run."""


class Role(IntEnum):
    """Where in a stage a term's time falls."""

    BLOCKS = 0
    """In the transformer blocks, between one expert layer and the next."""
    ONCE = 1
    """Before the blocks and after them, by tokens."""
    HEAD = 2
    """The output head, by sequences."""
    HOST = 3
    """Host time; paid in the first stage."""


class Term(Protocol):
    """One additive part of a stage's time."""

    @property
    def role(self) -> Role: ...

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """ns for this batch; ``tokens``: what the dense layers compute, padding included."""

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """The same as lines for people, in running order; their totals add up to :meth:`ns`."""


@dataclass(slots=True, frozen=True)
class LayerCost:
    """One line of the breakdown of a step."""

    layer: str
    calls: int
    """How often the step runs it."""
    us: float
    """µs of one call."""
    origin: str
    """Measured, interpolated, extrapolated or computed: from which rows or formula."""

    @property
    def total_us(self) -> float:
        """µs of all calls of the step."""
        return self.us * self.calls


def scheduled_tokens(batch: BatchShape) -> int:
    """Tokens that a batch computes, without padding."""
    tokens = batch.num_decodes + batch.draft_tokens
    for chunk, _ in batch.chunks:
        tokens += chunk
    return tokens


class HostTerm:
    """Host time of a step: constants of one machine.

    What never hides behind the accelerator is part of every step (:meth:`ns`). The rest, a time for the step
    and one for each sequence, is added to it with synchronous scheduling. With asynchronous scheduling it
    goes on beside the step before, and so is a floor of what the accelerator takes (:meth:`floor_ns`); so
    are the launches of layers that no CUDA graph replays, either way.
    """

    __slots__ = ("_decode_us", "_launch_ns", "_overlaps", "_prefill_us", "_sequence_us", "_step_us", "role")

    def __init__(self, engine: EngineSpec, launches: int = 0, *, overlaps: bool = True) -> None:
        """
        Args:
            engine: the constants.
            launches: layers that a step launches one by one; 0 with CUDA graphs.
            overlaps: whether the host prepares a step while the one before runs.
        """
        self.role = Role.HOST
        self._prefill_us, self._decode_us = engine.prefill_step_overhead_us, engine.decode_step_overhead_us
        self._step_us, self._sequence_us = engine.host_step_us, engine.host_sequence_us
        self._launch_ns = launches * (engine.eager_launch_us or 0.0) * 1000.0
        self._overlaps = overlaps

    @property
    def has_floor(self) -> bool:
        """Whether a step may wait for the host."""
        return bool(self._launch_ns or (self._overlaps and (self._step_us or self._sequence_us)))

    def ns(self, batch: BatchShape, tokens: int) -> float:  # noqa: ARG002 - see Term
        """See :class:`Term`."""
        sequences = batch.num_decodes + len(batch.chunks)
        if not sequences:
            return 0.0
        us = self._prefill_us if batch.chunks else self._decode_us
        if not self._overlaps:
            us += self._step_us + self._sequence_us * sequences
        return us * 1000.0

    def floor_ns(self, batch: BatchShape) -> float:
        """Least time of the accelerator's part of the step in ns, for it waits for the host."""
        sequences = batch.num_decodes + len(batch.chunks)
        if not sequences:
            return self._launch_ns
        if not self._overlaps:
            return self._launch_ns
        return (self._step_us + self._sequence_us * sequences) * 1000.0 + self._launch_ns

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`Term`."""
        us = self.ns(batch, tokens) / 1000.0
        if not us:
            return []
        names = ["prefill_step_overhead_us" if batch.chunks else "decode_step_overhead_us"]
        if not self._overlaps and (self._step_us or self._sequence_us):
            names += ["host_step_us", "host_sequence_us"]
        return [LayerCost("host overhead", 1, us, ", ".join(f"engine.{name}" for name in names))]

    def explain_wait(self, batch: BatchShape, gpu_us: float) -> list[LayerCost]:
        """The wait for the host of a step whose accelerator part takes ``gpu_us``; no line where none."""
        wait_us = self.floor_ns(batch) / 1000.0 - gpu_us
        if wait_us <= 0.0:
            return []
        why = "engine.eager_launch_us" if self._launch_ns else "engine.host_step_us, engine.host_sequence_us"
        return [LayerCost("waiting for the host", 1, wait_us, why)]


@dataclass(slots=True, frozen=True)
class Stage:
    """Consecutive transformer blocks, with the embedding before the first and the head after the last."""

    model: ModelSpec
    first_block: int
    num_blocks: int

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here: the stage runs the layers before the blocks."""
        return self.first_block == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens come out here: the stage runs the layers after the blocks."""
        return self.first_block + self.num_blocks == self.model.num_hidden_layers

    @property
    def expert_blocks(self) -> list[int]:
        """The blocks of this stage that have experts."""
        return [block for block in self.blocks if self.model.has_experts(block)]

    @property
    def blocks(self) -> range:
        """The blocks of this stage, counted from the model's first."""
        return range(self.first_block, self.first_block + self.num_blocks)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its part of the model's list of layers."""
        return self.model.layers.layers[self.first_block : self.first_block + self.num_blocks]


def whole_model(model: ModelSpec) -> Stage:
    """The one stage of an instance without pipeline parallelism."""
    return Stage(model, 0, model.num_hidden_layers)


def pipeline_stages(model: ModelSpec, pp: int) -> list[Stage]:
    """The model over ``pp`` stages, as even as possible."""
    stages, first = [], 0
    for blocks in stage_layers(model.num_hidden_layers, pp):
        stages.append(Stage(model, first, blocks))
        first += blocks
    return stages
