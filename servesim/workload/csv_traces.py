"""Published traces in CSV: lengths and mostly times, no token ids.

Azure LLM inference (2023, 2024) and its multimodal one, BurstGPT, ServeGen, and the forms that simulators
exchange, of which some have lengths only.
"""

from __future__ import annotations

import csv
import logging
from datetime import datetime
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import MAX_TIME_NS, MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servesim.workload.formats import Loading

_log = logging.getLogger("servesim")


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """Which columns of a published CSV mean what."""

    name: str
    timestamp: str
    """Empty: the file has no times."""
    input_tokens: str
    output_tokens: str
    to_ns: Callable[[str], int]
    """Time of a row in ns, from any origin."""


def date_to_ns(words: str) -> int:
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
    CsvFormat("Azure LLM trace", "timestamp", "contexttokens", "generatedtokens", date_to_ns),
    CsvFormat("BurstGPT", "timestamp", "request tokens", "response tokens", _seconds_to_ns),
    CsvFormat("simulator's trace", "arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds_to_ns),
    CsvFormat("ServeGen", "timestamp", "input_tokens", "output_tokens", _seconds_to_ns),
    CsvFormat("list of lengths", "", "num_prefill_tokens", "num_decode_tokens", _seconds_to_ns),
)
KNOWN = (
    "TIMESTAMP,ContextTokens,GeneratedTokens (Azure), Timestamp,Model,Request tokens,Response tokens "
    "(BurstGPT), arrived_at,num_prefill_tokens,num_decode_tokens (with or without the time), and "
    "timestamp,input_tokens,output_tokens (ServeGen)"
)
"""The headers, for messages."""
_BURST_MODEL = "GPT-4"


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
        if {known.timestamp or known.input_tokens, known.input_tokens, known.output_tokens} <= set(columns):
            return known
    return None


def load_csv_trace(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload of a CSV trace; its earliest request arrives at 0.

    Of BurstGPT the requests to GPT-4 that were answered are taken, as vLLM's benchmark does, and the others
    counted in `Workload.skipped`; a file without that model is taken as a whole. In other traces a request
    with zero tokens is an error, and `loading.lenient` leaves it out.
    """
    header = next(lines, (1, b""))[1]
    columns = _columns(header)
    known = _format_of(columns)
    if known is None:
        raise InputError(
            f"{source}:1: {shown(header.decode('utf-8', 'replace').strip())} is no known CSV header; known: "
            f"{KNOWN}; name the columns with --columns input=...,output=...,arrival=...:s"
        )
    reader = _RowReader(columns, known)
    first = 0 if reader.is_burst_gpt else loading.num_reqs  # of it, the first that are left
    workload = collect(source, lines, reader.requests, num_reqs=first, lenient=loading.lenient)
    if reader.is_burst_gpt:
        _as_vllm_filters(workload)
        if loading.num_reqs:
            del workload.requests[loading.num_reqs :]
    if "numimages" in columns:
        _log.warning("%s: NumImages is not used: the images' tokens are part of ContextTokens", source)
    if not known.timestamp and loading.keeps_arrivals:
        _log.warning(
            "%s: holds no times: all requests arrive at 0 s; --request-rate gives them a rate", source
        )
    start_at_zero(workload)
    return workload


class _RowReader:
    """Turns rows into requests."""

    def __init__(self, columns: list[str], known: CsvFormat) -> None:
        self._width, self._known = len(columns), known
        self._input, self._output = columns.index(known.input_tokens), columns.index(known.output_tokens)
        self._time = columns.index(known.timestamp) if known.timestamp else -1
        self.is_burst_gpt = known.name == "BurstGPT"
        self._model = columns.index("model") if self.is_burst_gpt and "model" in columns else -1

    def requests(self, line: bytes, index: int) -> list[Request]:
        row = csv_row(line, self._width)
        if self.is_burst_gpt and row[self._output].strip() in ("0", "0.0"):
            return []  # a request that failed
        arrival_ns = 0
        if self._time >= 0:
            try:
                arrival_ns = self._known.to_ns(row[self._time].strip())
            except (ValueError, OverflowError):
                raise EntryError(
                    f"{self._known.timestamp}: {shown(row[self._time])} is not a time of a {self._known.name}"
                ) from None
        request = Request(
            index,
            _tokens(row[self._input], self._known.input_tokens),
            _tokens(row[self._output], self._known.output_tokens),
            arrival_ns,
        )
        if self._model >= 0:
            request.model = row[self._model].strip()
        return [request]


def csv_row(line: bytes, width: int) -> list[str]:
    """The values of a row; EntryError unless there are `width`."""
    try:
        row = next(csv.reader([line.decode()]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise EntryError(f"{error}; must be a row of comma-separated values in UTF-8") from None
    if len(row) != width:
        raise EntryError(f"has {len(row)} values; must have {width}, as the header")
    return row


def _as_vllm_filters(workload: Workload) -> None:
    """Keep the requests to GPT-4 where there are any; the name of the model has done its work then."""
    taken = [request for request in workload.requests if request.model == _BURST_MODEL]
    if taken and len(taken) < len(workload.requests):
        left_out = len(workload.requests) - len(taken)
        workload.skipped += left_out
        workload.requests[:] = taken
        _log.warning(
            "%s: %d requests to other models than %s are left out, as in vLLM's benchmark; name the columns "
            "with --columns to take all",
            *(workload.source, left_out, _BURST_MODEL),
        )
    for index, request in enumerate(workload.requests):
        request.index, request.model = index, None


def _tokens(words: str, field: str) -> int:
    try:
        value: object = int(words)
    except ValueError:
        value = words
    return whole_number(value, field, 1, MAX_TOKENS)
