"""A grid that fits a time budget: time a few shots of every table, take the finest grid that should fit."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.profiler.measure.progress import duration
from servesim.profiler.shots import shots
from servesim.profiler.sweep import wanted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from servesim.profiler.job import ProfileJob
    from servesim.profiler.measure.grid import SweepGrid
    from servesim.profiler.meter import Meter

COARSER = (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 4.0, 8.0)
"""Rungs: how much the attention axes' factors grow ..."""
COARSER_SKEW = (1.0, 2.0, 4.0, 4.0, 4.0, 8.0, None, None)
"""... and those of the skew sweep, which goes altogether on the last ones."""
_PILOTS = 6


def ladder(grid: SweepGrid) -> Iterator[SweepGrid]:
    """The grid, then coarser and coarser ones."""
    for growth, skew_growth in zip(COARSER, COARSER_SKEW, strict=True):
        skew = None if grid.skew_factor is None or skew_growth is None else grid.skew_factor * skew_growth
        yield replace(
            grid,
            chunk_factor=grid.chunk_factor * growth,
            decode_factor=grid.decode_factor * growth,
            kv_factor=grid.kv_factor * growth,
            skew_factor=skew,
        )


def grid_within(
    budget_s: float, job: ProfileJob, grid: SweepGrid, meter: Meter, only: Sequence[str], stream: TextIO
) -> SweepGrid:
    """The finest grid of the ladder whose sweep should take at most ``budget_s`` seconds.

    The first degree stands for all; pilots (:data:`_PILOTS` shots a table, not kept) count against the
    budget.

    Raises:
        InputError: the budget is not above zero.
    """
    if not budget_s > 0:
        raise InputError(f"--budget-s {budget_s:g}: is not allowed; must be above 0")
    started_s = time.monotonic()
    meter.start_rank(job.tp_degrees[0])
    kv_tokens = meter.kv_capacity_tokens()
    cost_s = {}
    for category in wanted(job, only):
        pilots = shots(category, job, grid, kv_tokens)
        random.Random(0).shuffle(pilots)
        pilots = pilots[:_PILOTS]
        for shot in pilots:  # a kernel's first call may compile it
            shot.measure(meter)
        before_s = time.monotonic()
        for shot in pilots:
            shot.measure(meter)
        cost_s[category] = (time.monotonic() - before_s) / max(len(pilots), 1)
    left_s = budget_s - (time.monotonic() - started_s)
    for candidate in ladder(grid):
        counts = {category: len(shots(category, job, candidate, kv_tokens)) for category in cost_s}
        guess_s = len(job.tp_degrees) * sum(counts[category] * cost_s[category] for category in counts)
        if guess_s <= left_s:
            break
    print(
        f"budget {duration(budget_s)}: {sum(counts.values())} shots a degree, about {duration(guess_s)}"
        f"{' (the coarsest grid there is)' if guess_s > left_s else ''}; {_axes(candidate)}",
        file=stream,
    )
    return candidate


def _axes(grid: SweepGrid) -> str:
    skew = "no skew sweep" if grid.skew_factor is None else f"skew factor {grid.skew_factor:g}"
    factors = (grid.chunk_factor, grid.decode_factor, grid.kv_factor)
    return "attention factors " + "/".join(f"{factor:g}" for factor in factors) + f", {skew}"
