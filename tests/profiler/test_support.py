"""Saying before a run what there is for it: bundles, their reach, and ways to make others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from servesim.profiler.bundle_writer import write_bundle
from servesim.profiler.sources import SOURCES
from servesim.profiler.support import DEGREES, answer, best_answer, command_for, way
from servesim.specs.hardware import HardwareSpec, load_hardware
from servesim.specs.model import load_model
from tests.profiler.roofline_toy import build_bundle, job

ASKED = {"tokens": 128, "sequences": 16, "decode KV": 4096}


pytestmark = pytest.mark.usefixtures("root")


def write(folder: Path, **changes: object) -> None:
    asked = job(**changes)
    write_bundle(folder / "profiler/perf/Toy" / asked.model.name / asked.variant, build_bundle(asked))


def test_without_a_bundle_a_hardware_file_is_enough_to_make_one() -> None:
    told = answer(job(), ASKED)
    assert told.bundle is None
    assert told.letter == "r"
    silicon, roofline = told.ways
    assert (silicon.possible, roofline.possible) == (False, True)
    assert "nobody published kernel measurements" in silicon.about
    assert (
        "--hardware Toy --source roofline --dtype bfloat16 --kv-cache-dtype auto --tp 1" in roofline.command
    )


def test_the_fact_without_which_nothing_is_made_is_named() -> None:
    told = answer(job(hardware=HardwareSpec(name="Blank")), ASKED)
    assert told.letter == "-"
    assert "configs/hardware/Blank.yaml: memory_bandwidth_gbs: is missing" in told.ways[1].about


def test_a_bundle_is_told_with_its_reach_and_what_lies_beyond(root: Path) -> None:
    write(root, tp_degrees=(1, 2))
    told = answer(job(), ASKED, ways=False)
    assert told.letter == "R"
    assert told.ways == []
    found = told.bundle
    assert found is not None
    assert (found.place, found.source, found.degrees) == ("here", "roofline", [1, 2])
    assert found.ranges["tokens"] == (1, 64)
    assert found.ranges["decode KV"] == (16, 1024)
    assert found.extrapolated == ["tokens 65 to 128", "decode KV 1025 to 4096"]
    assert "nothing measured" in (found.confidence or "")


def test_a_missing_degree_is_told_with_a_way_out(root: Path) -> None:
    write(root, tp_degrees=(1,))
    told = answer(job(tp_degrees=(4,)), ASKED, ways=False)
    assert told.bundle is not None
    assert "tp4/ does not exist" in (told.problem or "")
    assert told.letter == "r"


def test_a_damaged_bundle_is_a_problem_and_no_crash(root: Path) -> None:
    write(root)
    (path,) = root.rglob("attention.csv")
    path.write_text("nonsense\n")
    told = answer(job(), ASKED)
    assert "attention.csv" in (told.problem or "")


def test_a_shape_that_a_source_refuses_says_why() -> None:
    told = way(job(tp_degrees=(3,)), "roofline")
    assert not told.possible
    assert "cannot be split over tp 3" in told.about


def test_the_shipped_bundles_are_called_shipped() -> None:
    shipped = job(hardware=load_hardware("RTXPRO6000"))
    found = answer(shipped, {}, ways=False).bundle
    assert found is not None
    assert (found.place, SOURCES[found.source].letter) == ("shipped", "S")


def test_the_command_repeats_the_question() -> None:
    asked = replace(job(), dtype="fp8", kv_cache_dtype="fp8", tp_degrees=(2,))
    assert command_for(asked, "silicon") == (
        "servesim profile meta-llama/Llama-3.1-8B --hardware Toy --source silicon "
        "--dtype fp8 --kv-cache-dtype fp8 --tp 2"
    )


def test_what_does_not_fit_is_told_with_figures() -> None:
    told = answer(job("meta-llama/Llama-3.1-70B"), ASKED)
    assert told.letter == "x"
    assert not told.usable
    assert told.no_fit == (
        "131.4 GiB of bfloat16 weights per GPU at tp 1, of 57.6 GiB that can be used (64 GiB x 0.9); "
        "tp 4 fits"
    )


def test_the_matrix_looks_at_every_degree(root: Path) -> None:
    big = "meta-llama/Llama-3.1-70B"
    assert best_answer(job(big), DEGREES).tp == 4
    assert best_answer(job(big), DEGREES).letter == "r"
    assert best_answer(job(big), (1, 2)).letter == "x"
    write(root, model=job(big).model, tp_degrees=(8,))
    told = best_answer(job(big), DEGREES)
    assert (told.letter, told.tp) == ("R", 8)


def test_the_matrix_tells_what_an_extra_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    from servesim.errors import InputError
    from servesim.profiler.silicon import tables

    def absent() -> str:
        raise InputError(f"the silicon source needs the package; {tables.INSTALL_HINT}")

    monkeypatch.setattr(tables, "package_version", absent)
    assert best_answer(job(hardware=load_hardware("B300")), (1,)).letter == "p"
    assert best_answer(job(), (1,)).letter == "r"  # nobody measured it: the extra changes nothing


def test_an_own_model_is_named_by_its_path_in_commands(root: Path) -> None:
    folder = root / "my models" / "base"
    folder.mkdir(parents=True)
    config = job().model.model_dump(exclude_none=True, mode="json", exclude={"name", "layer_types"})
    (folder / "config.json").write_text(json.dumps(config))
    command = command_for(job(load_model(folder)), "roofline")
    assert command.startswith(f"servesim profile '{folder}' --hardware Toy")
