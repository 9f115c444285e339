"""Any CSV or JSON lines file, with columns that the user names:
``input=prompt_len,output=gen_len,arrival=ts:ms``.

What is on the left of a ``=`` is ours, on the right stands the name in the file: a column of the header, or
a key, with dots for keys of keys (``usage.prompt_tokens``). An arrival says its unit behind a colon (s, ms,
us, ns or date), a pause (``delay``) likewise; ``hashes`` may say the tokens that each stands for.
"""

from __future__ import annotations

import csv
import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.workload.csv_traces import csv_row, date_to_ns
from servesim.workload.entries import MAX_TOKENS, EntryError, session_name, shown, text, whole_number
from servesim.workload.mooncake import (
    MAX_TOKENS_PER_HASH,
    TOKENS_PER_HASH,
    HashReader,
    json_object,
    load_with_sessions,
    set_hashes,
    time_ns,
)
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.workload.formats import Loading

NAMES = ("input", "output", "arrival", "session", "delay", "model", "hashes")
"""What may be named."""
UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
_TIMES = ("arrival", "delay")


def load_columns(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload of a file whose columns ``loading.columns`` names; the earliest request arrives at 0.

    Without ``arrival`` all requests arrive at 0.
    """
    assert loading.columns is not None
    for flag, value in (("--tokenizer", loading.tokenizer), ("--estimate-tokens", loading.estimate_tokens)):
        if value is not None:
            raise InputError(f"{flag} {value}: has no effect beside --columns, which names token counts")
    named = parse_columns(loading.columns)
    first = next(lines)
    header: list[str] | None = None
    if not first[1].lstrip().startswith((b"{", b"[")):
        header = _header(source, first)
        missing = [name for name, _ in named.values() if name not in header]
        if missing:
            raise InputError(
                f"{source}:{first[0]}: --columns: {missing[0]!r} is no column; the header has "
                f"{', '.join(header)}"
            )
    else:
        lines = chain([first], lines)
    return load_with_sessions(source, lines, _Reader(named, header), loading)


def _header(source: str, line: tuple[int, bytes]) -> list[str]:
    try:
        names = next(csv.reader([line[1].decode()]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}:{line[0]}: {error}; --columns needs a CSV header in UTF-8") from None
    return [name.strip() for name in names]


def parse_columns(words: str) -> dict[str, tuple[str, str]]:
    """``"input=a,arrival=b:ms"`` -> ``{"input": ("a", ""), "arrival": ("b", "ms")}``.

    Raises:
        InputError: a name that is not known, given twice, or without its column; input or output missing.
    """
    found: dict[str, tuple[str, str]] = {}
    for part in words.split(","):
        ours, equals, theirs = part.strip().partition("=")
        if not equals or ours not in NAMES or not theirs or ours in found:
            raise InputError(
                f"--columns: {part.strip()!r} is not possible; must be NAME=COLUMN, each NAME once of "
                f"{', '.join(NAMES)}"
            )
        column, _, unit = theirs.rpartition(":") if ours in (*_TIMES, "hashes") else (theirs, "", "")
        if not column:
            column, unit = unit, ""
        allowed = (*UNITS_NS, "date") if ours == "arrival" else tuple(UNITS_NS)
        if ours in _TIMES and not unit:
            raise InputError(
                f"--columns: {part.strip()!r} does not say its unit; must be {ours}={column}: and one of "
                f"{', '.join(allowed)}, such as {ours}={column}:s"
            )
        if ours in _TIMES and unit not in allowed:
            raise InputError(f"--columns: {unit!r} is no unit of {ours}; must be one of {', '.join(allowed)}")
        if ours == "hashes" and unit and not (unit.isdigit() and 1 <= int(unit) <= MAX_TOKENS_PER_HASH):
            raise InputError(
                f"--columns: {unit!r} is not possible; hashes=COLUMN:TOKENS has the tokens of a hash id, 1 "
                f"to {MAX_TOKENS_PER_HASH}"
            )
        found[ours] = column, unit
    for name in NAMES[:2]:
        if name not in found:
            raise InputError(f"--columns: {name}=COLUMN is missing; input and output are needed")
    return found


class _Reader(HashReader):
    """Turns rows or objects into requests."""

    def __init__(self, named: dict[str, tuple[str, str]], header: list[str] | None) -> None:
        super().__init__()
        self._named, self._header = named, header

    def requests(self, line: bytes, index: int) -> list[Request]:
        entry = self._entry(line)
        found = {ours: _value(entry, column) for ours, (column, _) in self._named.items()}
        for ours in NAMES[:2]:
            if found[ours] is None:
                raise EntryError(f"{self._named[ours][0]}: is missing, which --columns names as {ours}")
        request = Request(
            index,
            whole_number(_number(found["input"]), self._named["input"][0], 1, MAX_TOKENS),
            whole_number(_number(found["output"]), self._named["output"][0], 1, MAX_TOKENS),
            0,
        )
        if found.get("session") not in (None, ""):
            request.session_id = session_name(found["session"])
        if found.get("model") not in (None, ""):
            request.model = text(found["model"], self._named["model"][0])
        self._set_times(request, found)
        if found.get("hashes") not in (None, "", []):
            per_hash = int(self._named["hashes"][1] or TOKENS_PER_HASH)
            set_hashes(request, _list(found["hashes"]), per_hash, answers=False)
        if request.session_id is not None:
            self.sessions[request.session_id] = index
        return [request]

    def is_later_turn(self, line: bytes) -> bool:
        try:
            name = _value(self._entry(line), self._named["session"][0])
        except (EntryError, KeyError):
            return False
        return str(name) in self.sessions

    def _entry(self, line: bytes) -> dict[str, Any]:
        if self._header is None:
            return json_object(line)
        return dict(zip(self._header, csv_row(line, len(self._header)), strict=True))

    def _set_times(self, request: Request, found: dict[str, object]) -> None:
        before = -1 if request.session_id is None else self.sessions.get(request.session_id, -1)
        if before >= 0 and "delay" in found:
            request.predecessor = before
            column, unit = self._named["delay"]
            value = _number(found["delay"])
            request.tool_ns = time_ns(0 if value in (None, "") else value, column, unit, UNITS_NS[unit])
        elif "arrival" in found:
            column, unit = self._named["arrival"]
            request.arrival_ns = _arrival_ns(found["arrival"], column, unit)
            request.session_id = None if before >= 0 else request.session_id


def _arrival_ns(value: object, column: str, unit: str) -> int:
    if unit != "date":
        number = _number(value)
        # clocks count from 1970, which is later than any time of a run
        if isinstance(number, (int, float)) and 0 <= number * UNITS_NS[unit] < 2**62:
            return round(number * UNITS_NS[unit])
        return time_ns(number, column, unit, UNITS_NS[unit])
    try:
        return date_to_ns(str(value).strip().replace("T", " "))
    except (ValueError, OverflowError):
        raise EntryError(
            f"{column}: {shown(value)} is not a date, such as 2024-05-10 00:00:00.009930"
        ) from None


def _value(entry: dict[str, Any], column: str) -> object:
    if column in entry:
        return entry[column]
    value: object = entry
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: object) -> object:
    """A cell as the number that it holds; anything else as it is."""
    if isinstance(value, str):
        try:
            value = json.loads(value.strip())
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list(value: object) -> object:
    """Hash ids of a cell: a JSON list, or numbers between blanks or semicolons."""
    if not isinstance(value, str):
        return value
    try:
        return (
            json.loads(value)
            if value.lstrip().startswith("[")
            else [int(part) for part in value.replace(";", " ").split()]
        )
    except ValueError:
        return value
