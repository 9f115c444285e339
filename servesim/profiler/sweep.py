"""The sweep: every shot of every table of every degree, asked of a meter. All sources go through it.

What is computed stays in memory (:func:`computed_bundle`). What is measured is saved as it goes, in a random
order, and a sweep that was stopped goes on from there (:mod:`servesim.profiler.measure.bundle`).
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING

from servesim.errors import RunError
from servesim.profiler.bundle_writer import BundleContent, Row
from servesim.profiler.provenance import described
from servesim.profiler.shots import ALL_CATEGORIES, CATEGORIES, TABLE_HEADERS, VALUES, Shot, Table, shots
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from typing import TextIO

    from servesim.profiler.measure.progress import SweepProgress
    from servesim.profiler.measure.work_folder import TableFile
    from servesim.profiler.meter import Grid, Meter, ProfileJob

_SAVE_EVERY_S = 1.0
_SAVE_EVERY_ROWS = 32
_ORDER_SEED = 20
_NO_LIMIT = 1 << 62


@dataclass(slots=True)
class SweepReport:
    """What a sweep did."""

    measured: int = 0
    kept: int = 0
    seconds: float = 0.0


class MemoryTable:
    """The rows of a table that is computed; none is there twice and none is left out."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __contains__(self, row: Row) -> bool:
        return False

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows."""
        self.rows += rows


def computed_bundle(job: ProfileJob, meter: Meter) -> BundleContent:
    """All tables of one variant for every tensor-parallel degree, from a meter that computes.

    Raises:
        InputError: the source does not cover a layer, a shape or a degree.
    """
    content = BundleContent(meta={})
    for tp in job.tp_degrees:
        meter.start_rank(tp)
        grid = meter.grid()
        for category in wanted(job, ALL_CATEGORIES):
            table = MemoryTable()
            todo = shots(category, job, grid, meter.kv_capacity_tokens(), at_once=True, tp=tp)
            run_shots(todo, meter, table, f"tp{tp} {category}")
            if todo:
                content.tables[tp, f"{category}.csv"] = table.rows
        for label, rows in meter.other_attention().items():
            content.tables[tp, f"{label}.csv"] = rows
        if exchange := meter.exchange_rows():
            content.tables[tp, "exchange.csv"] = exchange
        if skew := meter.skew_rows():
            content.tables[tp, "skew_fit.csv"] = skew
    content.meta = described(job, meter.provenance(content))
    return content


def open_table(folder: Path, tp: int, category: str) -> TableFile:
    """The table of a category below the bundle folder, made where there is none."""
    from servesim.profiler.measure.work_folder import TableFile

    path = folder / f"tp{tp}" / f"{category}.csv"
    return TableFile(path, TABLE_HEADERS[category], VALUES.get(category, 1))


def sweep(
    job: ProfileJob,
    grid: Grid,
    meter: Meter,
    folder: Path,
    stream: TextIO,
    only: Sequence[str] = CATEGORIES,
) -> SweepReport:
    """Measure what the tables below ``folder`` lack; returns how many rows were measured and kept.

    Shots run in a random order (always the same one): the rate so far is then a fair guess of what is left,
    and a clock that drifts while the device warms up does not bend a curve.

    Raises:
        RunError: a shot gave no sensible time, or a table cannot be written.
    """
    from servesim.profiler.measure.progress import SweepProgress

    started_s = time.monotonic()
    report = SweepReport()
    parts = {f"tp{tp} {category}": (tp, category) for tp in job.tp_degrees for category in wanted(job, only)}
    planned = {}
    for part, (tp, category) in parts.items():
        table = open_table(folder, tp, category)
        report.kept += len(table.rows)
        planned[part] = len(shots(category, job, grid, _NO_LIMIT, table))
        table.close()
    progress = SweepProgress(stream, planned)
    try:
        for tp in job.tp_degrees:
            mine = {
                part: category for part, (degree, category) in parts.items() if degree == tp and planned[part]
            }
            if mine:
                report.measured += _sweep_rank(job, grid, meter, folder, tp, mine, progress)
    finally:
        progress.close()
    report.seconds = time.monotonic() - started_s
    return report


def _sweep_rank(
    job: ProfileJob,
    grid: Grid,
    meter: Meter,
    folder: Path,
    tp: int,
    parts: dict[str, str],
    progress: SweepProgress,
) -> int:
    meter.start_rank(tp)
    kv_tokens = meter.kv_capacity_tokens()
    measured = 0
    missing = {}
    for part, category in parts.items():
        table = open_table(folder, tp, category)
        missing[part] = shots(category, job, grid, kv_tokens, table)
        progress.replan(part, len(missing[part]))
        table.close()
    for part, category in parts.items():
        random.Random(_ORDER_SEED).shuffle(missing[part])
        table = open_table(folder, tp, category)
        try:
            measured += run_shots(missing[part], meter, table, part, progress)
        finally:
            table.close()
    return measured


def wanted(job: ProfileJob, only: Sequence[str]) -> list[str]:
    """The categories to measure, in the order of the tables; experts only where the model has them."""
    return [name for name in ALL_CATEGORIES if name in only and (name != "moe" or job.model.is_moe)]


def run_shots(
    todo: list[Shot], meter: Meter, table: Table, part: str, progress: SweepProgress | None = None
) -> int:
    """Ask the meter and keep what it says; rows are in the table within a second, also when interrupted."""
    rows: list[Row] = []
    measured = 0
    saved_s = time.monotonic()
    try:
        for shot in todo:
            before_s = time.monotonic()
            results = shot.measure(meter)
            for key, result in zip(shot.keys, results, strict=True):
                _check(part, key, result)
                rows.append((*key, *result))
            measured += len(shot.keys)
            now_s = time.monotonic()
            if progress is not None:
                progress.step(part, now_s - before_s)
            if now_s - saved_s >= _SAVE_EVERY_S or len(rows) >= _SAVE_EVERY_ROWS:
                table.append(rows)
                rows, saved_s = [], now_s
    finally:
        if rows:
            table.append(rows)
    return measured


def _check(part: str, key: Row, result: Row) -> None:
    if not all(math.isfinite(value) for value in result) or min(result[: max(1, len(result) - 1)]) < 0.0:
        raise RunError(f"{part}: shot {key} gave {result}; a time is a finite number that is not negative")
