"""What is kept of data files between runs: never stale, never in the way."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.cost.bundle import _parse_attention, _read_attention
from servesim.errors import InputError
from servesim.specs import kept, paths
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_an_edited_file_is_read_anew(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, value in (("a: {1: [1.5, yes]}", {1: [1.5, True]}), ("a: {1: [2.5, yes]}", {1: [2.5, True]})):
        path.write_text(text)
        for _ in range(2):
            assert read_yaml_object(path) == {"a": value}
    assert len(list(folder.iterdir())) == 2


def test_a_kept_table_equals_the_one_that_was_read(folder: Path) -> None:
    path = paths.find("profiler/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1/attention.csv")
    plain = _parse_attention(path, None, {})
    for _ in range(2):
        found = _read_attention(path, None, {})
        assert found.tensor.tobytes() == plain.tensor.tobytes()
        assert all(
            np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found.axes, plain.axes, strict=True)
        )
    assert [entry.suffix for entry in folder.iterdir()] == [".floats"]


def test_a_kept_table_is_checked_like_one_that_is_read(folder: Path) -> None:
    from servesim.cost.bundle_csv import Stamp

    path = paths.find("profiler/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1/attention.csv")
    _read_attention(path, None, {})
    assert folder.is_dir()
    with pytest.raises(InputError, match=r"where meta\.yaml states 3"):
        _read_attention(path, Stamp(3, "0" * 16), {})


def test_an_edited_module_makes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "module.py"
    keys = set()
    for text in ("a", "bb"):
        module.write_text(text)
        monkeypatch.setattr("servesim.cost.tables.__file__", str(module))
        keys.add(kept.key_of("x", b"1", "2", by=["servesim.cost.tables"]))
    assert len(keys) == 2
    assert kept.key_of("x", b"12", "", by=[]) != kept.key_of("x", b"1", "2", by=[])


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x93NUMPY", b"\0" * 1000])
def test_a_broken_entry_is_passed_over(folder: Path, tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    read_yaml_object(path)
    kept.keep_arrays("0", [np.arange(3.0)])
    for entry in folder.iterdir():
        entry.write_bytes(junk)
    assert read_yaml_object(path) == {"a": 1}
    assert kept.kept_arrays("0") is None


@pytest.mark.parametrize("at", [0, 8, -1, -20])
def test_a_changed_byte_is_noticed(folder: Path, tmp_path: Path, at: int) -> None:
    """Whatever the disk has done to an entry, what it holds is what was kept, or nothing."""
    path = tmp_path / "x.yaml"
    path.write_text("bandwidth: 1597.5")
    read_yaml_object(path)
    kept.keep_arrays("0", [np.arange(3.0)])
    for entry in folder.iterdir():
        data = bytearray(entry.read_bytes())
        data[at] ^= 1
        entry.write_bytes(data)
    assert read_yaml_object(path) == {"bandwidth": 1597.5}
    assert kept.kept_arrays("0") is None


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    for name in (str(tmp_path / "file"), "0"):
        monkeypatch.setenv(kept.VARIABLE, name)
        assert read_yaml_object(path) == {"a": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "x.yaml"]


def test_what_is_not_plain_is_not_kept(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text in ("a: 2026-11-28", "a: &b [1]\nc: *b"):
        path.write_text(text)
        read_yaml_object(path)
    assert not folder.exists()


def test_few_entries_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_ENTRIES", 3)
    for number in range(9):
        kept.keep_value(str(number), number)
    assert len(list(folder.iterdir())) == 3
    assert kept.kept_value("8") == 8


def test_arrays_come_back_as_they_were() -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.array([2**53 - 1]), np.zeros((0, 4))]
    kept.keep_arrays("0", arrays)
    found = kept.kept_arrays("0")
    assert found is not None
    assert [array.tolist() for array in found] == [array.tolist() for array in arrays]
    assert [array.shape for array in found] == [array.shape for array in arrays]


def test_a_second_run_reads_no_yaml() -> None:
    code = (
        "import sys; from servesim.__main__ import main; status = main(['run', '--num-reqs', '1']); "
        "sys.exit(status or 10 + ('yaml' in sys.modules))"
    )
    arguments = [sys.executable, "-c", code]
    root = paths.packaged_data_dir()
    statuses = [
        subprocess.run(arguments, cwd=root, capture_output=True, check=False).returncode for _ in range(2)
    ]
    assert statuses == [11, 10]
