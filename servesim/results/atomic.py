"""Output files appear whole or not at all: written to a temporary sibling, then renamed over the old file.

The files of one run appear together (:func:`all_or_none`). What a killed process leaves are temporary
siblings named after its process id; nobody reads them, and the next process of that id writes over them.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from servesim.errors import InputError, RunError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def check_suffix(path: str | Path, allowed: Sequence[str], what: str) -> None:
    """Refuse a file name whose ending promises another format than the one that is written.

    Names without an ending are fine, such as ``/dev/stdout``.

    Raises:
        InputError: the name ends in something else than one of ``allowed``.
    """
    suffix = Path(path).suffix
    if suffix and suffix.lower() not in allowed:
        raise InputError(
            f"{what} {path}: {suffix} is not a format that is written; must end in {' or '.join(allowed)}"
        )


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _open_new(path: Path, mode: str) -> IO[Any]:
    if "b" in mode:
        return path.open(mode)
    # A name that is no text, such as a path in another encoding, is written as its escapes.
    return path.open(mode, encoding="utf-8", errors="backslashreplace", newline="")


def missing_folders(folder: Path) -> list[Path]:
    """``folder`` and those above it that do not exist, innermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    return missing


@dataclass(slots=True)
class _Pending:
    """A file that is written and has not its name yet; without ``temporary`` one that is to go."""

    target: Path
    temporary: Path | None = None
    created: list[Path] = field(default_factory=list)
    """Folders that were made for it, innermost first."""

    def settle(self) -> None:
        """Give the file its name.

        Raises:
            OSError: that is not possible.
        """
        if self.temporary is None:
            self.target.unlink(missing_ok=True)
            return
        if self.target.exists():
            shutil.copymode(self.target, self.temporary)
        self.temporary.replace(self.target)

    def discard(self) -> None:
        """Leave everything as it was."""
        if self.temporary is not None:
            with suppress(OSError):
                self.temporary.unlink()
        with suppress(OSError):  # one that another has put something into stays, and those above it
            for folder in self.created:
                folder.rmdir()


_batch: ContextVar[list[_Pending] | None] = ContextVar("batch", default=None)
"""Files that wait for the others of their run; None: each gets its name at once."""


@contextmanager
def all_or_none() -> Iterator[None]:
    """Inside the block, files written by :func:`atomic_write` get their names only at its end, all at once.

    If the block raises, or one of them cannot be written, all files stay as they were: the outputs of one
    run are of one age.

    Raises:
        RunError: a file cannot be renamed.
    """
    pending: list[_Pending] = []
    token = _batch.set(pending)
    settled = 0
    try:
        yield
        for settled, each in enumerate(pending):  # noqa: B007 - how far it came is looked at below
            each.settle()
        settled = len(pending)
    except BaseException as error:
        for each in pending[settled:]:
            each.discard()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            name = pending[settled].target
            raise RunError(f"{name}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        _batch.reset(token)


def _settle(pending: _Pending) -> None:
    batch = _batch.get()
    if batch is None:
        pending.settle()
    else:
        batch.append(pending)


def adopt(target: Path, written: Path, created: list[Path]) -> None:
    """Rename a file that is written already, with the others of its run, if there are any.

    ``created``: folders that were made for it, innermost first.
    """
    _settle(_Pending(target, written, created))


def remove(path: str | Path) -> None:
    """Remove a file that an earlier run may have left; with the others of its run, if there are any."""
    _settle(_Pending(Path(path)))


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that readers see the old file or the finished new one, never half of it.

    Parent folders are created; a symbolic link stays a link and its target is replaced; text is UTF-8 with
    ``\\n`` line ends. An existing path that is no regular file (``/dev/null``, a pipe) is written to
    directly. If the body raises, the old file is untouched and the temporary one removed, and so are the
    folders created for it.

    Raises:
        RunError: the file cannot be created, written or renamed (full disk, missing permission).
    """
    target = Path(os.path.realpath(path))
    direct = target.exists() and not target.is_file()
    temporary = target if direct else _temporary_sibling(target)
    pending = _Pending(target, temporary, [] if direct else missing_folders(target.parent))
    try:
        if not direct:
            target.parent.mkdir(parents=True, exist_ok=True)
        with _open_new(temporary, mode) as handle:
            yield handle
        if not direct:
            _settle(pending)
    except BaseException as error:
        if not direct:
            pending.discard()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def check_writable(path: str | Path, what: str) -> None:
    """Find out before a run whether the file ``path`` can be written after it; nothing is left behind.

    Args:
        path: output file; folders that are missing on the way to it are made when it is written.
        what: the option that names the file, for the message (``--output``).

    Raises:
        InputError: the path is a folder, or nothing can be created beside it.
    """
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):  # noqa: PTH112 - pathlib raises for a name that is too long
        raise InputError(
            f"{what} {path}: is a folder; give the path of a file, such as {Path(path) / 'run.csv'}"
        )
    if os.path.exists(target) and not target.is_file():  # noqa: PTH110
        return  # a device or a pipe: nothing to create beside it
    try:
        _rehearse(target)
    except OSError as error:
        raise InputError(
            f"{what} {path}: cannot be written ({error.strerror or error}); "
            "give a path in a folder you can write to"
        ) from error


def check_creatable(folder: Path, what: str) -> None:
    """As :func:`check_writable`, for a folder that is made later, or is there.

    Raises:
        InputError: it cannot be created, nothing can be created in it, or the path is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112
        raise InputError(f"{what} {folder}: is a file; give the path of a folder")
    try:
        _rehearse(Path(os.path.realpath(folder)) / "file")
    except OSError as error:
        raise InputError(f"{what} {folder}: cannot be created ({error.strerror or error})") from None


def _rehearse(target: Path) -> None:
    """Create and remove a sibling of ``target``, or, where its folder is missing, a folder of another name
    with the same below it: another process may be making the real one meanwhile.

    Raises:
        OSError: that is not possible.
    """
    missing = missing_folders(target.parent)
    if not missing:
        probe = _temporary_sibling(target)
        probe.open("wb").close()
        probe.unlink()
        return
    rehearsal = missing[-1].with_name(f".servesim.{os.getpid()}.tmp")
    try:
        folder = rehearsal / target.parent.relative_to(missing[-1].parent)
        folder.mkdir(parents=True)
        (folder / target.name).open("wb").close()
    finally:
        shutil.rmtree(rehearsal, ignore_errors=True)
