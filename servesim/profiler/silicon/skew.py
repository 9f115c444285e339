"""What decodes of unequal KV length cost under FlashAttention-2, predicted from how its blocks reach the SMs.

The simulator charges ``t(mean) + α (t(max) - t(mean))``. α comes from running three launches through the same
model, one with the unequal lengths, one with all at their mean, one with all at their greatest:

- decodes alone: one block per sequence and KV head, all reading at an equal share of the DRAM bandwidth; a
  long sequence that is left at the end reads on alone, as fast as one block can. While the kernel splits
  sequences into pieces to fill the SMs, every sequence is cut into the same number of pieces and unequal
  lengths cost nothing;
- beside a prefill chunk: the blocks of :mod:`servesim.profiler.silicon.attention`'s joint launch.

FlashInfer cuts the KV of all sequences into equal pieces when it plans a step, so it needs no such table.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.profiler.silicon.attention import TILE_ROWS, AttentionShape, attention_times
from servesim.profiler.silicon.list_schedule import repeated_makespan_us, shared_stream_us
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.profiler.bundle_writer import Row
    from servesim.profiler.silicon.attention import AttentionTimes
    from servesim.profiler.silicon.tables import Gpu

SPLIT_TOKENS = 128
"""KV tokens of one inner step; a sequence is split into whole numbers of them."""
MOST_SPLITS = 128

_DECODES = (2, 4, 8, 16, 32, 64, 128, 256)
_RATES = {"sr<=5%": 0.03, "sr<=15%": 0.1, "sr<=40%": 0.27, "sr<=70%": 0.55, "sr>70%": 0.85}
_LONGEST = {"kvB<=1k": 512, "kvB<=4k": 2048, "kvB<=16k": 8192, "kvB>16k": 32768}
_HISTORIES = {"kp=0": 0, "kp<=2k": 1024, "kp>2k": 8192}
_CHUNKS = (128, 512, 2048)
_SPREADS = (1 / 16, 1 / 3)
"""Shortest over longest sequence of the batches that every bucket is averaged over."""
_ORDERS = 2
"""Random orders of each of them: who is started last decides how long the end of a launch drags on."""

BUCKET_AXES: dict[str, Any] = {
    "n_bins": [0, *_DECODES, 1000000],
    "n_labels": [*(f"n<={n}" for n in _DECODES), f"n>{_DECODES[-1]}"],
    "skew_rate_bins": [-0.01, 0.05, 0.15, 0.4, 0.7, 1.01],
    "skew_rate_labels": list(_RATES),
    "kv_big_bins": [0, 1024, 4096, 16384, 1000000000],
    "kv_big_labels": list(_LONGEST),
    "kp_bins": [-1, 0, 2048, 1000000000],
    "kp_labels": list(_HISTORIES),
}
"""Buckets of skew_fit.csv beside the chunk ``pc``, as meta.yaml states them."""


def num_splits(blocks: int, sm_count: int, longest: int) -> int:
    """Pieces that FlashAttention-2 cuts every sequence into so that ``blocks`` blocks fill the SMs.

    One when they are enough for 80 % of two waves; else the fewest pieces whose waves are filled at least 85
    % as well as with the best number (the heuristic of its split-KV kernel).
    """
    room = 2 * sm_count
    if blocks >= 0.8 * room:
        return 1
    steps = math.ceil(longest / SPLIT_TOKENS)
    filled: dict[int, float] = {}
    for pieces in range(1, min(MOST_SPLITS, room, steps) + 1):
        if pieces == 1 or math.ceil(steps / pieces) != math.ceil(steps / (pieces - 1)):
            waves = blocks * pieces / room
            filled[pieces] = waves / math.ceil(waves)
    best = max(filled.values())
    return next(pieces for pieces, share in filled.items() if share >= 0.85 * best)


@lru_cache(maxsize=8)
def block_token_us(gpu: Gpu, head_dim: int) -> float:
    """Time in which one block of the split-KV kernel gets through one KV token when nothing else holds it up.

    From single sequences over a single KV head: the two longest that fit half of L2 differ in the tokens of
    each of their pieces, which run at the same time.
    """
    times = attention_times(gpu, AttentionShape(4, 1, head_dim, "bfloat16"))
    fit = 0.5 * gpu.l2_bytes / times.shape.kv_bytes(1, 1)
    shorter, longer = [length for length in times.measured_lengths(1) if length <= fit][-2:]
    pieces = [length / num_splits(1, gpu.sm_count, length) for length in (shorter, longer)]
    return (times.measured_us(1, longer) - times.measured_us(1, shorter)) / (pieces[1] - pieces[0])


def unequal_lengths(decodes: int, rate: float, longest: int, spread: float, seed: int) -> list[int]:
    """A batch in random order, greatest length ``longest``, ``(mean - min) / (max - min)`` near ``rate``.

    Quantiles of a power law on [spread·longest, longest]; both ends are there.
    """
    shortest = longest * spread
    power = 1.0 / rate - 1.0
    inner = [shortest + (longest - shortest) * ((i + 0.5) / decodes) ** power for i in range(1, decodes - 1)]
    lengths = [round(length) for length in (shortest, *inner, longest)]
    random.Random(seed).shuffle(lengths)
    return lengths


@dataclass(frozen=True, slots=True)
class SkewModel:
    """α of one attention shape on one GPU."""

    times: AttentionTimes
    token_us: float

    def alone_us(self, lengths: Sequence[int]) -> float:
        """Decodes of these lengths and nothing else, unsplit."""
        shape, gpu = self.times.shape, self.times.gpu
        token_bytes = shape.kv_bytes(1, 1) / shape.kv_heads
        rate = token_bytes / self.token_us
        start_bytes = self.times.tile_start_us * rate
        work = [start_bytes + token_bytes * length for length in lengths] * shape.kv_heads
        return shared_stream_us(work, gpu.sm_count, rate, self.times.bandwidth_bytes_s * 1e-6)

    def beside_us(self, chunk: int, history: int, lengths: Sequence[int]) -> float:
        """Decodes of these lengths in one launch with a chunk."""
        tiles = math.ceil(chunk / TILE_ROWS)
        attended = [history + min((tile + 1) * TILE_ROWS, chunk) for tile in reversed(range(tiles))]
        start, token = self.times.tile_start_us, self.times.tile_token_us
        blocks = [start + token * tokens for tokens in (*attended, *lengths)]
        return repeated_makespan_us(blocks, self.times.shape.heads, self.times.gpu.sm_count)

    def alpha(self, chunk: int, history: int, decodes: int, rate: float, longest: int) -> tuple[float, int]:
        """Weighted least-squares α over the batches of one bucket, and how many they are.

        All are of the bucket's greatest size, which is one that attention.csv holds: α is what unequal
        lengths add to a line between its rows, and not to another size's equal lengths, which may fill their
        waves worse or better than the rows on both sides do. Kept within [0, 1].
        """
        launch: Callable[[Sequence[int]], float] = self.alone_us
        if chunk:
            launch = partial(self.beside_us, chunk, history)
        elif num_splits(decodes * self.times.shape.kv_heads, self.times.gpu.sm_count, longest) > 1:
            return 0.0, 0
        greatest_us = launch([longest] * decodes)
        gained = weight = 0.0
        for spread in _SPREADS:
            for seed in range(_ORDERS):
                lengths = unequal_lengths(decodes, rate, longest, spread, seed)
                mean_us = launch([round(sum(lengths) / decodes)] * decodes)
                gap = greatest_us - mean_us
                gained += (launch(lengths) - mean_us) * gap
                weight += gap * gap
        alpha = gained / weight if weight else 0.0
        return min(1.0, max(0.0, alpha)), len(_SPREADS) * _ORDERS


def skew_rows(times: AttentionTimes, max_chunk: int, max_seqs: int) -> list[Row]:
    """Rows of skew_fit.csv: chunk, labels (n, skew rate, greatest KV, history), α, batches behind it."""
    model = SkewModel(times, block_token_us(times.gpu, times.shape.head_dim))
    chunks = [chunk for chunk in _CHUNKS if chunk < max_chunk]
    places = [(0, "kp=0")] + [(chunk, kp) for chunk in (*chunks, max_chunk) for kp in _HISTORIES]
    rows: list[Row] = []
    for chunk, kp in places:
        for decodes in _DECODES:
            if decodes >= 2 * max_seqs:
                continue
            for sr, rate in _RATES.items():
                if decodes == 2 and sr != "sr<=70%":  # two sequences always have a rate of one half
                    continue
                for kv_big, longest in _LONGEST.items():
                    alpha, samples = model.alpha(chunk, _HISTORIES[kp], decodes, rate, longest)
                    rows.append((chunk, f"n<={decodes}", sr, kv_big, kp, round(alpha, 4), samples))
    last = f"n>{_DECODES[-1]}"
    widest = f"n<={_DECODES[-1]}"
    return rows + [(row[0], last, *row[2:]) for row in rows if row[1] == widest]


def skew_summary(rows: list[Row]) -> dict[str, Any]:
    """What meta.yaml says about one degree's table."""
    alphas = [row[5] for row in rows if row[6]]
    return {
        "method": "list scheduling of thread blocks (derived, not measured)",
        "n_samples": sum(row[6] for row in rows),
        "alpha_default": round(float(np.median(alphas)), 4) if alphas else 0.0,
    }
