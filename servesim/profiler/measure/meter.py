"""What a measuring source must be able to do; the sweep asks, a source holds the stopwatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences one attention call works on.

    A KV length, and a chunk's history, count the tokens in the cache before the step: a decode of KV length k
    reads k + 1 keys, its own among them.
    """

    chunk: int = 0
    """Tokens of the one prefill chunk; 0: there is none."""
    history: int = 0
    """Tokens of the chunk's sequence that are in the cache already."""
    decodes: tuple[tuple[int, int], ...] = ()
    """Runs of equal decodes: (how many, KV length)."""

    @property
    def num_decodes(self) -> int:
        return sum(count for count, _ in self.decodes)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the cache once the step is over."""
        return self.chunk + self.history + sum(count * (kv + 1) for count, kv in self.decodes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence once the step is over."""
        return max([self.chunk + self.history, *(kv + 1 for _, kv in self.decodes)])


class Meter(Protocol):
    """A measuring source at work on one model. All times are µs of one rank."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What must not change while a bundle is measured: device, versions, how time is taken."""

    @property
    def notes(self) -> dict[str, Any]:
        """What a reader of meta.yaml may want to know beside the conditions (clock, temperature, ...)."""

    def start_rank(self, tp: int) -> None:
        """Get ready to measure one rank of ``tp``; whatever was ready before may go."""

    def kv_capacity_tokens(self) -> int:
        """KV tokens that fit the device beside everything else."""

    def layers_us(self, layers: Sequence[str], tokens: int) -> dict[str, float]:
        """Time of each of the dense ``layers`` for ``tokens`` tokens."""

    def heads_us(self, layers: Sequence[str], sequences: int) -> dict[str, float]:
        """Time of each of the per-sequence ``layers`` for ``sequences`` sequences."""

    def attention_us(self, batch: AttentionBatch) -> float:
        """Time of one block's attention."""

    def experts_us(self, tokens: int, activated: int) -> float:
        """Time of one expert layer whose ``tokens`` touch ``activated`` different experts."""

    def close(self) -> None:
        """Give the device back."""
