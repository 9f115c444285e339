"""Steps that go to their file while the run goes on.

They are written to ``FILE.partial`` beside the file, which gets its name at the end, with the other outputs
of the run. A run that is interrupted or fails leaves it: whole rows of steps that have ended. A file is made
only once a few thousand steps are there, so that short runs are written as all other outputs are.

The file lists one instance after the other. So those after the first have a file each meanwhile,
``FILE.1.partial`` and so on.
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from servesim.errors import RunError
from servesim.results.atomic import adopt, missing_folders
from servesim.results.csv import is_parquet
from servesim.results.steps import csv_lines, file_columns, header_line
from servesim.results.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servesim.results.records import InstanceLog, RunLog

EVERY_NS = 60 * SECOND
"""Simulated time after which steps are written."""
AT_ONCE = 4096
"""Steps that are worth opening a file for."""
_UNDER_WAY = 64
"""The last steps of an interrupted run, which may not have ended."""


class StepStream:
    """Writes the step log of a run as CSV."""

    def __init__(self, path: str | Path) -> None:
        self.next_ns = EVERY_NS
        """Simulated time from which on the next call of :meth:`advance` is wanted."""
        self._path = path
        self._target = Path(os.path.realpath(path))
        self._instances: Sequence[InstanceLog] = ()
        self._names: tuple[str, ...] = ()
        self._steps: list[int] = []
        """Per instance: steps that are written."""
        self._bytes: list[int] = []
        """Per instance: the size of its file; 0: there is none."""
        self._folders: list[Path] = []
        self._lost = False
        """Somebody else wrote to a file, or removed it."""

    @classmethod
    def to(cls, path: str | Path | None) -> StepStream | None:
        """A stream to ``path``; None where the steps are written at the end: a Parquet file names the run,
        which has a name only then, and a pipe or a device takes nothing back."""
        if path is None or is_parquet(path) or (Path(path).exists() and not Path(path).is_file()):
            return None
        return cls(path)

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Write the steps that ended before ``now_ns``, where there are many.

        Raises:
            RunError: the file cannot be written.
        """
        self._look_at(log.instances)
        self.next_ns = now_ns + EVERY_NS
        for place, instance in enumerate(self._instances):
            written = self._steps[place]
            ended = bisect_left(instance.steps.end_ns, now_ns, lo=written)
            if ended - written >= AT_ONCE:
                self._write(place, ended)

    def leave(self) -> list[Path]:
        """Write what is left of an interrupted run; returns the files it leaves."""
        if not any(self._bytes) or self._lost:
            return []
        for place, instance in enumerate(self._instances):
            if size := self._bytes[place]:
                with self._told():
                    os.truncate(self._partial(place), size)  # after the last whole row
            # the log may end within a row too
            steps = instance.steps
            whole = min(len(steps), *(len(getattr(steps, name)) for name in steps.EACH)) - _UNDER_WAY
            if whole > self._steps[place]:
                self._write(place, whole)
        return [self._partial(place) for place, size in enumerate(self._bytes) if size]

    def hand_over(self, instances: Sequence[InstanceLog]) -> bool:
        """Write the rest and let the file get its name, with the others of the run; False if it is to be
        written in another way.

        Raises:
            RunError: the file cannot be written.
        """
        self._look_at(instances)
        if not any(self._bytes):
            return False
        for place, instance in enumerate(instances):
            if place and self._bytes[place] and not self._lost:
                self._append_file(place)
            self._write(0, len(instance.steps), place)
        if self._lost:
            self.remove()
            return False
        adopt(self._target, self._partial(0), self._folders)
        self._bytes = [0] * len(instances)
        return True

    def remove(self) -> None:
        """Leave nothing behind."""
        for place, size in enumerate(self._bytes):
            if size:
                with suppress(OSError):
                    self._partial(place).unlink()
        self._bytes = [0] * len(self._bytes)
        with suppress(OSError):
            for folder in self._folders:
                folder.rmdir()

    def _look_at(self, instances: Sequence[InstanceLog]) -> None:
        if not self._steps:
            self._instances = instances
            self._names = file_columns(instances)
            self._steps, self._bytes = [0] * len(instances), [0] * len(instances)

    def _partial(self, place: int) -> Path:
        number = f".{place}" if place else ""
        return self._target.with_name(f"{self._target.name}{number}.partial")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Inside the block, a file that cannot be written is removed, and the user told."""
        try:
            yield
        except OSError as error:
            self.remove()
            raise RunError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _write(self, file: int, last: int, place: int | None = None) -> None:
        """Write the steps of an instance up to ``last - 1`` to a file, by default its own."""
        at = file if place is None else place
        with self._told(), self._opened(file) as handle:
            if handle is not None:
                lines = csv_lines(self._instances[at], self._names, self._steps[at], last)
                handle.writelines(text.encode() for text in lines)
                handle.flush()
                self._steps[at], self._bytes[file] = last, handle.tell()

    def _append_file(self, place: int) -> None:
        """Move what another instance's file holds behind the first one's."""
        with self._told(), self._opened(place) as source, self._opened(0) as handle:
            if source is not None and handle is not None:
                source.seek(len(header_line(self._names)))
                shutil.copyfileobj(source, handle)
                handle.flush()
                self._bytes[0] = handle.tell()
        if not self._lost:
            self._partial(place).unlink()
            self._bytes[place] = 0

    @contextmanager
    def _opened(self, file: int) -> Iterator[IO[bytes] | None]:
        """A file at its end, with its header if it is new; None if it is not as it was left."""
        path, size = self._partial(file), self._bytes[file]
        if size and (not path.is_file() or path.stat().st_size != size):
            self._lost = True
        if self._lost:
            yield None
            return
        if not size:
            self._folders = self._folders or missing_folders(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if size else "wb") as handle:
            handle.seek(size)
            if not size:
                handle.write(header_line(self._names).encode())
                handle.flush()
                self._bytes[file] = handle.tell()
            yield handle
