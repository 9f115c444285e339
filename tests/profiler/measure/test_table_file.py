"""A table that may be cut off anywhere and goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from servesim.errors import InputError
from servesim.profiler.measure.work_folder import TableFile

if TYPE_CHECKING:
    from pathlib import Path

HEADER = ("layer", "tokens", "time_us")


def _table(path: Path) -> TableFile:
    table = TableFile(path, HEADER)
    table.close()
    return table


def test_rows_come_back_by_their_shot(tmp_path: Path) -> None:
    table = TableFile(tmp_path / "tp1" / "dense.csv", HEADER)
    table.append([("norm", 1, 2.5), ("norm", 2, 1 / 3)])
    table.close()
    again = _table(table.path)
    assert ("norm", 2) in again
    assert ("norm", 3) not in again
    assert again.rows["norm", "2"] == ("norm", "2", "0.333333")


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_half_line_at_the_end_is_dropped_wherever_it_breaks_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "dense.csv"
    whole = b"layer,tokens,time_us\nnorm,1,2.5\n"
    path.write_bytes(whole + b"norm,222,17.5\n"[:cut])
    table = TableFile(path, HEADER)
    assert list(table.rows) == [("norm", "1")]
    table.append([("norm", 3, 4.0)])
    table.close()
    assert path.read_bytes() == whole + b"norm,3,4\n"


def test_a_table_cut_off_within_its_header_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "dense.csv"
    path.write_bytes(b"layer,tok")
    assert _table(path).rows == {}
    assert path.read_text() == "layer,tokens,time_us\n"


@pytest.mark.parametrize("line", ["norm,2", "norm,2,x", "norm,2,nan", "norm,2,3,4"])
def test_a_whole_line_that_is_no_row_is_reported_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "dense.csv"
    path.write_text(f"layer,tokens,time_us\nnorm,1,2.5\n{line}\n")
    with pytest.raises(InputError, match=r"dense\.csv: line 3: .* --force"):
        TableFile(path, HEADER)


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dense.csv"
    path.write_text("layer,time_us\n")
    with pytest.raises(InputError, match="line 1"):
        TableFile(path, HEADER)
