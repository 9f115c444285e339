from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.cost.skew import SkewTable, skew_rate
from tests.cost.bundles import Toy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def table(root: Path) -> SkewTable:
    rows = [
        (0, "n<=2", "sr<=50%", "kvB<=100", "kp=0", 0.5),
        (0, "n<=8", "sr>50%", "kvB>100", "kp=0", -0.1),
        (16, "n<=2", "sr<=50%", "kvB<=100", "kp=0", 0.6),
        (64, "n<=2", "sr<=50%", "kvB<=100", "kp>0", 0.7),
    ]
    skew = Toy(skew=rows).bundle(root).tables(1).skew
    assert skew is not None
    return skew


def test_a_bucket_includes_its_upper_bound(table: SkewTable) -> None:
    assert table.of(0, 2, 0.5, 100, 0) == 0.5
    assert table.of(0, 3, 0.51, 101, 0) == -0.1


def test_a_bucket_without_rows_takes_the_default(table: SkewTable) -> None:
    assert table.of(0, 9, 0.5, 100, 0) == 0.25


def test_beyond_the_last_bound_lies_the_last_bucket(table: SkewTable) -> None:
    assert table.of(0, 8, 7.0, 10**12, 0) == -0.1
    assert table.of(10**6, 2, -3.0, 1, 10**12) == 0.7


def test_a_chunk_between_profiled_ones_takes_the_larger(table: SkewTable) -> None:
    assert table.of(16, 2, 0, 1, 0) == 0.6
    assert table.of(15, 2, 0, 1, 0) == 0.6
    assert table.of(17, 2, 0, 1, 1) == 0.7


def test_a_step_of_decodes_sees_the_same_numbers(table: SkewTable) -> None:
    rates, lengths, alpha = table.for_decodes(8)
    assert (rates, lengths) == ([0.5], [100])
    assert alpha == [[table.of(0, 8, r, k, 0) for k in (100, 101)] for r in (0.5, 0.6)]


def test_a_fit_without_a_table_is_its_default_everywhere(root: Path) -> None:
    fit = {"enabled": True, "per_tp": {1: {"alpha_default": 0.125}}}
    skew = Toy(meta={"skew_fit": fit}).bundle(root).tables(1).skew
    assert skew is not None
    assert np.array_equal(skew.alpha.ravel(), [0.125])
    assert skew.of(512, 9, 0.3, 4096, 77) == 0.125
    assert Toy(meta={"skew_fit": {**fit, "enabled": False}}).bundle(root).tables(1).skew is None
    assert Toy(meta={"skew_fit": {**fit, "per_tp": {2: {}}}}).bundle(root).tables(1).skew is None


def test_the_skew_rate_tells_where_the_mean_lies() -> None:
    assert skew_rate(25, 0, 100) == 0.25
    assert skew_rate(7, 7, 7) == 0.0
