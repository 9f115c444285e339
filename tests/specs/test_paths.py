"""Files are looked for in the working directory, then the user's folder, then what is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.errors import MissingFileError
from servesim.specs import paths

SHIPPED = "configs/cluster/single_node_single_instance.json"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty user folder."""
    work, user = tmp_path / "work", tmp_path / "user"
    work.mkdir()
    user.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(paths, "user_data_dir", lambda: user)
    return tmp_path


def put(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_shipped_files_are_found_from_anywhere(elsewhere: Path) -> None:
    assert elsewhere not in paths.find(SHIPPED).parents
    assert paths.find(SHIPPED).is_file()


def test_the_users_folder_goes_before_the_shipped_files(elsewhere: Path) -> None:
    mine = put(elsewhere / "user" / SHIPPED)
    assert paths.find(SHIPPED) == mine


def test_the_working_directory_goes_before_the_users_folder(elsewhere: Path) -> None:
    put(elsewhere / "user" / SHIPPED)
    put(elsewhere / "work" / SHIPPED)
    assert paths.find(SHIPPED) == Path(SHIPPED)  # as it was given


def test_an_absolute_path_is_used_as_it_is(elsewhere: Path) -> None:
    file = put(elsewhere / "any where.json")
    assert paths.find(file) == file
    assert paths.find(str(file)) == file


def test_an_absolute_path_is_looked_up_nowhere_else(elsewhere: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such cluster config; correct the path"):
        paths.find(elsewhere / SHIPPED, "cluster config")


def test_a_missing_file_names_every_place(elsewhere: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        paths.find("configs/none.json")
    message = str(caught.value)
    assert message.startswith("configs/none.json: no such file or folder; looked in ")
    assert str(elsewhere / "work") in message
    assert str(elsewhere / "user") in message


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_no_file_system_takes_is_a_missing_file(name: str) -> None:
    with pytest.raises(MissingFileError):
        paths.find(name)


def test_all_places_together_list_a_name_once(elsewhere: Path) -> None:
    mine = put(elsewhere / "work" / "configs/cluster/single_node_tp2.json")
    extra = put(elsewhere / "user" / "configs/cluster/zzz.json")
    found = paths.find_all("configs/cluster/*.json")
    assert mine in found
    assert found[-1] == extra
    assert [path.name for path in found].count("single_node_tp2.json") == 1
    assert "single_node_single_instance.json" in [path.name for path in found]


def test_bundles_can_be_taken_from_one_folder_alone(elsewhere: Path) -> None:
    mine = put(elsewhere / "bundles" / "H" / "org" / "m" / "bf16" / "meta.yaml").parent
    put(elsewhere / "work" / "profiler" / "perf" / "H" / "org" / "m" / "fp8" / "meta.yaml")
    with paths.bundles_from(elsewhere / "bundles"):
        assert paths.find("profiler/perf/H/org/m/bf16") == mine
        assert paths.find_all("profiler/perf/H/org/m/*/meta.yaml") == [mine / "meta.yaml"]
        with pytest.raises(MissingFileError):
            paths.find("profiler/perf/H/org/m/fp8")
        assert paths.find(SHIPPED).is_file()
    assert paths.find("profiler/perf/H/org/m/fp8").is_dir()
    with pytest.raises(MissingFileError):
        paths.find("profiler/perf/H/org/m/bf16")


def test_no_folder_for_bundles_changes_nothing(elsewhere: Path) -> None:
    put(elsewhere / "work" / "profiler" / "perf" / "H" / "org" / "m" / "fp8" / "meta.yaml")
    with paths.bundles_from(None):
        assert paths.find("profiler/perf/H/org/m/fp8").is_dir()
