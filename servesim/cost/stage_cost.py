"""What one pipeline stage of one instance costs: a list of terms, and a cache of their sum for decodes.

A step pays, for p tokens (its own, or padded to a CUDA graph), S sequences and L transformer blocks:

    L * attention + everything that depends on p + everything that depends on S + host overhead

Most steps of a run only decode, and the same number of requests for many steps. :class:`DecodeRows` keeps,
for each number of decodes, the whole step as one line over the KV length; the list of terms is its referee.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.attention import attention_term
from servesim.cost.attention_lookup import whole_ns
from servesim.cost.batch_shape import Shape, scheduled_tokens
from servesim.cost.count_term import CountTerm
from servesim.cost.cudagraph import LARGEST_GRAPH, capture_sizes, padded_tokens
from servesim.cost.host_term import HostTerm
from servesim.cost.terms import Role
from servesim.network.links import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.attention import AttentionTerm
    from servesim.cost.attention_lookup import DecodeRow
    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.context_parallel import ContextExchange
    from servesim.cost.step_terms import StageTerms
    from servesim.cost.terms import LayerCost, Term
    from servesim.specs.hardware import EngineSpec


class StageCost:
    """The terms of one stage of one instance; times in whole nanoseconds where a step is asked for.

    ``tables`` are those of the instance's tensor-parallel degree; ``blocks`` the number of transformer
    blocks, all of the model's or those of a pipeline stage; ``terms`` everything but attention;
    ``capture_limit`` the tokens of the largest step that runs as a CUDA graph; ``drafting`` what speculative
    decoding adds, with ``per_request`` tokens a decode; ``exchange`` what ranks that share KV send around.
    """

    def __init__(
        self,
        bundle: Bundle,
        tables: RankTables,
        blocks: int,
        terms: StageTerms,
        engine: EngineSpec,
        capture_limit: int = LARGEST_GRAPH,
        attention_kind: str = "full",
        *,
        overlaps: bool = True,
        drafting: Term | None = None,
        per_request: int = 1,
        exchange: ContextExchange | None = None,
    ) -> None:
        self.bundle = bundle
        self.tables = tables
        self.blocks = blocks
        self.layers = terms
        self.engine = engine
        self.padding = Padding(capture_limit if engine.cudagraph else 0, per_request)
        self._drafting = drafting
        self.dense = CountTerm(Role.BLOCKS, terms.blocks)
        """What the transformer blocks pay beside attention, by the tokens they compute."""
        self.attention = attention_term(attention_kind, tables, blocks, engine)
        layers = (*terms.blocks, *terms.once, *terms.sequences)
        launches = 0 if engine.cudagraph else blocks + sum(layer.calls for layer in layers)
        if exchange is not None and launches:
            launches += exchange.launches
        self.host = HostTerm(engine, launches, overlaps=overlaps)
        self._has_floor = self.host.has_floor
        self._once = CountTerm(Role.ONCE, terms.once)
        self._heads = CountTerm(Role.HEAD, terms.sequences, by_sequences=True)
        self.terms: tuple[Term, ...] = (self.dense, self._once, self._heads, self.attention, self.host)
        self._beside = tuple(term for term in (exchange, drafting) if term is not None)
        self.terms = (*self.terms, *self._beside)
        self.decodes = DecodeRows(self.terms, self.attention, self.host, self.padding)

    def role_ns(self, role: Role, batch: BatchShape, tokens: int) -> float:
        """ns of the terms of one role; ``tokens``: what the dense layers compute, padding included."""
        return sum(term.ns(batch, tokens) for term in self.terms if term.role is role)

    def step_ns(self, batch: BatchShape) -> int:
        """A step that this stage runs by itself; decodes alone come from the cache."""
        if not batch.chunks and self._drafting is None:
            return self.decode_ns(batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max)
        tokens = self.padding.of(scheduled_tokens(batch))
        sequences = batch.num_decodes + batch.draft_tokens + len(batch.chunks)
        # the sum of `terms`, in their order
        ns = self.dense.of(tokens) + self._once.of(tokens) + self._heads.of(sequences)
        ns += self.attention.ns(batch, tokens)
        host_ns = self.host.ns(batch, tokens)
        ns += host_ns
        for term in self._beside:
            ns += term.ns(batch, tokens)
        if self._has_floor:
            ns = max(ns, self.host.floor_ns(batch) + host_ns)
        return whole_ns(ns)

    def explain(self, batch: BatchShape, tokens: int | None = None) -> list[LayerCost]:
        """What every layer contributes to a step, and where from; adds up to the step's time.

        ``tokens``: what the dense layers compute; None: the batch's own, padded.
        """
        count = self.padding.of(scheduled_tokens(batch)) if tokens is None else tokens
        lines = [line for term in self.terms for line in term.explain(batch, count)]
        gpu_ns = sum(term.ns(batch, count) for term in self.terms if term is not self.host)
        return [*lines, *self.host.explain_wait(batch, gpu_ns / 1000.0)]

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int:
        """A step of ``n`` > 0 decodes alone; sum, least and greatest of their KV lengths in tokens."""
        return whole_ns(self.decodes.ns(n, kv_sum, kv_min, kv_max))

    def decode_run_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int) -> NDArray[np.int64]:
        """``steps`` consecutive steps of the same decodes; see :meth:`DecodeRows.run_ns`."""
        return self.decodes.run_ns(n, kv_sum, kv_min, kv_max, steps)

    def decode_ends(
        self,
        ends_ns: list[int],
        n: int,
        kv_sum: int,
        kv_min: int,
        kv_max: int,
        steps: int,
        depth: int = 1,
        until_ns: int = NEVER,
    ) -> None:
        """Add to ``ends_ns`` the ends of ``steps`` steps of the same decodes that follow each other from its
        last entry on, every KV length growing by one a step.

        After the first, none is added that is scheduled at ``until_ns`` or later: when the step ``depth``
        before it ends, which is in ``ends_ns`` as well.
        """
        self.decodes.add_ends(ends_ns, n, kv_sum, kv_min, kv_max, steps, depth, until_ns)

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int:
        """A step of prefill ``chunks`` (tokens > 1, tokens in the cache before) beside ``n`` >= 0 decodes."""
        return self.step_ns(Shape(chunks, n, kv_sum, kv_min, kv_max))


class Padding:
    """Tokens → tokens of the CUDA graph that holds them; those beyond the largest graph stay."""

    __slots__ = ("_padded",)

    def __init__(self, capture_limit: int, per_request: int = 1) -> None:
        """``capture_limit``: tokens of the largest step that runs as a graph; 0: no graphs. ``per_request``:
        tokens of a decode, drafts among them."""
        self._padded = [0]
        if capture_limit:
            largest = int(capture_sizes(capture_limit, per_request)[-1])
            self._padded += padded_tokens(np.arange(1, largest + 1), capture_limit, per_request).tolist()

    def __len__(self) -> int:
        """One more than the tokens of the largest graph."""
        return len(self._padded)

    def of(self, tokens: int) -> int:
        """Tokens that the dense layers compute."""
        return self._padded[tokens] if tokens < len(self._padded) else tokens


class DecodeRows:
    """Steps of decodes alone: for each number of them, the sum of all terms as a row over KV length."""

    __slots__ = ("_attention", "_host", "_padding", "_rest", "_rows")

    def __init__(
        self, terms: Sequence[Term], attention: AttentionTerm, host: HostTerm, padding: Padding
    ) -> None:
        self._rest = [term for term in terms if term is not attention]
        self._attention = attention
        self._host = host
        self._padding = padding
        self._rows: dict[int, DecodeRow] = {}

    def ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> float:
        """ns of a step of ``n`` > 0 decodes."""
        row = self._rows.get(n) or self._new_row(n)
        ns = row.unequal_ns(kv_sum // n, kv_min, kv_max)
        return ns if ns > row.floor_ns else row.floor_ns

    def run_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int) -> NDArray[np.int64]:
        """``steps`` consecutive steps of the same ``n`` decodes, every KV length growing by one a step.

        Shape (steps,), whole ns; element i equals the rounded ``ns(n, kv_sum + i * n, kv_min + i, kv_max +
        i)`` exactly: the same floating-point operations in the same order. The skew rate does not change over
        such a run, so α changes only where the greatest length enters another bucket.
        """
        row = self._rows.get(n) or self._new_row(n)
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
        if row.floor_ns:
            ns = np.maximum(ns, row.floor_ns)
        return np.maximum(np.rint(ns).astype(np.int64), 1)

    def add_ends(
        self,
        ends_ns: list[int],
        n: int,
        kv_sum: int,
        kv_min: int,
        kv_max: int,
        steps: int,
        depth: int,
        until_ns: int,
    ) -> None:
        """See :meth:`StageCost.decode_ends`."""
        row = self._rows.get(n) or self._new_row(n)
        first, mean, at = len(ends_ns), kv_sum // n, 0
        while at < steps and (not at or ends_ns[-depth] < until_ns):
            row.add_ends(ends_ns, mean + at, kv_min + at, kv_max + at, steps - at, depth, until_ns)
            at = len(ends_ns) - first

    def _new_row(self, n: int) -> DecodeRow:
        batch, tokens = Shape((), n), self._padding.of(n)
        rest = sum(term.ns(batch, tokens) for term in self._rest)
        row = self._rows[n] = self._attention.decode_row(n, rest)
        if self._host.has_floor:
            row.wait(self._host.floor_ns(batch) + self._host.ns(batch, tokens))
        return row
