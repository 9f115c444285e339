"""The shots of every table of a bundle: what names each row, and how to measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.profiler.bundle_writer import HEADERS
from servesim.profiler.measure.meter import AttentionBatch, Meter
from servesim.profiler.measure.table_file import Row

if TYPE_CHECKING:
    from servesim.profiler.job import ProfileJob
    from servesim.profiler.measure.grid import SkewShot, SweepGrid
    from servesim.profiler.measure.table_file import TableFile

CATEGORIES = ("dense", "per_sequence", "attention", "moe", "skew")
"""Parts of a sweep; each fills the table of its name."""
TABLE_HEADERS = {name: HEADERS[f"{name}.csv"] for name in CATEGORIES}
VALUES = {"skew": 4}
"""Columns of a table that hold results, where it is more than one."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One measurement: the rows it fills, without their results, and how to get these."""

    keys: tuple[Row, ...]
    measure: Callable[[Meter], list[Row]]
    """Results of each row, in the order of ``keys``."""


def shots(
    category: str, job: ProfileJob, grid: SweepGrid, kv_tokens: int, table: TableFile | None = None
) -> list[Shot]:
    """The shots of a category whose rows ``table`` does not have yet."""
    catalog = job.architecture.catalog
    found: list[Shot]
    if category == "dense":
        found = [_layers_shot(sorted(catalog.dense), count, table) for count in grid.tokens()]
    elif category == "per_sequence":
        found = [_heads_shot(sorted(catalog.per_sequence), count, table) for count in grid.sequences()]
    elif category == "attention":
        found = [_attention_shot(batch) for batch in grid.attention(kv_tokens)]
    elif category == "moe":
        points = grid.experts(job.model) if job.model.is_moe else []
        found = [_experts_shot(tokens, activated) for tokens, activated in points]
    else:
        memo: dict[AttentionBatch, float] = {}
        found = [_skew_shot(shot, memo) for shot in grid.skews(kv_tokens)]
    return [shot for shot in found if shot.keys and (table is None or shot.keys[0] not in table)]


def _missing(layers: list[str], count: int, table: TableFile | None) -> list[str]:
    return [layer for layer in layers if table is None or (layer, count) not in table]


def _layers_shot(layers: list[str], tokens: int, table: TableFile | None) -> Shot:
    missing = _missing(layers, tokens, table)

    def measure(meter: Meter) -> list[Row]:
        times = meter.layers_us(missing, tokens)
        return [(times[layer],) for layer in missing]

    return Shot(tuple((layer, tokens) for layer in missing), measure)


def _heads_shot(layers: list[str], sequences: int, table: TableFile | None) -> Shot:
    missing = _missing(layers, sequences, table)

    def measure(meter: Meter) -> list[Row]:
        times = meter.heads_us(missing, sequences)
        return [(times[layer],) for layer in missing]

    return Shot(tuple((layer, sequences) for layer in missing), measure)


def _attention_shot(batch: AttentionBatch) -> Shot:
    n, kv = batch.decodes[0] if batch.decodes else (0, 0)
    return Shot(((batch.chunk, batch.history, n, kv),), lambda meter: [(meter.attention_us(batch),)])


def _experts_shot(tokens: int, activated: int) -> Shot:
    return Shot(((tokens, activated),), lambda meter: [(meter.experts_us(tokens, activated),)])


def _skew_shot(shot: SkewShot, memo: dict[AttentionBatch, float]) -> Shot:
    """``memo`` keeps the times of equal lengths, which many shots share."""
    regime = "mixed" if shot.chunk else "pure"
    ratio = round(shot.long / shot.n, 4)
    key = (
        regime,
        shot.n,
        shot.long,
        ratio,
        shot.skew,
        shot.chunk,
        shot.history,
        shot.kv,
        shot.kv_long,
        shot.kv_mean,
    )

    def measure(meter: Meter) -> list[Row]:
        equal, longest, skewed = shot.batches()
        for batch in (equal, longest):
            if batch not in memo:
                memo[batch] = meter.attention_us(batch)
        skewed_us = meter.attention_us(skewed)
        room = memo[longest] - memo[equal]
        alpha = (skewed_us - memo[equal]) / room if room else 0.0
        return [(memo[equal], memo[longest], skewed_us, round(alpha, 4))]

    return Shot((key,), measure)
