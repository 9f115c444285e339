"""Where files are found: working directory, then the user's data folder, then the data shipped with us."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from servesim.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGE = Path(__file__).resolve().parent.parent
_BUNDLES = Path("profiler", "perf")
_bundles: ContextVar[Path | None] = ContextVar("bundles", default=None)


def packaged_data_dir() -> Path:
    """Root of the shipped ``configs/``, ``workloads/`` and ``profiler/``.

    ``servesim/_data`` in an installed package; the folder that holds ``servesim/`` in a source checkout.
    """
    data = _PACKAGE / "_data"
    return data if data.is_dir() else _PACKAGE.parent


def user_data_dir() -> Path:
    """The user's own folder for configs and profile bundles; may not exist yet."""
    if sys.platform == "linux":  # as platformdirs has it, which takes as long to load as the JSON reader
        chosen = os.environ.get("XDG_DATA_HOME", "")
        home = os.path.expanduser("~/.local/share")  # noqa: PTH111 - as it is where there is no home
        return Path(chosen if chosen.strip() else home, "servesim")
    import platformdirs

    return Path(platformdirs.user_data_dir("servesim", appauthor=False))


def search_roots() -> list[Path]:
    """The folders a relative path is looked up in, first match first; duplicates left out."""
    roots: list[Path] = []
    for root in (Path.cwd(), user_data_dir(), packaged_data_dir()):
        if root not in roots:
            roots.append(root)
    return roots


@contextmanager
def bundles_from(folder: str | Path | None) -> Iterator[None]:
    """Inside the block, profile bundles are those of ``folder`` alone.

    ``<hardware>/<model>/<variant>`` lie below it; None changes nothing.

    Raises:
        InputError: there is no such folder.
    """
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise InputError(f"{folder}: no such folder; one with <hardware>/<org>/<model>/<variant> is expected")
    token = _bundles.set(Path(folder).expanduser() if folder is not None else _bundles.get())
    try:
        yield
    finally:
        _bundles.reset(token)


_WAYS_OUT = {
    "cluster config": "; correct the path, or take an example of configs/cluster",
    "price file": "; correct the path, or copy configs/prices/examples.yaml",
}
"""What is looked for -> what to do where it is not there."""


def find(relative: str | Path, what: str = "file or folder") -> Path:
    """The first existing place of ``relative``.

    An absolute path, or one that exists from the working directory, is returned as it was given.

    Raises:
        MissingFileError: it is in none of the places; the message lists them.
    """
    path = Path(relative).expanduser()
    chosen = _bundles.get()
    if chosen is not None and path.is_relative_to(_BUNDLES):
        place = chosen / path.relative_to(_BUNDLES)
        if not _exists(place):
            raise MissingFileError(f"{relative}: no such {what}; looked in {chosen}")
        return place
    if _exists(path):
        return path
    if path.is_absolute():
        raise MissingFileError(f"{relative}: no such {what}{_WAYS_OUT.get(what, '')}")
    for root in search_roots()[1:]:
        if _exists(root / path):
            return root / path
    places = ", ".join(str(root) for root in search_roots())
    raise MissingFileError(f"{relative}: no such {what}; looked in {places}{_WAYS_OUT.get(what, '')}")


def find_each(relative: str | Path) -> Iterator[Path]:
    """Every existing place of ``relative``, one after the other, the one that :func:`find` returns first."""
    path = Path(relative)
    chosen = _bundles.get()
    if chosen is not None and path.is_relative_to(_BUNDLES):
        yield from filter(_exists, [chosen / path.relative_to(_BUNDLES)])
        return
    if _exists(path):
        yield path
    for root in search_roots()[1:]:  # asked for last: finding them out takes milliseconds
        if _exists(root / path):
            yield root / path


def find_named(pattern: str, name: str, what: str, way_out: str) -> Path:
    """The file of ``name``, in whose place ``pattern`` has a star: ``configs/pim/*.ini``.

    Raises:
        MissingFileError: it is in none of the places; the message says what is and ends in ``way_out``.
    """
    relative = pattern.replace("*", name)
    try:
        return find(relative)
    except MissingFileError:
        from servesim.specs.validation import nearest

        known = [found.stem for found in find_all(pattern)]
        near = nearest(name, known)
        ask = f"did you mean {near!r}? " if near else ""
        raise MissingFileError(
            f"{relative}: no such {what}; {ask}known: {', '.join(known) or 'none'}. {way_out}"
        ) from None


def find_all(relative_glob: str) -> list[Path]:
    """Every file that matches a relative glob, sorted; of those at one relative path, the first root's."""
    found: dict[str, Path] = {}
    chosen = _bundles.get()
    if chosen is not None and Path(relative_glob).is_relative_to(_BUNDLES):
        return sorted(chosen.glob(Path(relative_glob).relative_to(_BUNDLES).as_posix()))
    for root in search_roots():
        for path in root.glob(relative_glob):
            found.setdefault(path.relative_to(root).as_posix(), path)
    return [found[key] for key in sorted(found)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, a NUL in the name
        return False
