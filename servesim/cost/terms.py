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
    from servesim.cost.batch_shape import BatchShape
    from servesim.specs.layers import Layer
    from servesim.specs.model import ModelSpec


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
