"""A run of a real engine, as it was recorded: when each request arrived, was taken in, and had its tokens.

Two forms are read as they are:

- a folder with ``meta.json`` (the engine's arguments), ``requests.jsonl`` (one request a line: lengths,
  arrival on the wall clock, ``queued_ts``, ``scheduled_ts``, ``first_token_ts`` and ``last_token_ts`` on the
  engine's clock, in seconds) and, if they are there, ``timeseries.csv`` and ``cluster.json``;
- the result of ``vllm bench serve --save-result --save-detailed``, stamped by the client, with nothing from
  inside the engine.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass
from servesim.specs.reading import parse_json_object, read_json_object, read_text
from servesim.specs.validation import shown
from servesim.workload.entries import MAX_TIME_NS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.workload.request import Workload

_SECOND = 1e9  # ns
_LENGTHS = ("input_toks", "output_toks")
_STAMPS = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
_TICKS = ("t", "prompt_throughput", "gen_throughput", "running", "waiting")
_RESULT_LISTS = ("input_lens", "output_lens", "start_times", "ttfts", "itls")
_NUMBERED = re.compile(r".*?(\d+)$")


@dataclass(slots=True, frozen=True)
class Ticks:
    """What the engine said about itself every so often; every array of shape (ticks,)."""

    end_s: NDArray[np.float64]
    """Seconds since the recording started; a tick covers the time since the one before."""
    prompt_throughput: NDArray[np.float64]
    """Prompt tokens per second."""
    gen_throughput: NDArray[np.float64]
    """Generated tokens per second."""
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class Recording:
    """One recorded run; every array of shape (requests,), times in ns since the recording started."""

    source: Path
    name: str
    model: str | None
    engine: str
    """What was recorded, for people: ``vLLM 0.19.0``."""
    arguments: dict[str, Any]
    """The engine's arguments, under the engine's own names."""
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    first_token_ns: NDArray[np.int64]
    last_token_ns: NDArray[np.int64]
    queued_ns: NDArray[np.int64] | None = None
    """When the engine took the request in; None: stamped by a client, which cannot see it."""
    scheduled_ns: NDArray[np.int64] | None = None
    ticks: Ticks | None = None
    cluster: Path | None = None
    """The cluster config recorded with it."""
    num_gpu_blocks: int | None = None
    """KV blocks of each replica, as the engine counted them; None: it did not say."""

    def __len__(self) -> int:
        return len(self.input_tokens)

    def anchor_ns(self, anchor: str) -> NDArray[np.int64]:
        """The stamps from which TTFT and latency count: ``queued`` or ``arrival``.

        Raises:
            InputError: the recording has no such stamp.
        """
        if anchor == "arrival":
            return self.arrival_ns
        if self.queued_ns is None:
            raise InputError(
                f"{self.source}: has no stamp of the engine taking a request in, for it was recorded by the "
                "client; --anchor arrival compares from the arrival"
            )
        return self.queued_ns

    @property
    def anchors(self) -> tuple[str, ...]:
        """The anchors there are stamps for, the better one first."""
        return ("arrival",) if self.queued_ns is None else ("queued", "arrival")

    def workload(self) -> Workload:
        """The requests as they were sent, without token ids: nothing is found in a prefix cache."""
        from servesim.workload.request import Request, Workload

        columns = zip(
            self.input_tokens.tolist(), self.output_tokens.tolist(), self.arrival_ns.tolist(), strict=True
        )
        return Workload([Request(i, *values) for i, values in enumerate(columns)], str(self.source))


def load_recording(path: str | Path) -> Recording:
    """Read a recording: a folder, its ``meta.json``, or a ``vllm bench serve`` result.

    Raises:
        InputError: with file, line or field, what was found and what is allowed.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.name != "meta.json":
        return load_client_recording(place)
    folder = place.parent if place.is_file() else place
    if not folder.is_dir():
        raise MissingFileError(
            f"{path}: no such recording; a folder with meta.json and requests.jsonl, or a result of "
            "`vllm bench serve --save-result --save-detailed`, is expected"
        )
    return _load_folder(folder)


