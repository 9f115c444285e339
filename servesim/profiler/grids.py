"""Where a bundle samples each layer, so that linear interpolation between samples stays true to it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from servesim.profiler.meter import AttentionBatch
from servesim.slotted import dataclass
from servesim.specs.layers import Attention, Recurrent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.profiler.measure.grid import SkewShot
    from servesim.profiler.meter import ProfileJob
    from servesim.specs.layers import AnyAttention
    from servesim.specs.model import ModelSpec

Windows = tuple[tuple[int | None, float], ...]
"""Attention windows of a model's blocks (None: the whole context), each with its share of them."""

HISTORY = (0, 2048, 16384, 131072)
"""Histories of a chunk: its cost is close to linear in them, so a few points carry it."""
MAX_DECODE_TOKENS = 1 << 23
"""KV tokens that all decodes of a step may have together: beyond, time is proportional to them."""
UNSAMPLED = (2,)
"""Numbers of decodes without samples beside chunks: time is close to linear around them."""
SHORT_TOKENS = 256
CHUNK_TOLERANCE = 0.02
MOST_CHUNKS = 26
STAIR_TOKENS = 2048
"""Up to here every step of the GEMMs' staircase has a sample on both of its sides."""


def doubling(first: int, last: int) -> list[int]:
    """``first``, twice that, and so on up to ``last``; ``last`` itself is always there."""
    grid, value = [], first
    while value < last:
        grid.append(value)
        value *= 2
    return [*grid, last]


