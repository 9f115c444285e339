"""Output files appear whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servesim.errors import InputError, RunError
from servesim.results.atomic import all_or_none, atomic_write, check_writable, remove
from servesim.results.outputs import save_outputs
from servesim.results.result import Result
from servesim.specs.options import RuntimeOptions
from tests import hand_made


def test_the_old_file_survives_a_failure_half_way(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path, "w") as handle:
            handle.write("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "run.csv") as handle:
        handle.write(b"1\n")
    assert (tmp_path / "a" / "b" / "run.csv").read_bytes() == b"1\n"


def test_line_ends_are_the_same_everywhere(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "run.csv", "w") as handle:
        handle.write("é\n")
    assert (tmp_path / "run.csv").read_bytes() == "é\n".encode()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link, "w") as handle:
        handle.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("old")
    path.chmod(0o640)
    with atomic_write(path, "w") as handle:
        handle.write("new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_to_and_stays_one() -> None:
    with atomic_write("/dev/null") as handle:
        handle.write(b"x")
    assert not Path("/dev/null").is_file()


def test_a_path_that_cannot_be_written_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run.csv"
    with pytest.raises(RunError, match=r"file/run\.csv: cannot be written"), atomic_write(path):
        pass
    with pytest.raises(InputError, match=r"--output .*file/run\.csv: cannot be written"):
        check_writable(path, "--output")


@pytest.mark.parametrize("path", ["run.csv", "new/run.csv", "a/b/c/run.csv"])
def test_checking_leaves_nothing_behind(path: str, tmp_path: Path) -> None:
    check_writable(tmp_path / path, "--output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/new/run.csv", "new/" + "x" * 300 + "/run.csv", "y" * 300])
def test_a_path_that_cannot_be_created_leaves_nothing(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*: cannot be written"):
        check_writable(tmp_path / path, "--output")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def _fail_while_writing(path: Path, meanwhile: Path | None = None) -> None:
    with atomic_write(path):
        if meanwhile is not None:
            meanwhile.write_text("")
        raise ZeroDivisionError


def test_a_failure_takes_the_folders_made_for_it_along(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        _fail_while_writing(tmp_path / "old" / "a" / "b" / "run.csv")
    assert list((tmp_path / "old").iterdir()) == []


def test_a_folder_that_somebody_else_uses_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _fail_while_writing(tmp_path / "a" / "b" / "run.csv", meanwhile=tmp_path / "a" / "other.csv")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other.csv"]


def test_a_folder_is_no_output_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path, "--output")


def write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as handle:
        handle.write(text)


def test_files_of_one_run_appear_together(tmp_path: Path) -> None:
    one, two, old = tmp_path / "a" / "one", tmp_path / "a" / "two", tmp_path / "old"
    old.write_text("old")
    with all_or_none():
        write(one, "1")
        write(two, "2")
        remove(old)
        assert not one.exists()
        assert old.exists()
    assert (one.read_text(), two.read_text(), old.exists()) == ("1", "2", False)
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_file_that_fails_keeps_all_others_back(tmp_path: Path) -> None:
    one, two, old = tmp_path / "one", tmp_path / "new" / "two", tmp_path / "old"
    one.write_text("before")
    old.write_text("old")

    def fail() -> None:
        with all_or_none():
            write(one, "1")
            write(two, "2")
            remove(old)
            with atomic_write(tmp_path / "three", "w") as handle:
                handle.write("half")
                raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"three: cannot be written: No space left"):
        fail()
    assert (one.read_text(), old.read_text()) == ("before", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "one"]


def test_a_rename_that_fails_is_told(tmp_path: Path) -> None:
    def fail() -> None:
        with all_or_none():
            write(tmp_path / "one", "1")
            write(tmp_path / "two", "2")
            (tmp_path / "two").mkdir()  # somebody puts a folder there meanwhile

    with pytest.raises(RunError, match=r"two: cannot be written"):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def outputs(**changes: str) -> RuntimeOptions:
    paths = {"output": "run.parquet", "summary": "run.json", "steps": "steps.parquet", "timeline": "t.json"}
    return RuntimeOptions(**paths, **changes)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("named", [None, "night-3"])
def test_every_output_says_which_run_it_is_of(named: str | None) -> None:
    import pyarrow.parquet as pq

    made = hand_made.two_requests()
    options = outputs(run_id=named) if named else outputs()
    save_outputs(Result(made.log, made.workload, options), options, {})
    run_id = json.loads(Path("run.json").read_text())["run_id"]
    assert run_id == named or (named is None and len(run_id) == 16)
    assert json.loads(Path("t.json").read_text())["otherData"] == {"run_id": run_id, "vllm_version": "0.33"}
    for name in ("run.parquet", "steps.parquet"):
        assert pq.read_schema(name).metadata[b"servesim.run_id"] == run_id.encode()


def test_the_name_of_a_run_follows_from_what_happened() -> None:
    one, same, other = hand_made.two_requests(), hand_made.two_requests(), hand_made.two_requests()
    other.log.requests[0].end_ns += 1
    assert one.run_id == same.run_id != other.run_id


_SLOW = """
import sys, time
from servesim.cli import run as command
from servesim.results.atomic import all_or_none, atomic_write

def work(_):
    with all_or_none(), atomic_write("new/run.csv", "w") as handle:
        handle.write("half")
        handle.flush()
        print("at work", flush=True)
        time.sleep(600)

command.run = work
from servesim.door import main
sys.argv = ["servesim", "run"]
sys.exit(main())
"""


def test_a_process_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    assert list(tmp_path.rglob("*.tmp"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    (tmp_path / f".run.csv.{os.getpid()}.tmp").write_text("half of something, longer than the new one")
    write(path, "new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_no_text_is_written_as_its_escapes(tmp_path: Path) -> None:
    write(tmp_path / "x.json", json.dumps({"path": "caf\udce9"}, ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"path": "caf\udce9"}