def _load_folder(folder: Path) -> Recording:
    meta_path = folder / "meta.json"
    meta = read_json_object(meta_path)
    arguments = meta.get("engine_kwargs")
    if not isinstance(arguments, dict):
        raise InputError(
            f"{meta_path}: engine_kwargs: {_found(meta, 'engine_kwargs')}; must be an object with the "
            "engine's arguments"
        )
    model = meta.get("model", arguments.get("model"))
    if not isinstance(model, str) or not model:
        raise InputError(f"{meta_path}: model: {_found(meta, 'model')}; must be the model's name")
    lengths, stamps = _read_requests(folder / "requests.jsonl")
    expected = meta.get("num_requests", len(lengths))
    if expected != len(lengths):
        raise InputError(
            f"{folder / 'requests.jsonl'}: has {len(lengths)} requests, and num_requests of {meta_path.name} "
            f"is {shown(expected)} (is the file cut short?)"
        )
    arrival, queued = stamps[:, 0], stamps[:, 1]
    start = _start_s(meta, meta_path, arrival)
    # The two clocks tick alike; the request that travelled fastest shows how far they are apart.
    engine_start = start + float((queued - arrival).min())
    check_span(folder, arrival - start)
    check_span(folder, stamps[:, 1:] - engine_start)
    check_duration(folder, float(stamps[:, 4].max() - engine_start - (arrival - start).min()))
    on_engine_clock = [_ns(stamps[:, i] - engine_start) for i in range(1, 5)]
    ticks, cluster = folder / "timeseries.csv", folder / "cluster.json"
    stamps_of = meta.get("stamps")
    by_client = isinstance(stamps_of, dict) and stamps_of.get("side") == "client"
    return Recording(
        source=folder,
        name=folder.resolve().name,
        model=model,
        engine=(f"vLLM {meta['vllm_version']}" if meta.get("vllm_version") else "unknown engine")
        + (", stamped by the client" if by_client else ""),
        arguments=arguments,
        input_tokens=lengths[:, 0],
        output_tokens=lengths[:, 1],
        arrival_ns=_ns(arrival - start),
        queued_ns=None if by_client else on_engine_clock[0],
        scheduled_ns=None if by_client else on_engine_clock[1],
        first_token_ns=on_engine_clock[2],
        last_token_ns=on_engine_clock[3],
        ticks=_read_ticks(ticks) if ticks.exists() else None,
        cluster=cluster if cluster.exists() else None,
        num_gpu_blocks=_recorded_blocks(meta, arguments, meta_path),
    )


def _recorded_blocks(meta: dict[str, Any], arguments: dict[str, Any], meta_path: Path) -> int | None:
    """``kv_cache.num_gpu_blocks``, else what the engine was told or resolved among its arguments.

    Raises:
        InputError: it is no number of blocks.
    """
    cache = meta.get("kv_cache")
    found = {"kv_cache.num_gpu_blocks": cache.get("num_gpu_blocks") if isinstance(cache, dict) else None}
    for name in ("num_gpu_blocks", "num_gpu_blocks_override"):
        found[f"engine_kwargs.{name}"] = arguments.get(name)
    for name, value in found.items():
        if value is None:
            continue
        if type(value) is not int or not 2 <= value < 2**31:
            raise InputError(f"{meta_path}: {name}: {shown(value)} is not allowed; must be at least 2 blocks")
        return value
    return None


