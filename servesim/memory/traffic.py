"""Bytes that the steps of an instance move to and from memories beside those of its NPUs.

The same layers and bytes as those whose time is charged (:mod:`servesim.cost.memory_reads`), added up for
the energy of the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.memory.placement import PlacedLayer
    from servesim.specs.model import ModelSpec


def expected_distinct_experts(
    tokens: NDArray[np.int64], num_experts: int, experts_per_token: int
) -> NDArray[np.float64]:
    """Experts touched by T ``tokens`` that each pick k of E uniformly: ``E (1 - (1 - k/E)^T)``.

    The power is taken by squaring: multiplications give the same bits on every machine, a library's pow
    may not.
    """
    untouched, square, exponents = np.ones(len(tokens)), 1.0 - experts_per_token / num_experts, tokens.copy()
    while exponents.any():
        untouched = np.where(exponents & 1, untouched * square, untouched)
        square, exponents = square * square, exponents >> 1
    return num_experts * (1.0 - untouched)


@dataclass(slots=True)
class Traffic:
    """What the steps of one instance, all its ranks together, move to and from one memory; bytes."""

    step_bytes: int = 0
    """Weights that every step reads."""
    token_bytes: int = 0
    """Rows of the embedding, read for every token."""
    expert_bytes: int = 0
    """All experts; a step reads those that its tokens choose."""
    kv_bytes: int = 0
    """KV of one token: read for every token that attention looks back at, written for every new one."""

    def add(
        self, *, step_bytes: int = 0, token_bytes: int = 0, expert_bytes: int = 0, kv_bytes: int = 0
    ) -> None:
        """Count what a layer moves, beside what is counted already."""
        self.step_bytes += step_bytes
        self.token_bytes += token_bytes
        self.expert_bytes += expert_bytes
        self.kv_bytes += kv_bytes

    def moved(
        self, tokens: NDArray[np.int64], kv_tokens: NDArray[np.int64], model: ModelSpec
    ) -> NDArray[np.int64]:
        """Bytes of each step, shape (steps,).

        Args:
            tokens: that each step computes.
            kv_tokens: in the cache before, that its attention reads from this memory.
            model: whose experts they choose, every one equally often.
        """
        sizes = self.step_bytes + self.token_bytes * tokens + self.kv_bytes * (tokens + kv_tokens)
        if self.expert_bytes:
            experts = model.num_experts
            distinct = expected_distinct_experts(tokens, experts, model.num_experts_per_tok)
            sizes = sizes + np.rint(self.expert_bytes * (distinct / experts)).astype(np.int64)
        return sizes


def traffic_by_place(
    stages: Sequence[Sequence[PlacedLayer]], kv_layer_bytes: int, ranks: int
) -> dict[str, Traffic]:
    """Place -> traffic of an instance, NPUs among the places.

    ``kv_layer_bytes``: KV of one token in one block on one rank; ``ranks``: of a stage.
    """
    found: dict[str, Traffic] = {}
    for layer in (layer for layers in stages for layer in layers):
        found.setdefault(layer.place, Traffic()).add(
            step_bytes=layer.read_bytes * ranks,
            token_bytes=layer.bytes_per_token * ranks,
            expert_bytes=layer.expert_bytes * ranks,
        )
        if layer.kv_place is not None:
            found.setdefault(layer.kv_place, Traffic()).add(kv_bytes=kv_layer_bytes * ranks)
    return found
