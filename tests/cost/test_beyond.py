"""How measured times go on beyond their last point."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.cost.attention_lookup import AttentionTensor, DecodeRow
from servesim.cost.beyond import chunk_growth, pairs, slope_beyond
from servesim.cost.tables import Surface, densify
from servesim.results.stated_errors import BEYOND_MEASURED
from tests.profiler.silicon_data import needs_silicon
from tests.recorded import recorded_path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import held_out

CHUNKS, HISTORIES = np.array([16, 64, 256, 1024, 2048]), np.array([0, 512, 4096, 16384])


def chunk_us(chunk: float, history: float) -> float:
    """5 us, 10 ns a token, 20 ps a pair, 1 ns a token of history."""
    return 5 + 0.01 * chunk + 2e-5 * pairs(chunk, history) + 0.001 * history


def attention() -> Surface:
    """Chunks as above and 2 us + 3 us a decode + 4 ns a token of KV, side by side."""
    rows = {}
    for n, kv in [(0, 0), *product((1, 4, 64), (16, 1024, 8192))]:
        decodes = 2 + 3 * n + 0.004 * n * kv if n else 0.0
        if n:
            rows[0, n, 0, kv] = decodes
        for chunk, history in product(CHUNKS.tolist(), HISTORIES.tolist()):
            rows[chunk, n, history, kv] = decodes + chunk_us(chunk, history)
    return densify(np.array(list(rows)), np.array(list(rows.values())))


def test_tokens_and_pairs_of_a_chunk_are_told_apart() -> None:
    us = np.array([[chunk_us(c, h) for h in HISTORIES] for c in CHUNKS])
    assert chunk_growth(CHUNKS, HISTORIES, us) == pytest.approx((0.01, 2e-5), rel=1e-9)
    assert chunk_growth(CHUNKS, HISTORIES[:1], us[:, :1]) == pytest.approx((0.01, 2e-5), rel=1e-9)


def test_a_chunk_never_gains_by_tokens_or_pairs() -> None:
    falls = np.array([[9.0 - c / 1e3] for c in CHUNKS])
    assert chunk_growth(CHUNKS, HISTORIES[:1], falls) == (0.0, 0.0)
    bends = np.array([[c**0.5] for c in CHUNKS.tolist()])  # less and less a token
    token_us, pair_us = chunk_growth(CHUNKS, HISTORIES[:1], bends)
    assert token_us > 0
    assert pair_us == 0


def test_a_single_chunk_goes_on_in_proportion() -> None:
    assert chunk_growth(CHUNKS[:1], HISTORIES, np.full((1, 4), 8.0)) == (0.5, 0.0)


def test_four_times_the_largest_chunk_is_computed_by_its_pairs() -> None:
    tensor = AttentionTensor(attention())
    alone, beside = tensor.corners(0, 0), tensor.corners(4, 1024)
    for history in (0, 300, 40_000):
        assert tensor.us(8192, history, alone) == pytest.approx(chunk_us(8192, history), rel=1e-9)
    assert tensor.us(8192, 512, beside) == pytest.approx(2 + 12 + 0.004 * 4096 + chunk_us(8192, 512))


def test_decodes_go_on_along_number_and_length_at_once() -> None:
    tensor = AttentionTensor(attention())
    for n, kv in ((64, 50_000), (500, 1024), (500, 50_000)):
        expected = 2 + 3 * n + 0.004 * n * kv + chunk_us(256, 512)
        assert tensor.us(256, 512, tensor.corners(n, kv)) == pytest.approx(expected, rel=1e-9)


@given(st.sampled_from([1, 3, 64, 100, 999]), st.sampled_from([16, 500, 8192, 9000, 400_000]),
       st.sampled_from([16, 20, 2048, 2500, 60_000]), st.sampled_from([0, 5, 16384, 20_000]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_more_of_anything_takes_no_less_beyond(n: int, kv: int, chunk: int, history: int) -> None:
    tensor = AttentionTensor(attention())
    us = tensor.us(chunk, history, tensor.corners(n, kv))
    assert tensor.us(2 * chunk, history, tensor.corners(n, kv)) >= us
    assert tensor.us(chunk, 2 * history, tensor.corners(n, kv)) >= us
    assert tensor.us(chunk, history, tensor.corners(2 * n, kv)) >= us
    assert tensor.us(chunk, history, tensor.corners(n, 2 * kv)) >= us


def test_noise_of_the_last_point_is_not_multiplied() -> None:
    lengths = [1024 * i for i in range(1, 17)]
    us = [10 + 0.01 * length for length in lengths]
    us[-1] += 2.0  # 1.2 %
    row = DecodeRow.through(lengths, us, None, 8)
    assert row.ns(16 * 16384) == pytest.approx(10 + 0.01 * 16 * 16384, rel=0.05)
    assert (us[-1] - us[-2]) / 1024 > 1.19 * float(slope_beyond(np.array(lengths), np.array(us))) / 1.05


def test_recorded_chunks_twice_as_long_are_foretold() -> None:
    recorded_path("perf")
    found = {kind: np.array(errors[2]) for kind, errors in held_out.chunks_beyond().items()}
    for kind, most in (("a chunk, by tokens", 8.0), ("a chunk beside decodes, by tokens", 12.0)):
        before, now = np.percentile(abs(found[kind]), 80, axis=0)
        assert now < most < before / 3


@needs_silicon
def test_decodes_beyond_a_measured_table_lie_in_the_band() -> None:
    found = held_out.beyond(held_out.public(["H100"]))
    for cut in held_out.CUTS:
        errors = np.array(found["decodes, by KV length"][cut])[:, 1]
        assert np.percentile(abs(errors), 80) < 100 * BEYOND_MEASURED
    before, now = np.percentile(np.abs(found["products, by rows"][8]), 80, axis=0)
    assert now < before / 3
