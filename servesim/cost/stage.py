"""Which transformer blocks a pipeline stage runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.specs.weights import stage_layers

if TYPE_CHECKING:
    from servesim.specs.model import ModelSpec


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
        blocks = range(self.first_block, self.first_block + self.num_blocks)
        return [block for block in blocks if self.model.has_experts(block)]


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
