"""Records that other benchmark clients and generators leave: AIPerf, GuideLLM, ServeGen. Lengths and times.

Every request keeps the time at which it was sent. Where a client waited for answers before it sent more,
those times are of the server that it measured: `--max-concurrency` closes the loop again.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.workload.arrivals import start_at_zero
from servesim.workload.bench_result import of_document, whole_document
from servesim.workload.entries import MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.mooncake import json_object, time_ns
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.workload.formats import Loading

_log = logging.getLogger("servesim")
_S = 1_000_000_000
_LATEST_S = 2**62 / 1e9  # clocks count from 1970


def load_aiperf(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """AIPerf's ``profile_export.jsonl``: a request a line; warm-up, failed and cancelled
    requests are left out."""

    def requests(line: bytes, index: int) -> list[Request]:
        entry = json_object(line)
        told, metrics = entry.get("metadata"), entry.get("metrics")
        if not isinstance(told, dict) or not isinstance(metrics, dict):
            raise EntryError("metadata, metrics: are missing; must be objects")
        if entry.get("error") or told.get("was_cancelled"):
            return []
        if told.get("benchmark_phase", "profiling") != "profiling":
            return []
        start_ns = whole_number(told.get("request_start_ns"), "metadata.request_start_ns", 0, 2**63 - 1)
        lengths = []
        for name in ("input_sequence_length", "output_sequence_length"):
            metric = metrics.get(name)
            value = metric.get("value") if isinstance(metric, dict) else metric
            lengths.append(whole_number(_whole(value), f"metrics.{name}", 1, MAX_TOKENS))
        return [Request(index, lengths[0], lengths[1], start_ns)]

    workload = collect(source, lines, requests, num_reqs=loading.num_reqs, lenient=loading.lenient)
    start_at_zero(workload)
    return workload


def load_guidellm(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The requests that succeeded in the first benchmark of GuideLLM's ``benchmarks.json``."""
    benchmarks = whole_document(source, lines)["benchmarks"]
    first = benchmarks[0] if isinstance(benchmarks, list) and benchmarks else None
    told = first.get("requests") if isinstance(first, dict) else None
    sent = told.get("successful", told.get("completed")) if isinstance(told, dict) else told
    if not isinstance(sent, list):
        raise InputError(
            f"{source}: benchmarks[0].requests.successful: is missing; GuideLLM writes requests when its "
            "output is .json"
        )
    if len(benchmarks) > 1:
        _log.warning("%s: holds %d benchmarks: the first is taken", source, len(benchmarks))

    def requests(entry: object, index: int) -> list[Request]:
        if not isinstance(entry, dict):
            raise EntryError(f"{shown(entry)} is no request; must be an object")
        prompt = _first(entry, ("prompt_tokens",), ("input_metrics", "text_tokens"))
        output = _first(entry, ("output_tokens",), ("output_metrics", "text_tokens"))
        start = _first(
            *(entry, ("request_start_time",), ("start_time",)),
            ("info", "timings", "request_start"),
            ("scheduler_info", "request_timings", "request_start"),
        )
        return [
            Request(
                index,
                whole_number(_whole(prompt), "prompt_tokens", 1, MAX_TOKENS),
                whole_number(_whole(output), "output_tokens", 1, MAX_TOKENS),
                _clock_ns(start, "request_start_time"),
            )
        ]

    return of_document(source, sent, requests, loading)


def load_servegen(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """Requests as ServeGen generates them: ``{"request_id", "timestamp" in s, "data": {"input_tokens",
    "output_tokens"}}``."""

    def requests(line: bytes, index: int) -> list[Request]:
        entry = json_object(line)
        data = entry.get("data")
        if not isinstance(data, dict):
            raise EntryError(
                f"data: {shown(data)} is not an object; must hold input_tokens and output_tokens"
            )
        return [
            Request(
                index,
                whole_number(_whole(data.get("input_tokens")), "data.input_tokens", 1, MAX_TOKENS),
                whole_number(_whole(data.get("output_tokens")), "data.output_tokens", 1, MAX_TOKENS),
                time_ns(entry.get("timestamp"), "timestamp", "seconds", _S),
            )
        ]

    workload = collect(source, lines, requests, num_reqs=loading.num_reqs, lenient=loading.lenient)
    start_at_zero(workload)
    return workload


def _first(entry: dict[str, Any], *paths: tuple[str, ...]) -> object:
    """The first value that is there at one of some paths of keys."""
    for path in paths:
        value: object = entry
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _whole(value: object) -> object:
    """550.0 as 550: clients write counts as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _clock_ns(value: object, field: str) -> int:
    """Seconds of any clock in ns; EntryError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EntryError(f"{field}: {shown(value)} is not a number; must be seconds")
    if not 0 <= value <= _LATEST_S:
        raise EntryError(f"{field}: {shown(value)} is not possible; must be seconds >= 0")
    return round(value * 1e9)