def _read_requests(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lengths (requests, 2) and stamps (requests, 5), in the order of the request ids' numbers."""
    lengths: list[list[int]] = []
    stamps: list[list[float]] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        entry = parse_json_object(line, where)
        name = str(entry.get("request_id", number))
        if name in lines_of:
            raise InputError(f"{where}: request_id {shown(name)} stands on line {lines_of[name]} already")
        lines_of[name] = number
        lengths.append([_count(entry, key, where) for key in _LENGTHS])
        stamps.append([_seconds(entry, key, where) for key in _STAMPS])
        for (earlier, a), (later, b) in zip(
            zip(_STAMPS[1:], stamps[-1][1:], strict=True),
            zip(_STAMPS[2:], stamps[-1][2:], strict=False),
            strict=False,
        ):
            if b < a:
                raise InputError(f"{where}: {later} {b} is before {earlier} {a}; stamps go forward")
    if not lengths:
        raise InputError(f"{path}: has no requests; one JSON object a line is expected")
    order = _order(list(lines_of))
    return np.array(lengths, dtype=np.int64)[order], np.array(stamps, dtype=np.float64)[order]


def _order(names: list[str]) -> list[int]:
    """Positions of the requests in the order they had in the workload.

    Ids that end in the numbers 0, 1, … of the workload say it; otherwise the order of the file stands.
    """
    found = [_NUMBERED.match(name) for name in names]
    numbers = [int(match[1]) if match else -1 for match in found]
    if sorted(numbers) == list(range(len(names))):
        return sorted(range(len(names)), key=numbers.__getitem__)
    return list(range(len(names)))


def _read_ticks(path: Path) -> Ticks:
    lines = read_text(path).splitlines()
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    missing = [name for name in _TICKS if name not in header]
    if missing:
        raise InputError(
            f"{path}: line 1: column {missing[0]} is missing; the header must have {', '.join(_TICKS)}"
        )
    rows: list[list[float]] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.split(",")
        try:
            values = [float(fields[header.index(name)]) for name in _TICKS]
        except (ValueError, IndexError):
            values = [math.nan]
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise InputError(
                f"{path}: line {number}: `{line[:60]}` is not {len(header)} numbers that are >= 0"
            )
        if rows and values[0] <= rows[-1][0]:
            raise InputError(f"{path}: line {number}: t {values[0]:g} is not after the line before")
        rows.append(values)
    return Ticks(*np.array(rows, dtype=np.float64).reshape(len(rows), len(_TICKS)).T)


def _start_s(meta: dict[str, Any], path: Path, arrival: NDArray[np.float64]) -> float:
    """When the recording started, on the wall clock: ``started_at`` of meta.json, else the first arrival."""
    first = float(arrival.min())
    started = meta.get("started_at")
    if started is None:
        return first
    try:
        return min(datetime.fromisoformat(str(started)).timestamp(), first)
    except ValueError:
        raise InputError(
            f"{path}: started_at: {shown(started)} is not a time; ISO 8601 is expected, such as "
            "2026-04-25T18:47:18Z"
        ) from None


def _count(entry: dict[str, Any], key: str, where: str) -> int:
    value: Any = entry.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise InputError(f"{where}: {key}: {_found(entry, key)}; must be a whole number > 0")
    return value


def _seconds(entry: dict[str, Any], key: str, where: str) -> float:
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not 0 <= value < 1e12:
        raise InputError(f"{where}: {key}: {_found(entry, key)}; must be seconds >= 0")
    return float(value)


def _found(entry: dict[str, Any], key: str) -> str:
    return f"{shown(entry[key])} is not allowed" if key in entry else "is missing"


def check_span(source: Path, seconds: NDArray[np.float64]) -> None:
    """Refuse stamps, in s since the start, that no recording can hold.

    Raises:
        InputError: they reach further than a workload's clock does.
    """
    low, high = float(seconds.min()), float(seconds.max())
    if low < -MAX_TIME_NS / _SECOND or high > MAX_TIME_NS / _SECOND:
        raise InputError(
            f"{source}: its stamps span {high - min(low, 0.0):g} s; a recording of at most "
            f"{MAX_TIME_NS / _SECOND:.0f} s (104 days) is expected: do all its requests use the same clock?"
        )


def check_duration(source: Path, duration_s: float) -> None:
    """Refuse a recording that took no time: nothing can be compared with it.

    Raises:
        InputError: from its first arrival to its last token there is not even a nanosecond.
    """
    if duration_s < 1 / _SECOND:
        raise InputError(f"{source}: its requests take no time; real stamps are expected")


def _ns(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(seconds * _SECOND).astype(np.int64)


def load_client_recording(path: Path) -> Recording:
    """Read a result made with ``--save-result --save-detailed``.

    The first token is there ``ttft`` after the start, the last one after all inter-token gaps. The engine's
    arguments are not in the file.

    Raises:
        InputError: the file lacks a list, a request failed, or a number makes no sense.
    """
    columns, model = _result_columns(path)
    rows = list(zip(*columns, strict=True))
    starts = [_result_seconds(path, "start_times", i, row[2]) for i, row in enumerate(rows)]
    first_start = min(starts)
    table = np.empty((len(rows), 5), dtype=np.int64)
    for i, (prompt, output, _, ttft, gaps) in enumerate(rows):
        for key, value in (("input_lens", prompt), ("output_lens", output)):
            if type(value) is not int or not 1 <= value < 2**31:
                raise InputError(
                    f"{path}: {key}[{i}]: {shown(value)} is not allowed; must be a whole number > 0 (did the "
                    "request fail? a recording to compare with needs every request to have ended)"
                )
        if not isinstance(gaps, list):
            raise InputError(f"{path}: itls[{i}]: {shown(gaps)} is not allowed; must be a list of seconds")
        arrival = starts[i] - first_start
        first_token = arrival + _result_seconds(path, "ttfts", i, ttft)
        last_token = first_token + math.fsum(_result_seconds(path, "itls", i, gap) for gap in gaps)
        check_span(path, np.array([last_token]))
        table[i] = prompt, output, *(round(seconds * 1e9) for seconds in (arrival, first_token, last_token))
    check_duration(path, float(table[:, 4].max()) / 1e9)
    prompts, outputs, arrivals, first_tokens, last_tokens = (table[:, i].copy() for i in range(5))
    return Recording(
        source=path,
        name=path.stem,
        model=model,
        engine="vLLM bench serve (client side)",
        arguments={},
        input_tokens=prompts,
        output_tokens=outputs,
        arrival_ns=arrivals,
        first_token_ns=first_tokens,
        last_token_ns=last_tokens,
    )


def _result_columns(path: Path) -> tuple[list[list[Any]], str | None]:
    try:
        result = json.loads(read_text(path))  # figures of a run that went wrong can be NaN
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is not one JSON document: {error}; a result of `vllm bench serve` is"
        ) from None
    if not isinstance(result, dict):
        raise InputError(f"{path}: is no JSON object; a result of `vllm bench serve` is one")
    columns: list[list[Any]] = []
    for key in _RESULT_LISTS:
        column = result.get(key)
        if not isinstance(column, list) or not column:
            raise InputError(
                f"{path}: {key}: is missing; a result of `vllm bench serve` has it when made with "
                "--save-detailed"
            )
        if columns and len(column) != len(columns[0]):
            raise InputError(
                f"{path}: {key}: has {len(column)} values, and {_RESULT_LISTS[0]} has {len(columns[0])}"
            )
        columns.append(column)
    for i, reason in enumerate(result.get("errors") or []):
        if reason:
            raise InputError(f"{path}: errors[{i}]: request {i} failed: {shown(reason)}")
    model = result.get("model_id")
    named = isinstance(model, str) and model and model.isprintable()
    return columns, model if named else None


def _result_seconds(path: Path, key: str, index: int, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise InputError(f"{path}: {key}[{index}]: {shown(value)} is not allowed; must be seconds >= 0")
    return float(value)
