"""Output files appear whole or not at all: written to a temporary sibling, then renamed over the old file."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from serving.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _open_new(path: Path, mode: str) -> IO[Any]:
    if "b" in mode:
        return path.open(mode)
    return path.open(mode, encoding="utf-8", newline="")


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that readers see the old file or the finished new one, never half of it.

    Parent folders are created; a symbolic link stays a link and its target is replaced; text is UTF-8 with
    ``\\n`` line ends. An existing path that is no regular file (``/dev/null``, a pipe) is written to
    directly. If the body raises, the old file is untouched and the temporary one removed.

    Raises:
        RunError: the file cannot be created, written or renamed (full disk, missing permission).
    """
    target = Path(os.path.realpath(path))
    direct = target.exists() and not target.is_file()
    temporary = target if direct else _temporary_sibling(target)
    try:
        if not direct:
            target.parent.mkdir(parents=True, exist_ok=True)
        with _open_new(temporary, mode) as handle:
            yield handle
        if not direct:
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
    except BaseException as error:
        if not direct:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def check_writable(path: str | Path, what: str) -> None:
    """Find out before a run whether ``path`` can be written after it, by creating and removing a sibling.

    Args:
        path: output file; its folder is created when it is missing.
        what: the option that names the file, for the message (``--output``).

    Raises:
        InputError: the path is a folder, or nothing can be created beside it.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(
            f"{what} {path}: is a folder; give the path of a file, such as {Path(path) / 'run.csv'}"
        )
    if target.exists() and not target.is_file():
        return  # a device or a pipe: nothing to create beside it
    probe = _temporary_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.open("wb").close()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{what} {path}: cannot be written ({error.strerror or error}); "
            "give a path in a folder you can write to"
        ) from error
