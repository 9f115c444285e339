"""Finished rows of a sweep, one JSON line each: written in one piece, whoever is killed next."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from servesim.errors import InputError, RunError

_BEGIN = b'{"key": "'
"""What every row begins with; one that was cut off, with a part of it."""


class Journal:
    """A file that several processes append to; a line that was cut off is passed over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Key -> row of every whole line; of a key that is there twice, the last."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found[str(row["key"])] = row
        return found

    def begin(self) -> None:
        """Make the file, and end a line that a killed process has left half written.

        Raises:
            InputError: a file is there that holds something else.
            RunError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as handle:
                size = handle.seek(0, os.SEEK_END)
                if size:
                    handle.seek(0)
                    self._check_begin(handle.read(len(_BEGIN)))
                    handle.seek(size - 1)
                    if handle.read(1) != b"\n":
                        handle.write(b"\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _check_begin(self, there: bytes) -> None:
        if not _BEGIN.startswith(there.lstrip(b"\n")[: len(_BEGIN)]):
            raise InputError(f"{self.path}: holds no rows of a sweep; give another --journal")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row: one write at the end of the file, with the file locked where that is possible.

        Raises:
            RunError: it cannot be written.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _lock(number)
                while line:
                    line = line[os.write(number, line) :]
            finally:
                os.close(number)  # and unlock
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def _lock(number: int) -> None:
    with suppress(ImportError, OSError):  # not on every system: a line of a few kB is one write anyway
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX)
