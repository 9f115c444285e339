"""A table of shots that survives a kill: rows are appended and synced, a half line at the end is dropped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Key = tuple[str, ...]
Row = tuple[Any, ...]


def text(value: object) -> str:
    """A cell: floats with six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class TableFile:
    """A CSV file whose first columns name a shot and whose last ``values`` columns hold what was measured."""

    def __init__(self, path: Path, header: tuple[str, ...], values: int = 1) -> None:
        """Opens the file, and creates it (with its folder) where there is none.

        Raises:
            InputError: a whole line of the file is no row of this table.
        """
        self.path = path
        self.header = header
        self._keys = len(header) - values
        self.rows: dict[Key, tuple[str, ...]] = {}
        """What has been measured: key cells -> all cells."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
            self._handle = path.open("ab")
            if self._handle.tell() == 0:
                self._write(",".join(header) + "\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error

    def key(self, row: Row) -> Key:
        """The cells that name the shot of a row (or of its key columns alone)."""
        return tuple(text(value) for value in row[: self._keys])

    def __contains__(self, row: Row) -> bool:
        return self.key(row) in self.rows

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; on return they are on the disk."""
        lines = []
        for row in rows:
            cells = tuple(text(value) for value in row)
            self.rows[cells[: self._keys]] = cells
            lines.append(",".join(cells) + "\n")
        try:
            self._write("".join(lines))
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        self._handle.close()

    def _write(self, lines: str) -> None:
        self._handle.write(lines.encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the writer was stopped within a line
            with self.path.open("rb+") as handle:
                handle.truncate(len(whole))
        lines = whole.decode(errors="replace").splitlines()
        if lines and lines[0] != ",".join(self.header):
            raise self._damaged(1, lines[0])
        for number, line in enumerate(lines[1:], 2):
            cells = tuple(line.split(","))
            if len(cells) != len(self.header) or not _are_numbers(cells[self._keys :]):
                raise self._damaged(number, line)
            self.rows[cells[: self._keys]] = cells

    def _damaged(self, line: int, found: str) -> InputError:
        return InputError(
            f"{self.path}: line {line}: `{found[:80]}` is no row of {','.join(self.header)}; "
            "remove the line, or measure everything again with --force"
        )


def _are_numbers(cells: tuple[str, ...]) -> bool:
    try:
        return all(float(cell) == float(cell) for cell in cells)
    except ValueError:
        return False
