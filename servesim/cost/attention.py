"""Attention terms: one class a kind, found by the kind's name.

A kind is made by ``cls(tables, blocks, engine)``: the tables of a rank, the number of blocks of the stage
that have it, and the engine's constants. Another kind is a class with the methods of :class:`AttentionTerm`,
a line in :data:`KINDS`, and ``kind: NAME`` in the architecture file of its models.
"""

from __future__ import annotations

from bisect import bisect_left
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np

from servesim.compiled import mypyc_attr
from servesim.cost.attention_lookup import AttentionTensor, DecodeRow, together
from servesim.cost.skew import skew_rate
from servesim.cost.tables import Surface, describe_axis, resample
from servesim.cost.terms import LayerCost, Role, Term
from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.bundle import RankTables
    from servesim.specs.hardware import EngineSpec

_US = 1000.0  # ns
FULL_LOAD = 8
"""Decodes from which on batched attention is as far from its table as it gets."""


class AttentionTerm(Term, Protocol):
    """Attention of one kind, with the row of decodes that a quiet stretch is computed from."""

    def decode_row(self, n: int, rest_ns: float) -> DecodeRow:
        """ns of ``n`` decodes alone over their KV length, and ``rest_ns`` with it."""


KINDS = {
    "full": "servesim.cost.attention:FullAttention",
}
"""Name of an attention kind -> module:class of its term."""


