"""The points a sweep measures."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.profiler.measure.grid import SkewShot, SweepGrid, geometric
from servesim.profiler.meter import AttentionBatch
from servesim.specs.model import load_model
from tests.recorded import recorded_path


def test_a_doubling_axis_ends_at_its_limit() -> None:
    assert geometric(1, 20, 2.0) == [1, 2, 4, 8, 16, 20]
    assert geometric(16, 16, 2.0) == [16]


@given(st.integers(1, 50), st.integers(0, 5000), st.floats(1.05, 20))
def test_an_axis_rises_from_its_first_point_to_its_last(first: int, more: int, factor: float) -> None:
    grid = geometric(first, first + more, factor)
    assert (grid[0], grid[-1]) == (first, first + more)
    assert grid == sorted(set(grid))


def test_a_decode_reads_its_own_key_too() -> None:
    assert AttentionBatch(0, 0, ((3, 16),)).kv_tokens == 3 * 17
    assert AttentionBatch(32, 100, ((1, 200),)).longest == 201


def test_every_chunk_and_history_stands_beside_every_decode() -> None:
    grid = SweepGrid(32, 2, 1024, kv_factor=64.0)
    # kv 16, 1024; n 1, 2; chunk 16, 32; history 0, 512, 1024
    assert len(grid.attention(1 << 40)) == 4 + 2 * 3 * (1 + 4)


def test_what_memory_cannot_hold_is_left_out() -> None:
    grid = SweepGrid(32, 8, 1024)
    assert all(batch.kv_tokens <= 600 for batch in grid.attention(600))
    assert 0 < len(grid.attention(600)) < len(grid.attention(1 << 40))
    assert all(max(b.kv_tokens for b in shot.batches()) <= 600 for shot in grid.skews(600))


def test_experts_are_touched_by_at_most_all_slots() -> None:
    points = SweepGrid(8, 8, 64).experts(load_model("servesim/tiny-moe"))  # 8 experts, 2 a token
    assert points == [(1, 2), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8), (8, 2), (8, 4), (8, 8)]


def test_a_skew_shot_has_three_batches_of_the_same_chunk() -> None:
    shot = SkewShot(n=4, long=1, skew=4.0, chunk=16, history=512, kv=128)
    assert (shot.kv_long, shot.kv_mean) == (512, 224)
    equal, longest, skewed = shot.batches()
    assert equal.decodes == ((4, 224),)
    assert longest.decodes == ((4, 512),)
    assert skewed.decodes == ((3, 128), (1, 512))
    assert {(b.chunk, b.history) for b in (equal, longest, skewed)} == {(16, 512)}


def test_the_skew_sweep_can_be_switched_off() -> None:
    assert SweepGrid(skew_factor=None).skews(1 << 40) == []


def test_a_factor_that_does_not_grow_is_refused() -> None:
    with pytest.raises(InputError, match="--kv-factor 1: is not allowed"):
        SweepGrid(kv_factor=1.0)


def test_the_default_skew_sweep_covers_a_recorded_one() -> None:
    path = recorded_path("perf", "RTXPRO6000", "meta-llama", "Llama-3.1-8B", "bf16", "tp1", "skew.csv")
    with path.open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["skew"] == "4.0"]
    names = ("n", "nb", "pc", "kp", "kvs")
    recorded = {tuple(int(row[name]) for name in names) for row in rows}
    ours = {(s.n, s.long, s.chunk, s.history, s.kv) for s in SweepGrid().skews(1 << 40)}
    assert recorded <= ours
    by_shot = {(s.n, s.long, s.chunk, s.history, s.kv): s for s in SweepGrid().skews(1 << 40)}
    for row in rows[::97]:
        shot = by_shot[tuple(int(row[name]) for name in names)]
        assert (str(shot.kv_long), str(shot.kv_mean)) == (row["kv_big"], row["kv_mean"])
