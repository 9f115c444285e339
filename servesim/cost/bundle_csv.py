"""Reading the CSV files of a bundle: fast when they are right, exact about what is wrong when not.

A file has one header line; columns may stand in any order and unknown ones are ignored. ``time_us`` is above
0 and below :data:`MOST_US`, ``alpha`` a finite number, every other number a whole number that is not
negative.

``meta.yaml`` may state under ``files`` what each table is, by which a reader knows that it has it whole:
``tp1/dense.csv: 1234 rows, sha256 0123456789abcdef``, the rows below the header and the first digits of the
checksum of the file with line feeds for line ends, as in a checkout anywhere.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import orjson

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.reading import decoded, read_bytes, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MOST_US = 1e9
"""A quarter of an hour for one kernel: a thousand times what the longest one takes."""
_WAY_OUT = "profile it again, or restore the file"
_REAL_COLUMNS = frozenset({"time_us", "alpha"})
_NUMBERS = frozenset({int, float})
_MOST_ALPHA = 1e9
_EXACT = 2**53  # floats represent every whole number below it


def read_numbers(path: Path, columns: Sequence[str], stamp: Stamp | None = None) -> NDArray[np.float64]:
    """The named number columns of a bundle file, shape (rows, columns); key columns hold whole numbers.

    ``stamp`` is what is stated of the file, None: nothing.

    Raises:
        InputError: with file, line, and what is allowed there.
    """
    return read_labelled(path, (), columns, stamp)[1]


def read_labelled(
    path: Path, labels: Sequence[str], columns: Sequence[str], stamp: Stamp | None = None
) -> tuple[list[tuple[str, ...]], NDArray[np.float64]]:
    """The text columns (one tuple a row) and the number columns (rows, columns) of a bundle file.

    Raises:
        InputError: as :func:`read_numbers`.
    """
    data = read_bytes(path)
    lines = decoded(path, data).splitlines()
    where = _header(path, lines, [*labels, *columns])
    commas = lines[0].count(",")
    rows = [line for line in lines[1:] if line]
    if not rows or any(line.count(",") != commas for line in rows):
        _explain(path, lines, columns, labels)
    width = commas + 1
    texts: list[tuple[str, ...]] = []
    try:
        if width > len(columns):
            fields = ",".join(rows).split(",")
            texts = list(zip(*(map(str.strip, fields[i::width]) for i in where[: len(labels)]), strict=True))
            picked = [_floats(",".join(fields[i::width])) for i in where[len(labels) :]]
            table = np.array(picked, dtype=np.float64).T
        else:
            table = np.array(_floats(",".join(rows)), dtype=np.float64).reshape(-1, width)[:, where]
    except ValueError:
        _explain(path, lines, columns, labels)
    if not _fits(table, columns) or not all(map(all, texts)):
        _explain(path, lines, columns, labels)
    check_whole(path, data, stamp)
    return texts, table


def _floats(fields: str) -> list[float]:
    """Numbers separated by commas; ValueError if one is none.

    They are read as JSON, a fifth of the time that ``float`` takes, unless one is not written as JSON has it.
    """
    try:
        values: list[float] = orjson.loads(f"[{fields}]")
    except orjson.JSONDecodeError:
        values = []
    if values and _NUMBERS.issuperset(map(type, values)):
        return values
    return list(map(float, fields.split(",")))


def refuse_repeats(path: Path, keys: NDArray[np.int64]) -> None:
    """One point measured twice is ambiguous.

    ``keys`` (rows, key columns), in file order.

    Raises:
        InputError: naming both lines.
    """
    order = np.lexsort(keys.T[::-1])
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]).all(axis=1))
    if len(same):
        first, second = (line_of_row(path, row) for row in sorted(order[same[0] : same[0] + 2].tolist()))
        raise InputError(f"{path}: line {second}: the same point as line {first}; keep one of the two rows")


def line_of_row(path: Path, row: int) -> int:
    """Line of the file that holds table row ``row`` (from 0): blank lines do not count as rows."""
    return [number for number, line in enumerate(read_text(path).splitlines(), 1) if line][row + 1]


def _header(path: Path, lines: list[str], columns: Sequence[str]) -> list[int]:
    """Positions of the wanted columns."""
    if not lines or not any(line.strip() for line in lines):
        raise InputError(
            f"{path}: line 1: the file is empty; a header `{','.join(columns)}` is expected; {_WAY_OUT}"
        )
    header = [name.strip() for name in lines[0].split(",")]
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(
            f"{path}: line 1: column {missing[0]} is missing (found `{lines[0][:120]}`); "
            f"the header must have {', '.join(columns)}; {_WAY_OUT}"
        )
    repeated = [name for name in columns if header.count(name) > 1]
    if repeated:
        raise InputError(f"{path}: line 1: column {repeated[0]} stands twice in the header; {_WAY_OUT}")
    return [header.index(name) for name in columns]


def _fits(table: NDArray[np.float64], columns: Sequence[str]) -> bool:
    """Whether every number is one that :func:`_problem` has nothing to say about; there are rows."""
    if not np.isfinite(table).all():
        return False
    for name, values in zip(columns, table.T, strict=True):
        if name == "alpha":
            if np.abs(values).max() > _MOST_ALPHA:
                return False
        elif values.min() < 0:
            return False
        if name == "time_us" and not (values.min() > 0 and values.max() < MOST_US):
            return False
        if name not in _REAL_COLUMNS and not ((values == np.floor(values)) & (values < _EXACT)).all():
            return False
    return True


def _explain(path: Path, lines: list[str], columns: Sequence[str], labels: Sequence[str]) -> NoReturn:
    """Go through the file row by row and report the first thing wrong with it."""
    header = [name.strip() for name in lines[0].split(",")]
    rows = 0
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        rows += 1
        fields = line.split(",")
        if len(fields) != len(header):
            raise InputError(
                f"{path}: line {number}: {len(fields)} fields instead of {len(header)}"
                f"{' (is the file cut short?)' if number == len(lines) else ''}; {_WAY_OUT}"
            )
        for name in labels:
            if not fields[header.index(name)].strip():
                raise InputError(f"{path}: line {number}: {name} is empty; a name is expected; {_WAY_OUT}")
        for name in columns:
            found = fields[header.index(name)].strip()
            problem = _problem(name, found)
            if problem:
                raise InputError(f"{path}: line {number}: {name} is `{found[:40]}`; {problem}; {_WAY_OUT}")
    if not rows:
        raise InputError(f"{path}: line 1: there are no rows below the header; {_WAY_OUT}")
    raise InputError(f"{path}: cannot be read as a table of numbers; {_WAY_OUT}")


def _problem(name: str, found: str) -> str | None:
    try:
        value = float(found)
    except ValueError:
        return "must be a number"
    if not math.isfinite(value):
        return "must be a finite number"
    if name == "alpha":
        return None if abs(value) <= _MOST_ALPHA else f"must be at most {_MOST_ALPHA:g}"
    if value < 0:
        return "must not be negative"
    if name == "time_us" and not 0 < value < MOST_US:
        return f"must be above 0 and below {MOST_US:g} (microseconds)"
    if name not in _REAL_COLUMNS and (value != math.floor(value) or value >= _EXACT):
        return "must be a whole number"
    return None


_DIGITS = 16
_STAMP = re.compile(r"(\d{1,12}) rows, sha256 ([0-9a-f]{16})")
_KEEP_CHANGES = (
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
        raise InputError(f"{path}: {what}{cut}; {_KEEP_CHANGES}")
    raise InputError(
        f"{path}: its content is not what meta.yaml states (sha256 {found.sha256}, stated {stated.sha256}; "
        f"{stated.rows} rows as expected); {_KEEP_CHANGES}"
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
                f"(is the file cut short?); {_KEEP_CHANGES}"
            )


def _largest(points: object) -> int | None:
    """The last point of ``[0, 16, 32]`` or of ``0, 16-2048 x2``; None: neither."""
    if isinstance(points, list):
        return max((point for point in points if isinstance(point, int)), default=None)
    found = re.fullmatch(r"(?:\d+, )*\d+-(\d+) x[\d.]+", points) if isinstance(points, str) else None
    return int(found[1]) if found else None
