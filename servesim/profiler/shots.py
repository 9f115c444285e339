"""The shots of every table of a bundle: what names each row, and what a meter is asked for it.

A shot is one call of a meter. A meter that measures gets one grid point a shot; one that computes gets all
points of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from servesim.profiler.bundle_writer import HEADERS, Row
from servesim.profiler.meter import AttentionBatch, Meter
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from servesim.profiler.measure.grid import SkewShot
    from servesim.profiler.meter import Grid, ProfileJob

_Point = TypeVar("_Point")

CATEGORIES = ("dense", "per_sequence", "attention", "moe", "skew")
"""Parts of a sweep that can be measured; each fills the table of its name."""
ALL_CATEGORIES = (*CATEGORIES, "comm")
"""Parts of a sweep; so far only sources that compute fill comm.csv."""
TABLE_HEADERS = {name: HEADERS[f"{name}.csv"] for name in ALL_CATEGORIES}
VALUES = {"skew": 4}
"""Columns of a table that hold results, where it is more than one."""


class Table(Protocol):
    """Where rows go: in memory, or in a file that survives a kill."""

    def __contains__(self, row: Row) -> bool:
        """Whether the shot of a row (or of its key columns alone) is there."""

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One call of a meter: the rows it fills, without their results, and how to get these."""

    keys: tuple[Row, ...]
    measure: Callable[[Meter], list[Row]]
    """Results of each row, in the order of ``keys``."""


def shots(
    category: str,
    job: ProfileJob,
    grid: Grid,
    kv_tokens: int,
    table: Table | None = None,
    at_once: bool = False,
    tp: int = 1,
) -> list[Shot]:
    """The shots of a category whose rows ``table`` lacks; ``at_once``: one shot for all points."""
    catalog, model = job.architecture.catalog, job.model
    found: list[Shot]
    if category == "dense":
        pieces = _pieces(grid.tokens(), at_once)
        found = [_layers_shot(catalog.dense, counts, table, heads=False) for counts in pieces]
    elif category == "per_sequence":
        pieces = _pieces(grid.sequences(), at_once)
        found = [_layers_shot(catalog.per_sequence, counts, table, heads=True) for counts in pieces]
    elif category == "attention":
        found = [_attention_shot(batches) for batches in _pieces(grid.attention(kv_tokens), at_once)]
    elif category == "moe":
        points = grid.experts(model) if model.is_moe else []
        found = [_experts_shot(some) for some in _pieces(points, at_once)]
    elif category == "skew":
        memo: dict[AttentionBatch, float] = {}
        found = [_skew_shot(shot, memo) for shot in grid.skews(kv_tokens)]
    else:
        found = [_all_reduce_shot(tp, payloads) for payloads in _pieces(grid.payloads(), at_once)]
    return [shot for shot in found if shot.keys and (table is None or shot.keys[0] not in table)]


def _all_reduce_shot(ranks: int, payloads: Sequence[int]) -> Shot:
    return Shot(
        tuple(("all_reduce", ranks, payload) for payload in payloads),
        lambda meter: [(time,) for time in meter.all_reduce_us(payloads)],
    )


def _pieces(points: Sequence[_Point], at_once: bool) -> list[Sequence[_Point]]:
    return [points] if at_once and points else [points[i : i + 1] for i in range(len(points))]


def _layers_shot(
    catalog: Mapping[str, object], counts: Sequence[int], table: Table | None, *, heads: bool
) -> Shot:
    """Every layer that lacks a row at one of ``counts``; these are one count unless the table is empty."""
    missing = [
        layer
        for layer in sorted(catalog)
        if table is None or any((layer, count) not in table for count in counts)
    ]

    def measure(meter: Meter) -> list[Row]:
        times = (meter.heads_us if heads else meter.layers_us)(missing, counts)
        return [(float(time),) for layer in missing for time in times[layer]]

    return Shot(tuple((layer, count) for layer in missing for count in counts), measure)


def _attention_shot(batches: Sequence[AttentionBatch]) -> Shot:
    return Shot(
        tuple(batch.point for batch in batches),
        lambda meter: [(time,) for time in meter.attention_us(batches)],
    )


def _experts_shot(points: Sequence[tuple[int, int]]) -> Shot:
    return Shot(tuple(points), lambda meter: [(time,) for time in meter.experts_us(points)])


def _skew_shot(shot: SkewShot, memo: dict[AttentionBatch, float]) -> Shot:
    """``memo`` keeps the times of equal lengths, which many shots share."""
    ratio = round(shot.long / shot.n, 4)
    key = (
        "pure" if shot.chunk == 0 else "mixed",
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
                (memo[batch],) = meter.attention_us([batch])
        (skewed_us,) = meter.attention_us([skewed])
        room = memo[longest] - memo[equal]
        alpha = (skewed_us - memo[equal]) / room if room else 0.0
        return [(memo[equal], memo[longest], skewed_us, round(alpha, 4))]

    return Shot((key,), measure)
