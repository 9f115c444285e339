"""The cost object of a run, kept for questions about single steps after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.cost.step_timer import StepTimer
from servesim.engine.step_loop import SingleTimes

if TYPE_CHECKING:
    from servesim.cost.explain import LayerCost
    from servesim.engine.batch import Batch
    from servesim.engine.step_loop import WaveTimes


@dataclass(slots=True, frozen=True)
class StepPricing:
    """Prices steps as a loop did: through all pipeline stages, every member with the same batch."""

    times: WaveTimes
    num_members: int

    def us(self, batch: Batch) -> float:
        """µs from the start of the step to its tokens."""
        stages = self.times.stages_ns([batch] * self.num_members)
        return sum(compute + hand_over for compute, hand_over in stages) / 1000

    def layers(self, batch: Batch) -> list[LayerCost]:
        """What every layer contributes; empty where steps pass stages or wait for other members."""
        if not isinstance(self.times, SingleTimes) or not isinstance(self.times.steps, StepTimer):
            return []
        lengths = batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max
        return self.times.steps.explain(batch.chunks, *lengths)
