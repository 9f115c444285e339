"""Which points a sweep measures: axes that grow by a factor, bounded by the engine's limits and by memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.profiler.grids import token_grid
from servesim.profiler.meter import AttentionBatch
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.profiler.meter import ProfileJob
    from servesim.specs.model import ModelSpec

FIRST_CHUNK = 16
FIRST_KV = 16
FIRST_HISTORY = 512
FIRST_SKEW_KV = 128
SKEW_RATIOS = (0.0625, 0.125, 0.25, 0.5, 0.75, 0.9)
"""Shares of the decodes that are long in a skew shot."""
FEW_LONG = (1, 2, 3, 4)
"""Counts of long decodes measured whatever their share: one long straggler is the common case."""


def geometric(first: int, last: int, factor: float) -> list[int]:
    """``first``, ``first * factor``, ... rounded, each more than the one before; ``last`` ends it.

    >>> geometric(1, 20, 2.0)
    [1, 2, 4, 8, 16, 20]
    """
    grid: list[int] = []
    exact = float(first)
    while (value := max(round(exact), grid[-1] + 1 if grid else first)) < last:
        grid.append(value)
        exact *= factor
    return [*grid, last]


@dataclass(frozen=True, slots=True)
class SkewShot:
    """Decodes of two lengths: ``long`` of ``n`` are ``skew`` times as long as the rest."""

    n: int
    long: int
    skew: float
    chunk: int
    history: int
    kv: int

    @property
    def kv_long(self) -> int:
        return round(self.kv * self.skew)

    @property
    def kv_mean(self) -> int:
        return round(self.kv + (self.kv_long - self.kv) * self.long / self.n)

    def batches(self) -> tuple[AttentionBatch, AttentionBatch, AttentionBatch]:
        """All of mean length, all of the greatest, and the mix."""
        mixed = ((self.n - self.long, self.kv), (self.long, self.kv_long))
        parts = (((self.n, self.kv_mean),), ((self.n, self.kv_long),), mixed)
        equal, longest, skewed = (AttentionBatch(self.chunk, self.history, decodes) for decodes in parts)
        return equal, longest, skewed


@dataclass(frozen=True, slots=True)
class SweepGrid:
    """Limits and factors of every axis of every table."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_kv: int = 16384
    chunk_factor: float = 2.0
    decode_factor: float = 2.0
    kv_factor: float = 2.0
    token_factor: float | None = None
    """Growth of the token axis of dense layers; None: the steps of their kernels' tiles."""
    skew_factor: float | None = 2.0
    """Growth of the skew sweep's axes; None: no skew sweep."""
    skew: float = 4.0
    """How many times longer the long decodes of the skew sweep are."""

    @classmethod
    def of(cls, job: ProfileJob) -> SweepGrid:
        """The grid of a job's limits, its factors as they are by default."""
        return cls(job.max_num_batched_tokens, job.max_num_seqs, job.max_kv)

    def __post_init__(self) -> None:
        factors = {
            "--chunk-factor": self.chunk_factor,
            "--decode-factor": self.decode_factor,
            "--kv-factor": self.kv_factor,
            "--token-factor": self.token_factor,
            "--skew-factor": self.skew_factor,
        }
        for flag, factor in factors.items():
            if factor is not None and not 1.05 <= factor <= 1024:
                raise InputError(f"{flag} {factor:g}: is not allowed; must be between 1.05 and 1024")

    def tokens(self) -> list[int]:
        """Token counts of dense.csv."""
        if self.token_factor is None:
            return token_grid(self.max_num_batched_tokens)
        return geometric(1, self.max_num_batched_tokens, self.token_factor)

    def sequences(self) -> list[int]:
        """Sequence counts of per_sequence.csv."""
        if self.token_factor is None:
            return token_grid(self.max_num_seqs)
        return geometric(1, self.max_num_seqs, self.token_factor)

    def chunks(self) -> list[int]:
        return geometric(
            min(FIRST_CHUNK, self.max_num_batched_tokens), self.max_num_batched_tokens, self.chunk_factor
        )

    def histories(self) -> list[int]:
        return [0, *geometric(min(FIRST_HISTORY, self.max_kv), self.max_kv, self.kv_factor)]

    def decodes(self) -> list[int]:
        return geometric(1, self.max_num_seqs, self.decode_factor)

    def lengths(self) -> list[int]:
        return geometric(min(FIRST_KV, self.max_kv), self.max_kv, self.kv_factor)

    def attention(self, kv_tokens: int) -> list[AttentionBatch]:
        """Batches of attention.csv: chunks and histories beside decodes, as far as memory holds them."""
        alone = [((n, kv),) for n in self.decodes() for kv in self.lengths()]
        batches = [AttentionBatch(0, 0, decodes) for decodes in alone]
        for chunk, history in itertools.product(self.chunks(), self.histories()):
            batches += [AttentionBatch(chunk, history, decodes) for decodes in [(), *alone]]
        return [batch for batch in batches if batch.kv_tokens <= kv_tokens]

    def experts(self, model: ModelSpec) -> list[tuple[int, int]]:
        """(tokens, activated experts) of moe.csv: T tokens with k experts each touch k to min(E, T k)."""
        top, most = model.num_experts_per_tok, model.num_experts
        return [
            (tokens, activated)
            for tokens in geometric(1, self.max_num_batched_tokens, min(self.token_factor or 2.0, 4.0))
            for activated in geometric(top, min(most, tokens * top), 2.0)
        ]

    def skews(self, kv_tokens: int) -> list[SkewShot]:
        """Shots of skew.csv; empty when the sweep is off or the limits leave no room for unequal lengths."""
        longest = int(self.max_kv / self.skew)
        if self.skew_factor is None or self.max_num_seqs < 2 or longest < 1:
            return []
        factor = self.skew_factor
        chunks = geometric(min(FIRST_CHUNK, self.max_num_batched_tokens), self.max_num_batched_tokens, factor)
        histories = geometric(min(FIRST_HISTORY, self.max_kv), max(self.max_kv // 2, 1), factor)
        prefills = [(0, 0), *itertools.product(chunks, [0, *histories])]
        shots = [
            SkewShot(n, long, self.skew, chunk, history, kv)
            for n in geometric(2, self.max_num_seqs, factor)
            for long in _long_counts(n)
            for chunk, history in prefills
            for kv in geometric(min(FIRST_SKEW_KV, longest), longest, factor)
        ]
        return [shot for shot in shots if max(b.kv_tokens for b in shot.batches()) <= kv_tokens]

    def payloads(self) -> list[int]:
        """None: collectives are not measured so far."""
        return []

    def describe(self) -> dict[str, Any]:
        """The axes for meta.yaml."""
        axes: dict[str, Any] = {
            "attention_grid": {
                "max_kv": self.max_kv,
                "chunk_factor": self.chunk_factor,
                "decode_factor": self.decode_factor,
                "kv_factor": self.kv_factor,
                "chunks": [0, *self.chunks()],
                "n_decode": [0, *self.decodes()],
                "kv_prefill": self.histories(),
                "kv_decode": [0, *self.lengths()],
            },
            "skew_profile": {"enabled": self.skew_factor is not None},
        }
        if self.skew_factor is not None:
            axes["skew_profile"] |= {
                "factor": self.skew_factor,
                "ratio": list(SKEW_RATIOS),
                "skew": self.skew,
            }
        return axes


def _long_counts(n: int) -> list[int]:
    """How many of ``n`` decodes are long: a few, and the shares of :data:`SKEW_RATIOS`."""
    counts = {*FEW_LONG, *(round(ratio * n) for ratio in SKEW_RATIOS)}
    return sorted(count for count in counts if 1 <= count < n)
