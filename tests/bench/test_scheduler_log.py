"""Logs survive the disk, and the step formula is the same number however it is asked for."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest

from servesim.bench.scheduler_log import (
    LoggedRequest,
    LoggedStep,
    SchedulerLog,
    differences,
    read_log,
    write_log,
)
from servesim.bench.step_formula import StepFormula
from servesim.errors import InputError, MissingFileError

LOG = SchedulerLog(
    header={"vllm": "0.24.0"},
    steps=[LoggedStep(0, 9, {1: 5, 0: 1}, [2], [0], 3, 4, {1: 16})],
    requests=[LoggedRequest(0, 1, 2, 3, 4, 5, 0, 1)],
)


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_survives_the_disk(tmp_path: Path, name: str) -> None:
    write_log(tmp_path / name, LOG)
    assert read_log(tmp_path / name) == LOG
    first = (tmp_path / name).read_bytes()
    write_log(tmp_path / name, LOG)
    assert (tmp_path / name).read_bytes() == first


def test_the_order_within_a_step_counts_only_when_asked() -> None:
    other = SchedulerLog(LOG.header, [LoggedStep(0, 9, {0: 1, 1: 5}, [2], [0], 3, 4, {1: 16})], LOG.requests)
    assert differences(LOG, other) == []
    assert differences(LOG, other, ordered=True) == ["step 0: order [0, 1], expected [1, 0]"]


def test_a_difference_shows_only_what_differs() -> None:
    other = SchedulerLog(LOG.header, [LoggedStep(0, 9, {0: 1, 1: 6}, [2], [0], 3, 4, {1: 16})], [])
    assert differences(LOG, other) == ["step 0: sched {1: 6}, expected {1: 5}", "request 0 is missing"]


def test_a_broken_log_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"format": "servesim-scheduler-log/1"}\n{"sched": {}, "when": 3}\n')
    with pytest.raises(InputError, match=r"log.jsonl: line 2: not a step"):
        read_log(path)
    path.write_text("{\n")
    with pytest.raises(InputError, match=r"line 1: not JSON"):
        read_log(path)
    with pytest.raises(MissingFileError, match="does not exist"):
        read_log(tmp_path / "none")


def test_the_formula_is_one_number_however_it_is_asked_for() -> None:
    formula = StepFormula.from_us(1.0, 0.1, 0.01, 0.002)
    assert formula == StepFormula(1000, 100, 10, 2)
    # Three decodes over 30 cached tokens, and a chunk of 5 tokens over 7.
    assert formula.decode_ns(3, 30, 9, 11) == 1000 + 3 * 100 + 3 * 10 + 30 * 2 == 1390
    assert formula.mixed_ns([(5, 7)], 3, 30, 9, 11) == 1000 + 8 * 100 + 4 * 10 + 37 * 2 == 1914
    run = formula.decode_run_ns(3, 30, 9, 11, 4).tolist()
    assert run == [formula.decode_ns(3, 30 + 3 * i, 9 + i, 11 + i) for i in range(4)]
    ends = [5]
    formula.decode_ends(ends, 3, 30, 9, 11, 4)
    assert ends == list(accumulate(run, initial=5))
    ends = [5]
    formula.decode_ends(ends, 3, 30, 9, 11, 4, 2, 5 + run[0])
    assert ends == list(accumulate(run[:2], initial=5))  # the third would wait for the first to end
