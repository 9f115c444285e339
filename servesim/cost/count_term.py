"""The sum of those layers of a step whose time depends on a count alone, kept count by count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from servesim.cost.terms import LayerCost, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.batch_shape import BatchShape

_FIRST_TOKENS: Final = 2048
_FIRST_SEQUENCES: Final = 256
"""Counts whose sums are computed at first; more are when asked for."""


class CountLayer(Protocol):
    """One layer or collective of a step."""

    @property
    def name(self) -> str: ...

    @property
    def calls(self) -> int:
        """How often a step runs it."""

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """µs of one call for each token (or sequence) count, shape (counts,)."""

    def origin(self, count: int) -> str:
        """Where the number for ``count`` comes from, for people."""


def _total_ns(terms: Sequence[CountLayer], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """ns that a step pays for all terms together, for each count."""
    total = np.zeros(len(counts))
    for term in terms:
        total += term.us(counts) * (1000.0 * term.calls)
    return total


class CountTerm:
    """One term of a step: a set of layers by the step's tokens, or by its sequences.

    The sum is computed for a whole range of counts at once and kept: a look-up costs an index.
    """

    __slots__ = ("_by_sequences", "_first", "_ns", "layers", "role")

    def __init__(self, role: Role, layers: Sequence[CountLayer], *, by_sequences: bool = False) -> None:
        self.role = role
        self.layers = layers
        self._by_sequences = by_sequences
        self._first = _FIRST_SEQUENCES if by_sequences else _FIRST_TOKENS
        self._ns: list[float] = []

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """See :class:`servesim.cost.terms.Term`."""
        if self._by_sequences:  # drafts need logits of their own
            tokens = batch.num_decodes + batch.draft_tokens + len(batch.chunks)
        return self.of(tokens)

    def of(self, count: int) -> float:
        """ns that a step of ``count`` tokens (or sequences) pays; 0 for none."""
        if count >= len(self._ns):
            counts = np.arange(1, max(self._first, 2 * count if count > self._first else 0) + 1)
            self._ns = [0.0, *_total_ns(self.layers, counts).tolist()]
        return self._ns[count]

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        count = tokens
        if self._by_sequences:
            count = batch.num_decodes + batch.draft_tokens + len(batch.chunks)
        if not count:
            return []
        one = np.array([count])
        return [
            LayerCost(layer.name, layer.calls, float(layer.us(one)[0]), layer.origin(count))
            for layer in self.layers
        ]
