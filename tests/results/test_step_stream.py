"""Steps that go to their file while the run goes on are the same bytes, and are left by a run that stops."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.results import step_stream, steps
from servesim.results.heartbeat import Heartbeat
from servesim.results.step_stream import StepStream
from tests.hand_made import two_requests

if TYPE_CHECKING:
    from servesim.results.records import InstanceLog, RunLog
    from servesim.results.result import Result

RUN = ["--dtype", "bfloat16", "--num-reqs", "12", "--dataset", "workloads/example_trace.jsonl"]
TWO = ["--cluster-config", "configs/cluster/two_instances.json"]
GUESSES = [
    *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'),
    *("--speculative-acceptance", "0.5,0.3"),
]

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs have their steps written as they come, too."""
    monkeypatch.setattr(step_stream, "EVERY_NS", 500_000_000)
    monkeypatch.setattr(step_stream, "AT_ONCE", 5)


def at_the_end() -> Any:
    return patch.object(StepStream, "to", lambda _: None)


@pytest.mark.parametrize("how", [[], TWO, GUESSES], ids=["one", "two", "drafts"])
def test_steps_written_meanwhile_are_the_same_bytes(tmp_path: Path, how: list[str]) -> None:
    written = StepStream._write
    calls: list[tuple[Any, ...]] = []

    def count(stream: StepStream, *where: Any) -> None:
        calls.append(where)
        written(stream, *where)

    with patch.object(StepStream, "_write", count):
        assert main([*RUN, *how, "--steps", "new/steps.csv", "--summary", "1.json"]) == 0
    assert len(calls) > 10
    with at_the_end():
        assert main([*RUN, *how, "--steps", "whole.csv", "--summary", "2.json"]) == 0
    assert (tmp_path / "new/steps.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["steps.csv"]


@pytest.mark.parametrize("how", [[], TWO], ids=["one", "two"])
def test_an_interrupted_run_leaves_its_steps(
    tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_the_end():
        assert main([*RUN, *how, "--steps", "whole.csv"]) == 0
    (tmp_path / "steps.csv").write_text("old")
    advance = Heartbeat.advance

    def stop(self: Heartbeat, now_ns: int, log: RunLog) -> None:
        advance(self, now_ns, log)
        if now_ns > 5_000_000_000:
            raise KeyboardInterrupt

    capsys.readouterr()
    monkeypatch.setattr(step_stream, "_UNDER_WAY", 2)
    monkeypatch.setattr(Heartbeat, "advance", stop)
    assert main([*RUN, *how, "--steps", "steps.csv", "--output", "r.csv"]) == 130
    left = sorted(path.name for path in tmp_path.glob("*.partial"))
    assert left == (["steps.csv.1.partial", "steps.csv.partial"] if how else ["steps.csv.partial"])
    assert f"steps so far: {tmp_path / 'steps.csv.partial'}" in capsys.readouterr().err
    assert (tmp_path / "steps.csv").read_text() == "old"
    header, *rows = (tmp_path / "whole.csv").read_text().splitlines()
    for place, name in enumerate(sorted(left, reverse=True)):
        found = (tmp_path / name).read_text()
        own = [row for row in rows if row.startswith(f"{place},")]
        some = found.splitlines()
        assert found.endswith("\n")
        assert some[0] == header
        assert 20 < len(some) < len(own)
        assert some[1:] == own[: len(some) - 1]
    monkeypatch.setattr(Heartbeat, "advance", advance)
    assert main([*RUN, *how, "--steps", "steps.csv"]) == 0
    assert (tmp_path / "steps.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_told_once_and_nothing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step_stream, "csv_lines", full)
    assert main([*RUN, "--steps", "new/steps.csv"]) == 1
    assert capsys.readouterr().err == "error: new/steps.csv: cannot be written: No space left on device\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("removed", [True, False])
def test_a_file_that_others_touch_is_written_anew(tmp_path: Path, removed: bool) -> None:
    opened, times = StepStream._opened, []

    def touch(stream: StepStream, file: int) -> Any:
        times.append(file)
        if len(times) == 4:
            path = stream._partial(0)
            path.unlink() if removed else path.write_text("mine")
        return opened(stream, file)

    with at_the_end():
        assert main([*RUN, "--steps", "whole.csv"]) == 0
    with patch.object(StepStream, "_opened", touch):
        assert main([*RUN, "--steps", "steps.csv"]) == 0
    assert len(times) > 4
    assert (tmp_path / "steps.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_fails_to_write_leaves_no_steps(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with patch("servesim.results.summary.save_summary", fail):
        assert main([*RUN, "--steps", "steps.csv", "--summary", "s.json"]) == 1
    assert not list(tmp_path.iterdir())


def test_parquet_and_pipes_are_written_at_the_end(tmp_path: Path) -> None:
    assert StepStream.to(None) is None
    assert StepStream.to(tmp_path / "steps.parquet") is None
    assert StepStream.to("/dev/null") is None
    assert StepStream.to(tmp_path / "steps.csv") is not None


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_row_groups_of_parquet_are_those_of_the_table(tmp_path: Path, group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    result = several_instances()
    rows = result.steps
    table = pa.table({name: np.ascontiguousarray(rows[name]) for name in steps.FILE_COLUMNS})
    metadata = {"servesim.run_id": "r", "servesim.vllm_version": "v"}
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "whole.parquet", compression="zstd", row_group_size=group)
    with patch.object(steps, "_PARQUET_ROWS", group):
        steps.save_steps(result.instances, tmp_path / "s.parquet", {"run_id": "r", "vllm_version": "v"})
    assert (tmp_path / "s.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def several_instances() -> Result:
    result = two_requests()
    log: InstanceLog = result.instances[0]
    result.log.instances += [two_requests().instances[0], log]
    return result


def test_writing_a_long_log_takes_little_memory(tmp_path: Path) -> None:
    result = two_requests()
    log = result.instances[0].steps
    begin, count = log.end_ns[-1], 200_000
    log.append_quiet(begin, range(begin + 10, begin + 10 * (count + 1), 10), range(count), 50, 60, 0)
    tracemalloc.start()
    result.save_steps(tmp_path / "steps.csv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20  # 160 bytes a step, as one table; a quarter of that as columns
    with (tmp_path / "steps.csv").open() as handle:
        assert sum(1 for _ in handle) == len(log) + 1