def chunk_grid(last: int) -> list[int]:
    """Prefill chunks: doubling to 512, then a point between (their cost is quadratic), up to ``last``."""
    fine = [value for base in doubling(512, max(512, last)) for value in (base, base * 3 // 2)]
    return sorted({*doubling(16, last), *(value for value in fine if value < last)})


def refined(grid: list[int], time_us: Callable[[int], float], tolerance: float, most: int) -> list[int]:
    """``grid`` with points added where linear interpolation misses ``time_us`` most, steps from both sides.

    Stops when no multiple of 16 (nor the count after it) is off by more than ``tolerance``, or at ``most``
    points.
    """
    sides = {count for edge in range(16, grid[-1], 16) for count in (edge, edge + 1)}
    counts = np.array(sorted({*sides, *grid}))
    times = np.array([time_us(int(count)) for count in counts])
    points = sorted(grid)
    while len(points) < most:
        known = times[np.searchsorted(counts, points)]
        error = np.abs(np.interp(counts, points, known) / times - 1.0)
        worst = int(error.argmax())
        if error[worst] <= tolerance:
            break
        points = sorted({*points, int(counts[worst])})
    return points


def token_grid(last: int) -> list[int]:
    """Token counts of the dense layers, up to ``last``.

    GEMMs work on tiles: single tokens to 17, both sides of every multiple of 16 to 128, of 32 to
    256 and of 128 to 2048, whole multiples of 512 beyond. The last interval is a whole number of tiles, so
    extrapolating above the grid follows the slope of the staircase and not one of its treads.
    """
    edges = [*range(16, 128, 16), *range(128, 256, 32), *range(256, STAIR_TOKENS, 128)]
    grid = set(range(1, 18))
    for edge in edges:
        grid |= {edge, edge + 1}  # both sides of the step
    grid |= set(range(STAIR_TOKENS, last, 512))
    if last <= STAIR_TOKENS:
        grid.discard(max((edge for edge in edges if 256 <= edge < last), default=-1) + 1)
    return sorted({last, *(tokens for tokens in grid if tokens < last)})


@dataclass(frozen=True, slots=True)
class AttentionGrid:
    """Axes of attention.csv; decodes whose tokens exceed ``max_tokens`` together are left out."""

    chunks: list[int]
    histories: list[int]
    decodes: list[int]
    lengths: list[int]
    max_tokens: int = MAX_DECODE_TOKENS

    def lengths_for(self, decodes: int) -> list[int]:
        """KV lengths of ``decodes`` sequences: at least the first six, then all that could fit a memory."""
        feasible = [kv for kv in self.lengths if kv * decodes <= self.max_tokens]
        return max(feasible, self.lengths[:6], key=len)

    def _beside_chunks(self, decodes: int) -> list[int]:
        """The lengths that are sampled beside chunks, where short ones hardly tell."""
        lengths = self.lengths_for(decodes)
        return [kv for kv in lengths if kv in (lengths[0], lengths[-1]) or kv >= SHORT_TOKENS]

    def rows(self) -> list[tuple[int, int, int, int]]:
        """Every (prefill_chunk, kv_prefill, n_decode, kv_decode) of the table, sorted."""
        decodes = [(n, kv) for n in self.decodes for kv in self.lengths_for(n)]
        rows = [(0, 0, n, kv) for n, kv in decodes]
        decodes = [(n, kv) for n in self.decodes if n not in UNSAMPLED for kv in self._beside_chunks(n)]
        for chunk in self.chunks:
            for history in self.histories:
                rows.append((chunk, history, 0, 0))
                rows += [(chunk, history, n, kv) for n, kv in decodes]
        return rows


def attention_grid(
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_kv: int,
    prefill_us: Callable[[int], float] | None = None,
) -> AttentionGrid:
    """Axes that double, up to the engine's limits; chunks follow the steps of ``prefill_us`` if given."""
    chunks = chunk_grid(max(16, max_num_batched_tokens))
    if prefill_us is not None:
        chunks = refined(chunks, prefill_us, CHUNK_TOLERANCE, MOST_CHUNKS)
    return AttentionGrid(
        chunks=chunks,
        histories=sorted({history for history in HISTORY if history < max_kv} | {max_kv}),
        decodes=doubling(1, max(1, max_num_seqs)),
        lengths=doubling(16, max(16, max_kv)),
    )


def attention_batches(
    limits: tuple[int, int, int], windows: Windows, prefill_us: Callable[[int], float] | None = None
) -> tuple[AttentionBatch, ...]:
    """Batches of a computed attention.csv, sorted, as :func:`attention_grid` places them.

    ``limits``: tokens of a step, sequences, KV length. A window has a point of its own on the axes: the time
    bends where it is full.
    """
    grid = attention_grid(*limits, prefill_us)
    edges = {window for window, _ in windows if window is not None and 16 < window < limits[2]}
    if edges:
        lengths, histories = ({*axis, *edges} for axis in (grid.lengths, grid.histories))
        grid = replace(grid, lengths=sorted(lengths), histories=sorted(histories))
    return tuple(
        AttentionBatch(chunk, history, ((n, kv),) if n else ()) for chunk, history, n, kv in grid.rows()
    )


def _behind(prefill_us: Callable[[int, int], float], history: int, chunk: int) -> float:
    return prefill_us(chunk, history)


def kind_batches(
    limits: tuple[int, int, int],
    attention: AnyAttention,
    prefill_us: Callable[[int, int], float] | None = None,
) -> tuple[AttentionBatch, ...]:
    """Batches of the table of one kind of attention: only as long as its times change.

    A state's do not change with the context at all, those of a window not beyond twice the window.
    """
    tokens, sequences, longest = limits
    if isinstance(attention, Recurrent):
        grid = attention_grid(tokens, sequences, 16, partial(_behind, prefill_us, 0) if prefill_us else None)
        grid = replace(grid, histories=[0], lengths=[16])
    else:
        reach = attention.reach if isinstance(attention, Attention) else None
        history = HISTORY[1] if reach is None else min(reach, longest)
        along = partial(_behind, prefill_us, history) if prefill_us else None
        grid = attention_grid(tokens, sequences, longest, along)
        if reach is not None and reach < longest:
            lengths = sorted({*(kv for kv in grid.lengths if kv < 2 * reach), reach, 2 * reach, longest})
            lengths = [kv for kv in lengths if kv <= longest]
            grid = replace(grid, histories=sorted({0, reach, longest}), lengths=lengths, max_tokens=1 << 62)
    return tuple(
        AttentionBatch(chunk, history, ((n, kv),) if n else ()) for chunk, history, n, kv in grid.rows()
    )


@dataclass(frozen=True, slots=True)
class ComputedGrid:
    """Where a computed bundle is sampled: as finely as interpolation needs, since points cost no device."""

    job: ProfileJob
    batches: tuple[AttentionBatch, ...]
    all_reduces: Sequence[int] = ()

    def tokens(self) -> list[int]:
        return token_grid(self.job.max_num_batched_tokens)

    def sequences(self) -> list[int]:
        return token_grid(self.job.max_num_seqs)

    def attention(self, kv_tokens: int) -> Sequence[AttentionBatch]:
        """All of them: no memory has to hold what is computed."""
        del kv_tokens
        return self.batches

    def experts(self, model: ModelSpec) -> list[tuple[int, int]]:
        """T tokens with k experts each touch k to min(E, T k)."""
        top = model.num_experts_per_tok
        return [
            (tokens, activated)
            for tokens in doubling(1, self.job.max_num_batched_tokens)
            for activated in doubling(top, min(model.num_experts, tokens * top))
        ]

    def skews(self, kv_tokens: int) -> list[SkewShot]:
        """None: where the formulas know what unequal lengths cost, they give skew_fit.csv at once."""
        del kv_tokens
        return []

    def payloads(self) -> Sequence[int]:
        return self.all_reduces
