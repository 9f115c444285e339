"""Time of a mixture-of-experts layer when every expert is equally popular.

Bundles measure one rank's layer over (tokens it works on, experts those tokens touch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.memory.traffic import expected_distinct_experts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servesim.cost.tables import Surface


@dataclass(slots=True, frozen=True)
class MoeTable:
    """moe.csv of one bundle as a dense surface over (tokens, activated experts), and how to ask it."""

    surface: Surface
    source: str
    """Where the rows come from, for people: ``tp1/moe.csv``."""
    split: int
    """Ranks that share every expert although rows are of whole ones; 1 if measured as it runs."""

    def coordinates(
        self, tokens: NDArray[np.int64], num_experts: int, experts_per_token: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(tokens, activated experts) to look up for each token count, shapes (T,).

        Tensor parallelism without expert parallelism cuts every expert into ``split`` slices: a rank then
        reads ``activated`` slices of 1/split each and does 1/split of the arithmetic. That is the weight
        traffic and the arithmetic of ``tokens / split`` tokens on ``activated / split`` whole experts, which
        is what is looked up. A ``tp<N>/moe.csv`` measured with sliced experts makes the approximation
        unnecessary.
        """
        activated = expected_distinct_experts(tokens, num_experts, experts_per_token)
        return tokens / self.split, activated / self.split

    def layer_us(
        self, tokens: NDArray[np.int64], num_experts: int, experts_per_token: int
    ) -> NDArray[np.float64]:
        """µs of one layer for each token count, shape (T,)."""
        return self.surface.at(*self.coordinates(tokens, num_experts, experts_per_token))
