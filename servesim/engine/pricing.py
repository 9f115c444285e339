"""The cost object of a run, kept for questions about single steps after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.step_cost import StepCost
    from servesim.cost.terms import LayerCost


@dataclass(slots=True, frozen=True)
class StepPricing:
    """Prices steps as a loop did: through all pipeline stages, every member with the same batch."""

    cost: StepCost
    num_members: int

    def us(self, batch: BatchShape) -> float:
        """µs from the start of the step to its tokens."""
        stages = self.cost.stages_ns([batch] * self.num_members)
        return sum(compute + hand_over for compute, hand_over in stages) / 1000

    def stages(self, batch: BatchShape) -> list[list[LayerCost]]:
        """What every layer of each pipeline stage contributes; of the slowest member where there are more."""
        return self.cost.explain([batch] * self.num_members)

    def layers(self, batch: BatchShape) -> list[LayerCost]:
        """The lines of all stages."""
        return [line for stage in self.stages(batch) for line in stage]
