"""A step taken apart: what every layer contributes, and where each number comes from."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.attention import DecodeRow
from servesim.cost.skew import skew_rate
from servesim.cost.tables import bracket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.step_timer import StepTimer
    from servesim.cost.tables import Ints


@dataclass(slots=True, frozen=True)
class LayerCost:
    """One line of the breakdown of a step."""

    layer: str
    calls: int
    """How often the step runs it."""
    us: float
    """µs of one call."""
    origin: str
    """Measured, interpolated, extrapolated or computed: from which rows or formula."""

    @property
    def total_us(self) -> float:
        """µs of all calls of the step."""
        return self.us * self.calls


def explain(
    timer: StepTimer, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
) -> list[LayerCost]:
    """The breakdown of ``timer.mixed_ns(chunks, n, kv_sum, kv_min, kv_max)``, in the order layers are listed.

    The totals add up to the step's time; rounding to whole ns is the only difference.
    """
    tokens = n + sum(chunk for chunk, _ in chunks)
    padded = int(timer.padded(np.array([tokens]))[0])
    costs = []
    for terms, count in ((timer.token_terms, padded), (timer.sequence_terms, n + len(chunks))):
        for term in terms:
            costs.append(
                LayerCost(term.name, term.calls, float(term.us(np.array([count]))[0]), term.origin(count))
            )
    mean = kv_sum // n if n else 0
    costs += _chunk_rows(timer, chunks, n, mean) if chunks else [_decode_row(timer, n, mean)]
    if chunks and timer.waits_for_longest and n > 1 and (tail_us := timer.tail_us(n, mean, kv_max)):
        origin = f"half of what a single decode of {kv_max} takes longer than one of the mean, {mean}"
        costs.append(LayerCost("attention: longest decode", timer.blocks, tail_us, origin))
    skew_us, alpha = _skew(timer, chunks, n, mean, kv_min, kv_max)
    if skew_us:
        origin = (
            f"α {alpha:.4f} of the way from mean ({mean}) to greatest ({kv_max}) KV length, from the skew fit"
        )
        costs.append(LayerCost("attention: unequal lengths", timer.blocks, skew_us, origin))
    name = "prefill_step_overhead_us" if chunks else "decode_step_overhead_us"
    overhead_us = getattr(timer.engine, name)
    if overhead_us:
        costs.append(LayerCost("host overhead", 1, overhead_us, f"engine.{name}"))
    return costs


def _decode_row(timer: StepTimer, n: int, mean: int) -> LayerCost:
    """Attention of a step of decodes alone, all of the mean length."""
    us = _decode_line(timer, n).ns(mean)
    return LayerCost("attention", timer.blocks, us, _attention_origin(timer, n=n, kv=mean))


def _chunk_rows(timer: StepTimer, chunks: Sequence[tuple[int, int]], n: int, mean: int) -> list[LayerCost]:
    """Attention of a step with chunks: in one look-up, or decodes first and what each chunk adds to them."""
    attention, blocks = timer.attention, timer.blocks
    corners = attention.corners(n, mean)
    if len(chunks) == 1 or not timer.engine.chunked_attention:
        chunk, history = sum(c for c, _ in chunks), sum(h for _, h in chunks)
        origin = _attention_origin(timer, chunk, history, n, mean)
        return [LayerCost("attention", blocks, attention.us(chunk, history, corners), origin)]
    base_us = timer.base_us(n, corners)
    rows = []
    if n:
        smallest = attention.smallest_chunk
        origin = _attention_origin(timer, smallest, 0, n, mean)
        rows.append(LayerCost("attention: decodes", blocks, base_us, origin))
    for chunk, history in chunks:
        us = attention.us(chunk, history, corners) - base_us
        origin = _attention_origin(timer, chunk, history, n, mean) + (", less the decodes" if n else "")
        rows.append(LayerCost(f"attention: {chunk}@{history}", blocks, us, origin))
    return rows


def _skew(
    timer: StepTimer, chunks: Sequence[tuple[int, int]], n: int, mean: int, kv_min: int, kv_max: int
) -> tuple[float, float]:
    """(µs per block that unequal lengths add, α)."""
    skew = timer.tables.skew
    if skew is None or n < 2 or mean == kv_max:
        return 0.0, 0.0
    rate = skew_rate(mean, kv_min, kv_max)
    if chunks:
        chunk, history = sum(c for c, _ in chunks), sum(h for _, h in chunks)
        return timer.skew_us(chunks, n, mean, kv_min, kv_max), skew.of(chunk, n, rate, kv_max, history)
    rates, lengths, alphas = skew.for_decodes(n)
    alpha = alphas[bisect_left(rates, rate)][bisect_left(lengths, kv_max)]
    line = _decode_line(timer, n)
    equal = line.ns(mean)
    us = alpha * max(line.ns(kv_max) - equal, 0.0)
    return (us if alpha >= 0.0 else max(us, min(line.ns(kv_min) - equal, 0.0))), alpha


def _decode_line(timer: StepTimer, n: int) -> DecodeRow:
    """Attention of one block for ``n`` decodes and nothing else over KV length, in µs."""
    lengths = timer.tables.attention.axes[3].tolist()
    return DecodeRow.through(lengths, timer.decode_attention_us(n).tolist(), None, n)


def _attention_origin(timer: StepTimer, chunk: int = 0, history: int = 0, n: int = 0, kv: int = 0) -> str:
    """How the attention tensor was asked, on the axes that matter to the step."""
    chunks, decodes, histories, lengths = timer.tables.attention.axes
    parts = []
    if chunk:
        parts += [_coordinate(chunks, chunk, "chunk"), _coordinate(histories, history, "history")]
    if n:
        parts += [_coordinate(decodes, n, "decodes"), _coordinate(lengths, kv, "KV length")]
    return f"{', '.join(parts)} in {timer.tables.folder.name}/attention.csv"


def _coordinate(points: Ints, query: int, name: str) -> str:
    """``KV length 1000 (between 768 and 1024)``; no bracket for a measured point."""
    if query in points:
        return f"{name} {query}"
    low, high, weight = bracket(points.tolist(), query)
    if weight > 1.0:
        return f"{name} {query} (extrapolated from {points[low]} and {points[high]})"
    held = low == high or query < points[0]
    return (
        f"{name} {query} (held at {points[low]})"
        if held
        else f"{name} {query} (between {points[low]} and {points[high]})"
    )
