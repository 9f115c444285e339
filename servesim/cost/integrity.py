"""Whether a bundle's tables are whole: the rows and checksums that its ``meta.yaml`` states under ``files``.

An entry reads ``tp1/dense.csv: 1234 rows, sha256 0123456789abcdef``: rows below the header, and the first
digits of the checksum of the file with line feeds for line ends, as in a checkout anywhere.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MOST_US = 1e9
"""A quarter of an hour for one kernel: a thousand times what the longest one takes."""
_DIGITS = 16
_STAMP = re.compile(r"(\d{1,12}) rows, sha256 ([0-9a-f]{16})")
_WAY_OUT = (
    "restore the file, or make the bundle again; to use a table that was changed on purpose, remove its line "
    "from `files` in meta.yaml"
)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a table's file should be."""

    rows: int
    sha256: str
    """The first digits."""

    def __str__(self) -> str:
        return f"{self.rows} rows, sha256 {self.sha256}"


def stamp_of(data: bytes) -> Stamp:
    """The stamp of a table's file."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    return Stamp(max(lines - 1, 0), hashlib.sha256(data).hexdigest()[:_DIGITS])


def stated_stamps(meta: dict[str, Any], path: Path) -> dict[str, Stamp]:
    """Table (``tp1/dense.csv``) -> stamp, from ``files`` of ``meta.yaml`` at ``path``; empty: none stated.

    Raises:
        InputError: an entry is none.
    """
    stated = meta.get("files")
    if stated is None:
        return {}
    if not isinstance(stated, dict):
        raise InputError(f"{path}: files: {stated!r} is not allowed; must be a mapping `table: rows, sha256`")
    return {str(name): _parsed(entry, f"{path}: files.{name}") for name, entry in stated.items()}


def _parsed(entry: object, where: str) -> Stamp:
    found = _STAMP.fullmatch(entry) if isinstance(entry, str) else None
    if found is None:
        raise InputError(f"{where}: {entry!r} is not allowed; must read `<count> rows, sha256 <16 digits>`")
    return Stamp(int(found[1]), found[2])


def check_whole(path: Path, data: bytes, stated: Stamp | None) -> None:
    """Compare a table as read with what is stated of it; None: nothing is.

    Raises:
        InputError: it is not that file.
    """
    if stated is None:
        return
    found = stamp_of(data)
    if found == stated:
        return
    if found.rows != stated.rows:
        what = f"{found.rows} rows, where meta.yaml states {stated.rows}"
        cut = " (is the file cut short?)" if found.rows < stated.rows else ""
        raise InputError(f"{path}: {what}{cut}; {_WAY_OUT}")
    raise InputError(
        f"{path}: its content is not what meta.yaml states (sha256 {found.sha256}, stated {stated.sha256}; "
        f"{stated.rows} rows as expected); {_WAY_OUT}"
    )


_GRID_AXES = {
    "prefill_chunk": "chunks",
    "n_decode": "n_decode",
    "kv_prefill": "histories",
    "kv_decode": "kv",
}
"""Axis of attention.csv -> its name in ``attention_grid`` of meta.yaml where every point of it is there; a
sweep that memory may end early has other names for its lengths."""


def check_grid(path: Path, keys: NDArray[np.int64], meta: dict[str, Any]) -> None:
    """Compare attention.csv with the largest points that ``attention_grid`` of meta.yaml says it has.

    ``keys`` (rows, axes), the axes in the order of :data:`_GRID_AXES`.

    Raises:
        InputError: it reaches less far, as a table that was cut short does.
    """
    grid = meta.get("attention_grid")
    if not isinstance(grid, dict):
        return
    for reached, (axis, name) in zip(keys.max(axis=0).tolist(), _GRID_AXES.items(), strict=True):
        stated = _largest(grid.get(name))
        if stated is not None and reached < stated:
            raise InputError(
                f"{path}: {axis} reaches {reached}, where attention_grid of meta.yaml states {stated} "
                f"(is the file cut short?); {_WAY_OUT}"
            )


def _largest(points: object) -> int | None:
    """The last point of ``[0, 16, 32]`` or of ``0, 16-2048 x2``; None: neither."""
    if isinstance(points, list):
        return max((point for point in points if isinstance(point, int)), default=None)
    found = re.fullmatch(r"(?:\d+, )*\d+-(\d+) x[\d.]+", points) if isinstance(points, str) else None
    return int(found[1]) if found else None
