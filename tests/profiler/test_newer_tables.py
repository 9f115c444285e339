"""A newer package of the same layout is read where it is installed, without anything that it requires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from servesim.errors import InputError
from servesim.profiler.silicon import gemm, tables

if TYPE_CHECKING:
    from pathlib import Path

pyarrow = pytest.importorskip("pyarrow")
GEMM: dict[str, Any] = {"gemm_dtype": "bfloat16", "m": 8, "n": 64, "k": 64}


def _write(folder: Path, version: str, family: str, table: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow.parquet as parquet

    path = folder / "systems/data/toy" / family / "vllm" / version / f"{table}.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the layout of the newer package, which raises if somebody imports it."""
    folder = tmp_path / "aisimulate_core"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('its requirements are not here')")
    info = tmp_path / "aisimulate-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aisimulate\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_newer_package_wins_and_says_its_versions(newer: Path) -> None:
    _write(newer, "0.25.0", "gemm", "gemm_perf", [{**GEMM, "latency": 0.002}])
    _write(newer, "0.31.0", "gemm", "gemm_perf", [{**GEMM, "latency": 0.001}])
    assert (tables.package_name(), tables.package_version()) == ("aisimulate", "9.9")
    assert tables.data_root() == newer / "systems"
    found = tables.read_table("toy", "gemm", "gemm_perf")
    assert (found.version, found.latency_us.tolist()) == ("0.31.0", [1.0])


def test_rows_missing_in_the_newest_come_from_an_older(newer: Path) -> None:
    fp8 = {**GEMM, "gemm_dtype": "fp8"}
    _write(newer, "0.25.0", "gemm", "gemm_perf", [{**GEMM, "latency": 0.002}, {**fp8, "latency": 0.003}])
    _write(newer, "0.31.0", "gemm", "gemm_perf", [{**GEMM, "latency": 0.001}])
    assert tables.read_table("toy", "gemm", "gemm_perf", like={"gemm_dtype": "bfloat16"}).version == "0.31.0"
    assert tables.read_table("toy", "gemm", "gemm_perf", like={"gemm_dtype": "fp8"}).version == "0.25.0"
    assert tables.table_versions("toy", "gemm", "gemm_perf", like={"gemm_dtype": "fp8"}) == ["0.25.0"]
    assert tables.read_table("toy", "gemm", "gemm_perf", like={"gemm_dtype": "int4"}).version == "0.31.0"


def test_single_sizes_beside_the_grid_are_read_as_they_are(newer: Path) -> None:
    grid = [(n, k) for n in (64, 128, 256) for k in (64, 128, 256)]
    rows = [
        {**GEMM, "m": m, "n": n, "k": k, "latency": 0.001 * n * k / 4096} for m in (1, 8) for n, k in grid
    ]
    _write(newer, "0.31.0", "gemm", "gemm_perf", [*rows, {**GEMM, "n": 200, "k": 64, "latency": 0.5}])
    times = gemm.gemm_times(tables.Gpu("toy", 1e12, 1e6, 10), "bfloat16")
    assert times.widths.tolist() == [64, 128, 256]
    one = gemm.np.array([8])
    assert times.time_us(one, 200, 64) == pytest.approx(500.0 + gemm.LAUNCH_US)
    assert times.time_us(one, 192, 64) == pytest.approx(3.0 + gemm.LAUNCH_US)


def test_without_either_package_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servesim.profiler.silicon.tables.PACKAGES", {"nothing": "no_such_package"})
    assert not tables.installed()
    with pytest.raises(InputError, match=r"pip install 'servesim\[silicon\]'"):
        tables.package_name()
