"""Bytes that the steps of an instance move to and from memories beside those of its NPUs.

The same layers and bytes as those whose time is charged (:mod:`servesim.cost.memory_reads`), added up for
the energy of the bits.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from servesim.slotted import dataclass
from servesim.specs.layers import Attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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


def reaches_of(model: ModelSpec) -> dict[int, int]:
    """Block -> tokens that its attention sees, the new one among them; blocks that see all are left out."""
    return {
        index: layer.attention.reach
        for index, layer in enumerate(model.layers.layers)
        if isinstance(layer.attention, Attention) and layer.attention.reach
    }


def tokens_within(reach: int, histories: Iterable[int], decodes: int, kv_sum: int) -> int:
    """Tokens of the cache that a layer reads in a step if it sees ``reach`` tokens, the new one among them:
    of the history of every chunk what its first token sees, of decodes what those of the mean length see.

    An upper bound where decodes on both sides of the window are mixed, and for chunked attention.
    """
    return sum(min(history, reach - 1) for history in histories) + min(kv_sum, decodes * (reach - 1))


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
    """KV of one token: read for every token that attention looks back at, written for every new one; of the
    layers that see all tokens."""
    window_bytes: dict[int, int] = field(default_factory=dict)
    """The same of layers that see so many tokens."""

    def add(
        self, *, step_bytes: int = 0, token_bytes: int = 0, expert_bytes: int = 0, kv_bytes: int = 0
    ) -> None:
        """Count what a layer moves, beside what is counted already."""
        self.step_bytes += step_bytes
        self.token_bytes += token_bytes
        self.expert_bytes += expert_bytes
        self.kv_bytes += kv_bytes

    def moved(
        self,
        tokens: NDArray[np.int64],
        kv_tokens: NDArray[np.int64],
        model: ModelSpec,
        within: Mapping[int, NDArray[np.int64]] | None = None,
    ) -> NDArray[np.int64]:
        """Bytes of each step, shape (steps,).

        Args:
            tokens: that each step computes.
            kv_tokens: in the cache before, that its attention reads from this memory.
            model: whose experts they choose, every one equally often.
            within: the same as ``kv_tokens`` of layers that see so many tokens; needed where there are any.
        """
        sizes = self.step_bytes + self.token_bytes * tokens + self.kv_bytes * (tokens + kv_tokens)
        for reach, kv_bytes in self.window_bytes.items():
            assert within is not None
            sizes = sizes + kv_bytes * (tokens + within[reach])
        if self.expert_bytes:
            experts = model.num_experts
            distinct = expected_distinct_experts(tokens, experts, model.num_experts_per_tok)
            sizes = sizes + np.rint(self.expert_bytes * (distinct / experts)).astype(np.int64)
        return sizes


def traffic_by_place(
    stages: Sequence[Sequence[PlacedLayer]],
    kv_layer_bytes: int,
    ranks: int,
    reaches: Mapping[int, int] | None = None,
) -> dict[str, Traffic]:
    """Place -> traffic of an instance, NPUs among the places.

    ``kv_layer_bytes``: KV of one token in one block on one rank; ``ranks``: of a stage; ``reaches``: see
    :func:`reaches_of`.
    """
    found: dict[str, Traffic] = {}
    for layer in (layer for layers in stages for layer in layers):
        found.setdefault(layer.place, Traffic()).add(
            step_bytes=layer.read_bytes * ranks,
            token_bytes=layer.bytes_per_token * ranks,
            expert_bytes=layer.expert_bytes * ranks,
        )
        if layer.kv_place is not None:
            own, size = found.setdefault(layer.kv_place, Traffic()), kv_layer_bytes * ranks
            reach = (reaches or {}).get(-1 if layer.block is None else layer.block)
            if reach:
                own.window_bytes[reach] = own.window_bytes.get(reach, 0) + size
            else:
                own.add(kv_bytes=size)
    return found
