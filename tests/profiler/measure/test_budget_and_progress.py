"""Grids that fit a time, and what a person is told meanwhile."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import pytest

from servesim.profiler.measure.bundle import grid_within, ladder
from servesim.profiler.measure.progress import SweepProgress, duration
from servesim.profiler.shots import CATEGORIES, shots
from tests.profiler.measure.fake_meter import FakeMeter, job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.meter import AttentionBatch


def _shots(grid: object) -> int:
    return sum(len(shots(name, job(), grid, 1 << 40)) for name in ("attention", "skew"))  # type: ignore[arg-type]


def test_every_rung_of_the_ladder_has_fewer_shots() -> None:
    from servesim.profiler.measure.grid import SweepGrid

    counts = [_shots(grid) for grid in ladder(SweepGrid())]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 50


def test_a_slow_device_gets_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    from servesim.profiler.measure.grid import SweepGrid

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Slow(FakeMeter):
        def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
            clock[0] += 0.1
            return super().attention_us(batches)

    told = io.StringIO()
    grid = SweepGrid(2048, 256, 16384)
    plenty = grid_within(1e9, job(), grid, Slow(), CATEGORIES, told)
    assert plenty == grid
    tight = grid_within(100.0, job(), grid, Slow(), CATEGORIES, told)
    # 0.1 s a call and at most three a skew shot: about 100 s / 0.1 s shots at most.
    assert len(shots("attention", job(), tight, 1 << 40)) <= 1000
    assert "budget 1 min 40 s" in told.getvalue()


def test_the_time_left_goes_by_each_parts_own_rate() -> None:
    progress = SweepProgress(io.StringIO(), {"a": 4, "b": 10, "c": 2})
    assert progress.left_s() == 0.0
    progress.step("a", 1.0)
    progress.step("a", 1.0)
    progress.step("b", 0.1)
    # a: 2 left at 1 s; b: 9 left at 0.1 s; c: 2 left at the mean of all, 0.7 s.
    assert progress.left_s() == pytest.approx(2 + 0.9 + 1.4)


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    told = io.StringIO()
    progress = SweepProgress(told, {"tp1 attention": 100})
    for _ in range(30):
        clock[0] += 1.0
        progress.step("tp1 attention", 1.0)
    assert told.getvalue().splitlines()[-1] == "tp1 attention: 30/100 shots, 30/100 in all, 1 min 10 s left"
    assert len(told.getvalue().splitlines()) == 3


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (3.21, 42.0, 75.0, 7260.0)] == ["3.2 s", "42 s", "1 min 15 s", "2 h 01 min"]
