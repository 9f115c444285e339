"""Published traces in CSV: Azure LLM inference (2023, 2024), BurstGPT, and the form that simulators exchange.

Lengths and times, no token ids.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import MAX_TIME_NS, MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """Which columns of a published CSV mean what."""

    name: str
    timestamp: str
    input_tokens: str
    output_tokens: str
    to_ns: Callable[[str], int]
    """Time of a row in ns, from any origin."""


def _date_to_ns(words: str) -> int:
    """``2023-11-16 18:17:03.9799600`` or ``2024-05-10 00:00:00.009930+00:00``, UTC, up to nine decimals."""
    words = words.removesuffix("+00:00").removesuffix("Z")
    whole, _, fraction = words.partition(".")
    if fraction and not (fraction.isascii() and fraction.isdigit() and len(fraction) <= 9):
        raise ValueError(words)
    since = datetime.fromisoformat(whole) - datetime(1970, 1, 1)
    return (since.days * 86_400 + since.seconds) * 10**9 + int(fraction.ljust(9, "0") or 0)


def _seconds_to_ns(words: str) -> int:
    """Seconds since the trace began, whole or decimal."""
    seconds = float(words)
    if not 0 <= seconds <= MAX_TIME_NS / 1e9:
        raise ValueError(words)
    return round(seconds * 1e9)


FORMATS = (
    CsvFormat("Azure LLM trace", "timestamp", "contexttokens", "generatedtokens", _date_to_ns),
    CsvFormat("BurstGPT", "timestamp", "request tokens", "response tokens", _seconds_to_ns),
    CsvFormat("simulator's trace", "arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds_to_ns),
)
KNOWN = (
    "TIMESTAMP,ContextTokens,GeneratedTokens (Azure), Timestamp,Model,Request tokens,Response tokens "
    "(BurstGPT), and arrived_at,num_prefill_tokens,num_decode_tokens"
)
"""The headers, for messages."""


def is_csv(line: bytes) -> bool:
    """Whether a file's first line looks like a CSV file's: short words between commas, and no JSON."""
    words = line.decode("utf-8", "replace").split(",")
    return len(words) > 1 and line.isascii() and line[:1] not in b'"[{' and all(map(_is_word, words))


def _is_word(text: str) -> bool:
    """Whether a cell may be a column's name or a number: there is something in it, and no sentence."""
    text = text.strip()
    return 0 < len(text) <= 60 and text.isprintable() and text.count(" ") < 4


def _columns(header: bytes) -> list[str]:
    return [name.strip().lower() for name in header.decode("utf-8", "replace").split(",")]


def _format_of(columns: list[str]) -> CsvFormat | None:
    for known in FORMATS:
        if {known.timestamp, known.input_tokens, known.output_tokens} <= set(columns):
            return known
    return None


def load_csv_trace(
    source: str, lines: Iterator[tuple[int, bytes]], *, num_reqs: int = 0, lenient: bool = False
) -> Workload:
    """The workload of a CSV trace; its earliest request arrives at 0. BurstGPT's model column is not used.

    Traces hold failed requests with zero tokens: they are errors, and `lenient` leaves them out.
    """
    header = next(lines, (1, b""))[1]
    columns = _columns(header)
    known = _format_of(columns)
    if known is None:
        raise InputError(
            f"{source}:1: {shown(header.decode('utf-8', 'replace').strip())} is no known CSV header; known: "
            f"{KNOWN}; give the columns these names, or make JSON lines of it"
        )
    at_time, at_input, at_output = (
        columns.index(name) for name in (known.timestamp, known.input_tokens, known.output_tokens)
    )

    def requests(line: bytes, index: int) -> list[Request]:
        try:
            row = next(csv.reader([line.decode()]))
        except (UnicodeDecodeError, csv.Error) as error:
            raise EntryError(f"{error}; must be a row of comma-separated values in UTF-8") from None
        if len(row) != len(columns):
            raise EntryError(f"has {len(row)} values; must have {len(columns)}, as the header")
        try:
            time_ns = known.to_ns(row[at_time].strip())
        except (ValueError, OverflowError):
            raise EntryError(
                f"{known.timestamp}: {shown(row[at_time])} is not a time of a {known.name}"
            ) from None
        return [
            Request(
                index,
                _tokens(row[at_input], known.input_tokens),
                _tokens(row[at_output], known.output_tokens),
                time_ns,
            )
        ]

    workload = collect(source, lines, requests, num_reqs=num_reqs, lenient=lenient)
    start_at_zero(workload)
    return workload


def _tokens(words: str, field: str) -> int:
    try:
        value: object = int(words)
    except ValueError:
        value = words
    return whole_number(value, field, 1, MAX_TOKENS)
