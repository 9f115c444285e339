"""Reading the CSV files of a bundle: fast when they are right, exact about what is wrong when not.

A file has one header line; columns may stand in any order and unknown ones are ignored. ``time_us`` is above
0 and below :data:`~servesim.cost.integrity.MOST_US`, ``alpha`` a finite number, every other number a whole
number that is not negative.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import orjson

from servesim.cost.integrity import MOST_US, check_whole
from servesim.errors import InputError
from servesim.specs.reading import decoded, read_bytes, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.cost.integrity import Stamp

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
