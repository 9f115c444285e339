"""What speculative decoding adds to a step: the drafter's passes, and attention of several queries.

A drafter with layers runs behind every step of its target: once over all tokens of the step, which fills its
own KV cache and gives the first draft, and once more for every further draft with one token a sequence. Its
layers are priced as those of any model: a draft model by its own bundle; EAGLE, EAGLE-3 and MTP as one
transformer block of the target (the last, so one with experts if the target has them) and the output head.
Not priced: the small projection that merges hidden states before that block.

n-gram drafts are looked up on the host, behind the step: see :data:`NGRAM_US`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cost.batch_shape import Shape
from servesim.cost.terms import LayerCost, Role

if TYPE_CHECKING:
    from servesim.cost.attention_lookup import AttentionTensor
    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.stage_cost import StageCost
    from servesim.specs.speculative import SpeculativeSpec

NGRAM_US = 5.0
"""Host µs of an n-gram lookup of one sequence: an order of magnitude, for contexts of a few thousand tokens
that compiled code runs through once; nothing measured stands behind it."""


class DraftTerm:
    """The passes of a drafter with layers, behind a step."""

    def __init__(self, drafter: StageCost, spec: SpeculativeSpec) -> None:
        self.role = Role.ONCE
        self._drafter = drafter
        self._spec = spec
        self._terms = [term for term in drafter.terms if term is not drafter.host]

    def _passes(self, batch: BatchShape, tokens: int) -> tuple[tuple[int, Shape, int], ...]:
        """(how often, batch, tokens with padding) of the drafter's passes."""
        n = batch.num_decodes + len(batch.chunks)
        first = Shape(batch.chunks, batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max)
        lengths = [chunk + history for chunk, history in batch.chunks]
        low, high = [*lengths], [*lengths]
        if batch.num_decodes:
            low.append(batch.kv_min)
            high.append(batch.kv_max)
        later = Shape((), n, batch.kv_sum + sum(lengths), min(low), max(high))
        return (1, first, tokens), (self._spec.num_tokens - 1, later, self._drafter.padding.of(n))

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """See :class:`servesim.cost.terms.Term`."""
        if not batch.num_decodes and not batch.chunks:
            return 0.0
        return sum(
            times * term.ns(shape, padded)
            for times, shape, padded in self._passes(batch, tokens)
            if times
            for term in self._terms
        )

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        if not batch.num_decodes and not batch.chunks:
            return []
        whose = (
            self._spec.model if self._spec.method == "draft_model" else "a block of the target, and its head"
        )
        lines = []
        names = "over the step's tokens", "one token a sequence"
        for name, (times, shape, padded) in zip(names, self._passes(batch, tokens), strict=True):
            if times:
                us = sum(term.ns(shape, padded) for term in self._terms) / 1000.0
                lines.append(LayerCost(f"drafting: {name}", times, us, f"{self._spec.method}: {whose}"))
        return lines


class NgramTerm:
    """The lookups of n-gram drafts on the host."""

    def __init__(self) -> None:
        self.role = Role.HOST

    def ns(self, batch: BatchShape, tokens: int) -> float:  # noqa: ARG002 - see Term
        """See :class:`servesim.cost.terms.Term`."""
        return (batch.num_decodes + len(batch.chunks)) * NGRAM_US * 1000.0

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        us = self.ns(batch, tokens) / 1000.0
        origin = f"{NGRAM_US:g} us a sequence, an order of magnitude"
        return [LayerCost("drafting: n-gram lookups", 1, us, origin)] if us else []


def verification_us(tensor: AttentionTensor, queries: int, mean: int) -> float:
    """µs that one block takes at least to compute ``queries`` queries over ``mean`` tokens of KV each.

    Derived: at the rate at which the largest measured prompt chunk goes through its pairs of query and key.
    Verifying reads the KV once for all queries of a sequence, as a decode does for its one, and takes the
    longer of the two.
    """
    chunk, history, us = tensor.largest()
    return us / (chunk * (history + chunk / 2)) * queries * mean
