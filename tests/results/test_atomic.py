"""Output files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.errors import InputError, RunError
from servesim.results.atomic import atomic_write, check_writable


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
def test_a_path_that_could_not_be_created_is_told_and_leaves_nothing(path: str, tmp_path: Path) -> None:
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
