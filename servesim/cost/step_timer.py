"""How long a step of an instance takes.

A step pays, for p tokens (its own, or padded to a CUDA graph), S sequences and L transformer blocks:

    L * attention + everything that depends on p + everything that depends on S + host overhead

The token and sequence terms (:mod:`servesim.cost.step_terms`) are summed once into plain lists. Attention
is

- decodes alone: ``A(n, mean) + α (A(n, max) - A(n, mean))``, n decodes of mean and greatest KV length, α from
  the bundle's skew fit (:mod:`servesim.cost.skew`);
- with prefill chunks (c_j tokens, h_j of history): ``base + Σ_j (A(c_j, h_j, n, mean) - base)``, where base
  is the smallest profiled chunk without history beside the same decodes: every chunk adds what it alone would
  add. Unequal decodes add α here too, or the tail of the longest (:meth:`StepTimer.tail_us`), or nothing, as
  the engine constants say.

A is linear between measured points and goes on along the last two above the grid, but a kernel never takes
less time beyond the grid than at its edge: noise in the last two points must not turn into negative time far
out. KV lengths count the tokens in the cache before the step; the mean is rounded down to a whole token.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.attention import AttentionTensor, DecodeRow
from servesim.cost.cudagraph import LARGEST_GRAPH, padded_tokens
from servesim.cost.skew import skew_rate
from servesim.cost.step_terms import TermTotals
from servesim.cost.tables import resample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.attention import DecodeCorners
    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.explain import LayerCost
    from servesim.cost.step_terms import StageTerms
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.hardware import EngineSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions

FIRST_TOKENS = 2048
FIRST_SEQUENCES = 256
_US = 1000.0  # ns


class StepTimer:
    """Step durations of one instance, in whole nanoseconds.

    ``tables`` are those of the instance's tensor-parallel degree; ``blocks`` the number of transformer
    blocks, all of the model's or those of a pipeline stage; ``terms`` everything but attention;
    ``capture_limit`` the tokens of the largest step that runs as a CUDA graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        tables: RankTables,
        blocks: int,
        terms: StageTerms,
        engine: EngineSpec,
        capture_limit: int = LARGEST_GRAPH,
    ) -> None:
        self.bundle = bundle
        self.tables = tables
        self.blocks = blocks
        self.terms = terms
        self.token_terms = terms.tokens
        self.sequence_terms = terms.sequences
        self.engine = engine
        self.capture_limit = capture_limit
        self.attention = AttentionTensor(tables.attention)
        self._ns_per_us = blocks * _US
        self._decode_overhead_ns = engine.decode_step_overhead_us * _US
        self._prefill_overhead_ns = engine.prefill_step_overhead_us * _US
        self._mixed_skew = tables.skew if engine.skew_in_mixed_steps else None
        self.waits_for_longest = engine.tail_in_mixed_steps and not engine.skew_in_mixed_steps
        self._decode_surface = tables.attention.along(0, 0).along(1, 0)  # (n_decode, kv_decode)
        self._decode_rows: dict[int, DecodeRow] = {}
        self._attention_rows: dict[int, DecodeRow] = {}
        self._by_tokens = TermTotals(self.token_terms, FIRST_TOKENS, self.padded)
        self.in_blocks = TermTotals(terms.blocks, FIRST_TOKENS)
        """What the transformer blocks pay beside attention, by the tokens they compute, padding included."""
        self.once = TermTotals(terms.once, FIRST_TOKENS)
        """What the layers outside of the blocks pay, by the tokens they compute."""
        self._by_sequences = TermTotals(self.sequence_terms, FIRST_SEQUENCES)

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int:
        """A step of ``n`` > 0 decodes alone; sum, least and greatest of their KV lengths in tokens."""
        row = self._decode_rows.get(n) or self._new_decode_row(n)
        ns = row.unequal_ns(kv_sum // n, kv_min, kv_max)
        whole = round(ns)
        return whole if whole > 0 else 1

    def decode_run_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int) -> NDArray[np.int64]:
        """``steps`` consecutive steps of the same ``n`` decodes, every KV length growing by one a step.

        Shape (steps,); element i equals ``decode_ns(n, kv_sum + i * n, kv_min + i, kv_max + i)`` exactly: the
        same floating-point operations in the same order. The skew rate does not change over such a run, so α
        changes only where the greatest length enters another bucket.
        """
        row = self._decode_rows.get(n) or self._new_decode_row(n)
        mean = kv_sum // n
        ns = row.growing_ns(mean, steps)
        if mean != kv_max and row.alpha is not None:
            longest = row.growing_ns(kv_max, steps)
            alphas = row.alpha[bisect_left(row.rate_bounds, (mean - kv_min) / (kv_max - kv_min))]
            bounds = row.length_bounds
            bucket = bisect_left(bounds, kv_max)
            alpha: float | NDArray[np.float64] = alphas[bucket]
            if bucket != bisect_left(bounds, kv_max + steps - 1):
                alpha = np.array(alphas)[np.searchsorted(bounds, np.arange(kv_max, kv_max + steps))]
            skewed = ns + alpha * (longest - ns)
            if min(alphas) < 0.0:
                shortest = np.minimum(row.growing_ns(kv_min, steps), ns)
                skewed = np.where(np.less(alpha, 0.0), np.maximum(skewed, shortest), skewed)
            ns = np.where(longest > ns, skewed, ns)
        return np.maximum(np.rint(ns).astype(np.int64), 1)

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int:
        """A step of prefill ``chunks`` (tokens > 1, tokens in the cache before) beside ``n`` >= 0 decodes."""
        if not chunks:
            return self.decode_ns(n, kv_sum, kv_min, kv_max)
        tokens = n
        for chunk, _ in chunks:
            tokens += chunk
        whole = round(
            self.tokens_ns(tokens)
            + self.sequences_ns(n + len(chunks))
            + self._prefill_overhead_ns
            + self._ns_per_us * self._mixed_attention_us(chunks, n, kv_sum, kv_min, kv_max)
        )
        return whole if whole > 0 else 1

    def explain(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> list[LayerCost]:
        """What every layer contributes to a step, and where from; adds up to the step's time."""
        from servesim.cost.explain import explain

        return explain(self, chunks, n, kv_sum, kv_min, kv_max)

    def tokens_ns(self, tokens: int) -> float:
        """What a step pays for its ``tokens`` scheduled tokens: dense layers, experts, all-reduces."""
        return self._by_tokens.ns(tokens)

    def sequences_ns(self, sequences: int) -> float:
        """What a step pays for its ``sequences``: output logits, sampling."""
        return self._by_sequences.ns(sequences)

    def attention_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> float:
        """The part of :meth:`mixed_ns` that attention takes, in all blocks."""
        if chunks:
            return self._ns_per_us * self._mixed_attention_us(chunks, n, kv_sum, kv_min, kv_max)
        row = self._attention_rows.get(n)
        if row is None:
            row = self._attention_rows[n] = self._decode_row(n, 0.0)
        return row.unequal_ns(kv_sum // n, kv_min, kv_max)

    def overhead_ns(self, prefills: bool) -> float:
        """Host time of a step with or without prefill chunks."""
        return self._prefill_overhead_ns if prefills else self._decode_overhead_ns

    def padded(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that the dense layers compute for steps of ``tokens`` tokens."""
        return padded_tokens(tokens, self.capture_limit) if self.engine.cudagraph else tokens

    def decode_attention_us(self, n: int) -> NDArray[np.float64]:
        """µs of one block's attention for ``n`` decodes at every ``kv_decode`` of the grid."""
        ns, _ = self._decode_surface.axes
        values: NDArray[np.float64] = resample(ns, self._decode_surface.tensor, [n])[0]
        return np.maximum(values, self._decode_surface.tensor[-1]) if n > ns[-1] else values

    def _mixed_attention_us(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> float:
        attention = self.attention
        mean = kv_sum // n if n else 0
        corners = attention.corners(n, mean)
        if len(chunks) == 1 or not self.engine.chunked_attention:
            us = attention.us(*_together(chunks), corners)
        else:
            us = base = self.base_us(n, corners)
            for chunk, history in chunks:
                us += attention.us(chunk, history, corners) - base
        if mean != kv_max and n > 1:
            if self._mixed_skew is not None:
                us += self.skew_us(chunks, n, mean, kv_min, kv_max)
            elif self.waits_for_longest:
                us += self.tail_us(n, mean, kv_max)
        return us

    def skew_us(
        self, chunks: Sequence[tuple[int, int]], n: int, mean: int, kv_min: int, kv_max: int
    ) -> float:
        """µs that unequal KV lengths add to one block's attention in a step with chunks.

        The chunks count as one of all their tokens and all their history, which is how α was fitted.
        """
        if self._mixed_skew is None or n < 2 or mean == kv_max:
            return 0.0
        chunk, history = _together(chunks)
        attention = self.attention
        longest = attention.us(chunk, history, attention.corners(n, kv_max))
        equal = attention.us(chunk, history, attention.corners(n, mean))
        if longest <= equal:
            return 0.0
        alpha = self._mixed_skew.of(chunk, n, skew_rate(mean, kv_min, kv_max), kv_max, history)
        if alpha >= 0.0:
            return alpha * (longest - equal)
        shortest = attention.us(chunk, history, attention.corners(n, kv_min))
        return max(alpha * (longest - equal), min(shortest - equal, 0.0))

    def tail_us(self, n: int, mean: int, kv_max: int) -> float:
        """µs that one block's attention waits for its longest decode in a step with chunks.

        A kernel that takes prefill and decodes in one launch gives every sequence and head a thread block of
        its own, and the processors take the blocks in order. Blocks of unequal length leave them as busy as
        equal ones of the mean length until the last of the longest sequence runs alone. It outlasts a block
        of the mean length by what a single decode takes longer, and starts anywhere in the last round, so
        that half of it shows: 0.7 % short of 8,458 measured launches (Llama-3.1-8B on RTX PRO 6000, up to
        4096 tokens) on average, where the mean alone is 4.8 % short. Never more than if all were the longest.
        """
        attention = self.attention
        chunk = attention.smallest_chunk
        longest, equal = (attention.us(chunk, 0, attention.corners(1, kv)) for kv in (kv_max, mean))
        if longest <= equal:
            return 0.0
        all_longest = attention.us(chunk, 0, attention.corners(n, kv_max))
        return min(
            0.5 * (longest - equal), max(all_longest - self.base_us(n, attention.corners(n, mean)), 0.0)
        )

    def base_us(self, n: int, corners: DecodeCorners) -> float:
        """What the decodes alone cost in a step that also prefills; 0 without decodes."""
        return self.attention.us(self.attention.smallest_chunk, 0, corners) if n else 0.0

    def _new_decode_row(self, n: int) -> DecodeRow:
        rest = self.tokens_ns(n) + self.sequences_ns(n) + self._decode_overhead_ns
        self._decode_rows[n] = row = self._decode_row(n, rest)
        return row

    def _decode_row(self, n: int, rest_ns: float) -> DecodeRow:
        """Attention of ``n`` decodes in all blocks, and ``rest_ns`` with it."""
        values = rest_ns + self._ns_per_us * self.decode_attention_us(n)
        points = self._decode_surface.axes[1].tolist()
        return DecodeRow.through(points, values.tolist(), self.tables.skew, n)


def _together(chunks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """All tokens and all history of the chunks of a step."""
    if len(chunks) == 1:
        return chunks[0]
    return sum(tokens for tokens, _ in chunks), sum(history for _, history in chunks)


def build_step_timer(
    instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, cluster: ClusterSpec
) -> StepTimer:
    """The timer of a single instance; see :meth:`servesim.cost.step_timers.StepTimers.of`."""
    from servesim.cost.step_timers import StepTimers

    return StepTimers(cluster).of(instance, model, options)