def attention_term(kind: str, tables: RankTables, blocks: int, engine: EngineSpec) -> AttentionTerm:
    """The term of ``blocks`` transformer blocks with attention of this kind.

    Raises:
        InputError: no class prices this kind.
    """
    if kind not in KINDS:
        raise InputError(f"attention kind {kind!r} is not known; must be one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    term: AttentionTerm = getattr(import_module(module), name)(tables, blocks, engine)
    return term


def decodes_under_load(attention: Surface, factor: float) -> Surface:
    """The table with the time of its decodes multiplied, by ``factor`` from eight decodes on.

    A single decode stays as measured, between them the factor grows with the logarithm of their number.
    """
    _, decodes, _, _ = attention.axes
    share = np.clip(np.log2(np.maximum(decodes, 1)) / np.log2(FULL_LOAD), 0.0, 1.0)
    alone = attention.along(0, 0).along(1, 0).tensor  # (n_decode, kv_decode)
    more = alone * (factor**share - 1.0)[:, None]
    return Surface(attention.axes, attention.tensor + more[None, :, None, :])


@mypyc_attr(allow_interpreted_subclasses=True)
class FullAttention:
    """Attention of the average block of a stage, in ``blocks`` transformer blocks.

    A table has the time of any kind of attention over (chunk, decodes, history, KV length): in full, over a
    window, over latent vectors, with a state that no length changes. Of a model with several kinds the tables
    are added up before (:meth:`servesim.cost.bundle.RankTables.for_stage`).

    - Decodes alone: ``A(n, mean) + α (A(n, max) - A(n, mean))``, n decodes of mean and greatest KV length, α
      from the bundle's skew fit (:mod:`servesim.cost.skew`);
    - with prefill chunks (c_j tokens, h_j of history): ``base + Σ_j (A(c_j, h_j, n, mean) - base)``, where
      base is the smallest profiled chunk without history beside the same decodes: every chunk adds what it
      alone would add. Unequal decodes add α here too, or the tail of the longest (:meth:`tail_us`), or
      nothing, as the engine constants say.

    A is linear between measured points and goes on above the grid with the rate that all points tell
    (:mod:`servesim.cost.beyond`), but a kernel never takes less time beyond the grid than at its edge: noise
    must not turn into negative time far out. KV lengths count the tokens in the cache before the step; the
    mean is rounded down.
    """

    def __init__(self, tables: RankTables, blocks: int, engine: EngineSpec) -> None:
        self.role = Role.BLOCKS
        self.tables = tables
        self.blocks = blocks
        self.tensor = AttentionTensor(tables.attention)
        self._ns_per_us = blocks * _US
        self._sums_chunks = not engine.chunked_attention
        self._mixed_skew = tables.skew if engine.skew_in_mixed_steps else None
        self._waits_for_longest = engine.tail_in_mixed_steps and not engine.skew_in_mixed_steps
        self._surface = tables.attention.along(0, 0).along(1, 0)  # (n_decode, kv_decode)
        self._rows: dict[int, DecodeRow] = {}

    def ns(self, batch: BatchShape, tokens: int) -> float:  # noqa: ARG002 - attention is never padded
        """See :class:`servesim.cost.terms.Term`."""
        ns = self._decodes_and_chunks_ns(batch, batch.num_decodes)
        return ns + self._ns_per_us * self.drafts_us(batch) if batch.draft_tokens else ns

    def drafts_us(self, batch: BatchShape) -> float:
        """µs that one block takes longer since decodes verify drafts: where computing takes longer than
        reading the KV."""
        from servesim.cost.drafting import verification_us

        n = batch.num_decodes
        mean = batch.kv_sum // n
        computing = verification_us(self.tensor, n + batch.draft_tokens, mean)
        return max(computing - self._block_row(n).ns(mean), 0.0)

    def _decodes_and_chunks_ns(self, batch: BatchShape, n: int) -> float:
        if batch.chunks:
            us = self._mixed_us(batch.chunks, n, batch.kv_sum, batch.kv_min, batch.kv_max)
            return self._ns_per_us * us
        if not n:
            return 0.0
        row = self._rows.get(n)
        if row is None:
            row = self._rows[n] = self.decode_row(n, 0.0)
        return row.unequal_ns(batch.kv_sum // n, batch.kv_min, batch.kv_max)

    def decode_row(self, n: int, rest_ns: float) -> DecodeRow:
        """See :class:`AttentionTerm`."""
        values = rest_ns + self._ns_per_us * self.decodes_us(n)
        return DecodeRow.through(self._surface.axes[1].tolist(), values.tolist(), self.tables.skew, n)

    def decodes_us(self, n: int) -> NDArray[np.float64]:
        """µs of one block for ``n`` decodes at every ``kv_decode`` of the grid."""
        ns, _ = self._surface.axes
        values: NDArray[np.float64] = resample(ns, self._surface.tensor, [n])[0]
        return np.maximum(values, self._surface.tensor[-1]) if n > ns[-1] else values

    # ------------------------------------------------------------------ steps with prefill chunks

    def _mixed_us(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> float:
        """µs of one block."""
        tensor = self.tensor
        mean = kv_sum // n if n else 0
        us = tensor.chunks_us(chunks, n, mean, at_once=self._sums_chunks)
        if mean != kv_max and n > 1:
            if self._waits_for_longest:
                us += tensor.tail_us(n, mean, kv_max)
            elif self._mixed_skew is not None:
                us += self.skew_us(chunks, n, mean, kv_min, kv_max)
        return us

    def skew_us(
        self, chunks: Sequence[tuple[int, int]], n: int, mean: int, kv_min: int, kv_max: int
    ) -> float:
        """µs that unequal KV lengths add to one block in a step with chunks.

        The chunks count as one of all their tokens and all their history, which is how α was fitted.
        """
        if self._mixed_skew is None or n < 2 or mean == kv_max:
            return 0.0
        chunk, history = together(chunks)
        tensor = self.tensor
        longest = tensor.us(chunk, history, tensor.corners(n, kv_max))
        equal = tensor.us(chunk, history, tensor.corners(n, mean))
        if longest <= equal:
            return 0.0
        alpha = self._mixed_skew.of(chunk, n, skew_rate(mean, kv_min, kv_max), kv_max, history)
        if alpha >= 0.0:
            return alpha * (longest - equal)
        shortest = tensor.us(chunk, history, tensor.corners(n, kv_min))
        return max(alpha * (longest - equal), min(shortest - equal, 0.0))

    def tail_us(self, n: int, mean: int, kv_max: int) -> float:
        """µs that one block waits for its longest decode in a step with chunks.

        A kernel that takes prefill and decodes in one launch gives every sequence and head a thread block of
        its own, and the processors take the blocks in order. Blocks of unequal length leave them as busy as
        equal ones of the mean length until the last of the longest sequence runs alone. It outlasts a block
        of the mean length by what a single decode takes longer, and starts anywhere in the last round, so
        that half of it shows: 0.7 % short of 8,458 measured launches (Llama-3.1-8B on RTX PRO 6000, up to
        4096 tokens) on average, where the mean alone is 4.8 % short. Never more than if all were the longest.
        """
        return self.tensor.tail_us(n, mean, kv_max)

    # ------------------------------------------------------------------ for people

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:  # noqa: ARG002 - see Term
        """See :class:`servesim.cost.terms.Term`."""
        n, kv_min, kv_max = batch.num_decodes, batch.kv_min, batch.kv_max
        mean = batch.kv_sum // n if n else 0
        if batch.chunks:
            lines = self._chunk_lines(batch.chunks, n, mean)
            unequal_us, origin = self._unequal_in_mixed(batch.chunks, n, mean, kv_min, kv_max)
        elif n:
            line = self._block_row(n)
            lines = [LayerCost("attention", self.blocks, line.ns(mean), self._origin(n=n, kv=mean))]
            unequal_us, origin = self._unequal_decodes(line, n, mean, kv_min, kv_max)
        else:
            return []
        if batch.draft_tokens and (drafts_us := self.drafts_us(batch)):
            origin = "derived: computing at the rate of the largest prompt chunk takes longer than reading"
            lines.append(LayerCost("attention: drafts", self.blocks, drafts_us, origin))
        if unequal_us:
            tail = bool(batch.chunks) and self._mixed_skew is None
            name = "attention: longest decode" if tail else "attention: unequal lengths"
            lines.append(LayerCost(name, self.blocks, unequal_us, origin))
        return lines

    def _chunk_lines(self, chunks: Sequence[tuple[int, int]], n: int, mean: int) -> list[LayerCost]:
        """In one look-up, or decodes first and what each chunk adds to them."""
        tensor, blocks = self.tensor, self.blocks
        corners = tensor.corners(n, mean)
        if len(chunks) == 1 or self._sums_chunks:
            chunk, history = together(chunks)
            origin = self._origin(chunk, history, n, mean)
            return [LayerCost("attention", blocks, tensor.us(chunk, history, corners), origin)]
        base_us = tensor.base_us(n, corners)
        lines = []
        if n:
            origin = self._origin(tensor.smallest_chunk, 0, n, mean)
            lines.append(LayerCost("attention: decodes", blocks, base_us, origin))
        for chunk, history in chunks:
            us = tensor.us(chunk, history, corners) - base_us
            origin = self._origin(chunk, history, n, mean) + (", less the decodes" if n else "")
            lines.append(LayerCost(f"attention: {chunk}@{history}", blocks, us, origin))
        return lines

    def _unequal_in_mixed(
        self, chunks: Sequence[tuple[int, int]], n: int, mean: int, kv_min: int, kv_max: int
    ) -> tuple[float, str]:
        """(µs of one block, origin) of unequal decodes beside chunks."""
        if n < 2 or mean == kv_max:
            return 0.0, ""
        if self._mixed_skew is not None:
            chunk, history = together(chunks)
            alpha = self._mixed_skew.of(chunk, n, skew_rate(mean, kv_min, kv_max), kv_max, history)
            return self.skew_us(chunks, n, mean, kv_min, kv_max), _skew_origin(alpha, mean, kv_max)
        if self._waits_for_longest:
            origin = f"half of what a single decode of {kv_max} takes longer than one of the mean, {mean}"
            return self.tail_us(n, mean, kv_max), origin
        return 0.0, ""

    def _unequal_decodes(
        self, line: DecodeRow, n: int, mean: int, kv_min: int, kv_max: int
    ) -> tuple[float, str]:
        """(µs of one block, origin) of unequal decodes without chunks."""
        skew = self.tables.skew
        if skew is None or n < 2 or mean == kv_max:
            return 0.0, ""
        rates, lengths, alphas = skew.for_decodes(n)
        alpha = alphas[bisect_left(rates, skew_rate(mean, kv_min, kv_max))][bisect_left(lengths, kv_max)]
        equal = line.ns(mean)
        us = alpha * max(line.ns(kv_max) - equal, 0.0)
        us = us if alpha >= 0.0 else max(us, min(line.ns(kv_min) - equal, 0.0))
        return us, _skew_origin(alpha, mean, kv_max)

    def _block_row(self, n: int) -> DecodeRow:
        """One block for ``n`` decodes and nothing else over KV length, in µs, lengths taken as equal."""
        lengths = self.tables.attention.axes[3].tolist()
        return DecodeRow.through(lengths, self.decodes_us(n).tolist(), None, n)

    def _origin(self, chunk: int = 0, history: int = 0, n: int = 0, kv: int = 0) -> str:
        """How the table was asked, on the axes that matter to the step."""
        chunks, decodes, histories, lengths = self.tables.attention.axes
        parts = []
        if chunk:
            parts += [describe_axis(chunks, chunk, "chunk"), describe_axis(histories, history, "history")]
        if n:
            parts += [describe_axis(decodes, n, "decodes"), describe_axis(lengths, kv, "KV length")]
        files = " and ".join(f"{label}.csv" for label in self.tables.attentions or ("attention",))
        source = self.tables.attention_source or f"{self.tables.folder.name}/{files}"
        return f"{', '.join(parts)} in {source}"


def _skew_origin(alpha: float, mean: int, kv_max: int) -> str:
    return f"α {alpha:.4f} of the way from mean ({mean}) to greatest ({kv_max}) KV length, from the skew fit"
