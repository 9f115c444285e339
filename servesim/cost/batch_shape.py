"""What of a batch decides how long it takes: a few integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


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


class Shape:
    """A batch shape by itself.

    Decodes are ``num_decodes`` requests of one token. Their KV lengths, in tokens, are those before the step.
    """

    __slots__ = ("chunks", "draft_tokens", "kv_lengths", "kv_max", "kv_min", "kv_sum", "num_decodes", "step")

    def __init__(
        self,
        chunks: Sequence[tuple[int, int]] = (),
        num_decodes: int = 0,
        kv_sum: int = 0,
        kv_min: int = 0,
        kv_max: int = 0,
        kv_lengths: Sequence[int] | None = None,
        step: int = 0,
        draft_tokens: int = 0,
    ) -> None:
        """
        Args:
            chunks: (tokens > 1, tokens in the cache before) of every prefill chunk.
            num_decodes: requests that decode.
            kv_sum: sum of their KV lengths.
            kv_min: the least of them.
            kv_max: the greatest of them.
            kv_lengths: every one of them, where each matters on its own.
            step: number of the step.
            draft_tokens: drafts that the decodes verify beside their one token, all together.
        """
        self.chunks = chunks
        self.num_decodes = num_decodes
        self.kv_sum = kv_sum
        self.kv_min = kv_min
        self.kv_max = kv_max
        self.kv_lengths = kv_lengths
        self.step = step
        self.draft_tokens = draft_tokens


IDLE = Shape()
"""A member without work: it runs its dense layers on a dummy token; attention and output head do not run."""


def scheduled_tokens(batch: BatchShape) -> int:
    """Tokens that a batch computes, without padding."""
    tokens = batch.num_decodes + batch.draft_tokens
    for chunk, _ in batch.chunks:
        tokens += chunk
    return tokens
