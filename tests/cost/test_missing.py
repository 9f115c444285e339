"""Bundles that are not there: an error, unless somebody makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.cost.bundle import load_bundle
from servesim.cost.finding import missing_bundles_from
from servesim.cost.identity import Wanted
from servesim.errors import InputError, MissingFileError
from tests.cost.bundles import HARDWARE, MODEL, VARIANT, Toy


def _elsewhere(root: Path, tp: int) -> Path:
    return Toy(tp=tp, meta={"source": "silicon"}).write(root / "made")


def test_a_missing_bundle_is_the_one_that_is_made(root: Path) -> None:
    asked = []

    def make(*what: object) -> Path:
        asked.append(what)
        return _elsewhere(root, 2)

    with missing_bundles_from(make):
        bundle = load_bundle(HARDWARE, MODEL, VARIANT, 2)
    assert asked == [(Wanted(HARDWARE, MODEL, VARIANT), 2)]
    assert bundle.folder == root / "made" / "profiler" / "perf" / HARDWARE / MODEL / VARIANT
    assert bundle.tables(2).folder.name == "tp2"


def test_a_missing_degree_is_read_from_where_it_was_made(root: Path) -> None:
    bundle = Toy(meta={"source": "silicon"}).bundle(root)
    with missing_bundles_from(lambda *_: _elsewhere(root, 4)):
        assert bundle.tables(4).folder.is_relative_to(root / "made")
    assert bundle.tables(1).folder.is_relative_to(bundle.folder)


def test_nothing_is_made_beside_what_was_measured(root: Path) -> None:
    bundle = Toy(meta={"source": "vllm"}).bundle(root)
    with missing_bundles_from(lambda *_: _elsewhere(root, 4)), pytest.raises(MissingFileError, match="tp4/"):
        bundle.tables(4)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("maker", [None, lambda *_: None])
def test_without_a_maker_the_documented_error_stands(maker: object) -> None:
    with missing_bundles_from(maker), pytest.raises(MissingFileError) as caught:  # type: ignore[arg-type]
        load_bundle(HARDWARE, MODEL, VARIANT)
    assert str(caught.value).endswith("--tp 1")


@pytest.mark.usefixtures("root")
def test_why_it_was_not_made_is_told() -> None:
    def refuse(*_: object) -> Path:
        raise InputError("no such kernel")

    with missing_bundles_from(refuse), pytest.raises(MissingFileError) as caught:
        load_bundle(HARDWARE, MODEL, VARIANT)
    assert str(caught.value).endswith("It was not made on demand: no such kernel")
