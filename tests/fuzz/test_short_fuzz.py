"""A short run of the fuzz. A sound world passes, and each kind of fault is seen."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from servesim.cli import run as run_command
from tests.fuzz import world
from tests.fuzz.__main__ import fuzz
from tests.fuzz.cases import KINDS, Case, make_case
from tests.fuzz.judge import judge

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuzz.judge import Outcome


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def run_sound(cluster: dict[str, object], *flags: str) -> Outcome:
    lines = "".join(json.dumps(entry) + "\n" for entry in world.requests(8))
    files = world.sound_files() | {"c.json": json.dumps(cluster).encode(), "w.jsonl": lines.encode()}
    return judge(Case("sound", files, ["run", "--cluster-config", "c.json", "--dataset", "w.jsonl", *flags]))


@pytest.mark.parametrize("cluster", world.CLUSTERS)
def test_the_world_is_sound_before_it_is_spoilt(cluster: dict[str, object]) -> None:
    outcome = run_sound(cluster, "--output", "out.csv", "--summary", "out.json")
    assert (outcome.status, outcome.faults) == (0, []), outcome.stderr


def test_300_spoilt_inputs_find_no_fault() -> None:
    assert fuzz(300, seed=1) == []


def test_a_case_is_made_from_its_number() -> None:
    assert make_case(3, 17) == make_case(3, 17) != make_case(3, 18)
    assert {make_case(3, index).kind for index in range(100)} == set(KINDS)


def spoilt_run(monkeypatch: pytest.MonkeyPatch, act: object) -> list[str]:
    monkeypatch.setattr(run_command, "run", act)
    return run_sound(world.CLUSTERS[0], "--output", "out.csv").faults


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise KeyError("x")

    assert spoilt_run(monkeypatch, fail) == ["error: a fault of servesim, not of your input: KeyError: 'x'"]


def test_a_hang_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_: object) -> int:
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.judge.CPU_S", 0.2)
    assert spoilt_run(monkeypatch, hang) == ["takes more than 0.2 s"]


def test_bad_files_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def litter(_: object) -> int:
        for name, text in (("out.csv", "a,b\n1\n"), (".out.csv.1.tmp", ""), ("more.txt", "")):
            with open(name, "w") as handle:  # noqa: PTH123
                handle.write(text)
        return 3

    found = spoilt_run(monkeypatch, litter)
    assert found == [
        "exit status 3",
        ".out.csv.1.tmp is left over",
        "more.txt was not asked for",
        "out.csv is half written: rows of [1, 2] fields",
    ]
    assert not os.path.exists("out.csv")  # noqa: PTH110
