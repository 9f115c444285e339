"""Loading a workload of any known format; the format is found by looking at the content."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import orjson

from servesim.errors import InputError
from servesim.workload.files import numbered_lines, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servesim.workload.request import Workload

KNOWN = (
    "JSON lines of requests and sessions, Mooncake JSON lines, Azure LLM trace CSV, BurstGPT CSV, "
    "simulators' CSV, vLLM `bench serve` result JSON, ShareGPT JSON (by a tokenizer)"
)


def load_workload(
    path: str | Path,
    *,
    num_reqs: int = 0,
    lenient: bool = False,
    request_rate: float | None = None,
    seed: int = 42,
    tokenizer: str | Path | None = None,
) -> Workload:
    """The workload in the file `path`.

    num_reqs: entries to load from the start of the file, 0 for all; a session is one entry. lenient: leave
    bad entries out and count them in `Workload.skipped`, where otherwise the first ends the loading.
    request_rate: entries per second that the arrivals are scaled to, or replaced by where there is no pattern
    to scale (see `arrivals.change_rate`; `seed` is for that); None: arrivals as they are. tokenizer: a
    `tokenizer.json` or a folder with one, for ShareGPT files, which hold texts.

    Raises InputError with file, line and field for anything wrong.
    """
    if num_reqs < 0:
        raise InputError(f"num_reqs: {num_reqs} is not possible; must be >= 0, and 0 loads all")
    source = str(path)
    lines = numbered_lines(resolve(path), source)
    try:
        first = next(lines)
    except StopIteration:
        raise InputError(f"{source}: is empty; a workload needs at least one request") from None
    seed_of_rate = seed if request_rate is None else None
    workload = _load(source, first, lines, num_reqs, lenient, tokenizer, seed_of_rate)
    if request_rate is not None:
        from servesim.workload.arrivals import change_rate

        change_rate(workload, request_rate, seed)
    return workload


def _load(
    source: str,
    first: tuple[int, bytes],
    rest: Iterator[tuple[int, bytes]],
    num_reqs: int,
    lenient: bool,
    tokenizer: str | Path | None,
    seed_of_rate: int | None,
) -> Workload:
    lines: Iterator[tuple[int, bytes]] = chain([first], rest)
    kind = detect(first[1])
    if kind == "list":  # printed over many lines
        whole = list(lines)
        kind = "sharegpt" if any(b'"conversations"' in line for _, line in whole) else "json"
        lines = iter(whole)
    if tokenizer is not None and kind != "sharegpt":
        raise InputError(
            f"--tokenizer {tokenizer}: {source} holds token counts already; only a ShareGPT file needs one"
        )
    match kind:
        case "jsonl":
            from servesim.workload.jsonl import load_jsonl

            return load_jsonl(source, lines, num_reqs=num_reqs, lenient=lenient)
        case "mooncake":
            from servesim.workload.mooncake import load_mooncake

            return load_mooncake(source, lines, num_reqs=num_reqs, lenient=lenient)
        case "csv":
            from servesim.workload.csv_traces import load_csv_trace

            return load_csv_trace(source, lines, num_reqs=num_reqs, lenient=lenient)
        case "json":
            from servesim.workload.bench_result import load_bench_result

            return load_bench_result(source, lines, num_reqs=num_reqs, lenient=lenient, seed=seed_of_rate)
        case "sharegpt":
            from servesim.workload.sharegpt import load_sharegpt

            return load_sharegpt(source, lines, tokenizer, num_reqs=num_reqs, lenient=lenient)
        case _:
            raise InputError(
                f"{source}:{first[0]}: is no known workload format (starts with {first[1][:40]!r}); "
                f"known are {KNOWN}"
            )


def detect(line: bytes) -> str:
    """The format of a file by its first line: jsonl, mooncake, csv, json (whole), sharegpt, list (either of
    the latter two) or unknown."""
    line = line.strip()
    if line.startswith(b"{"):
        return _detect_object(line)
    if line.startswith(b"["):
        return "sharegpt" if b'"conversations"' in line else "list"
    from servesim.workload.csv_traces import is_csv

    if is_csv(line):
        return "csv"
    # any other line is shown as a bad line of the main format, unless it is not even text
    return "jsonl" if line.isascii() and line[:1] in b'"-0123456789tfn' else "unknown"


def _detect_object(line: bytes) -> str:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        # An opening brace on a line of its own starts a document printed over many lines. The figures of
        # a benchmark may hold NaN, which orjson refuses.
        return "json" if line == b"{" or b'"input_lens"' in line else "jsonl"
    if "conversations" in entry:
        return "sharegpt"
    if "input_length" in entry or "hash_ids" in entry:
        return "mooncake"
    if "input_lens" in entry or "total_token_throughput" in entry:
        return "json"
    return "jsonl"
