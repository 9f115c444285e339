"""The result of ``vllm bench serve`` as a recording: stamps of the client, nothing from inside the engine."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.bench.recording import Recording, check_duration, check_span
from servesim.errors import InputError
from servesim.specs.reading import read_text
from servesim.specs.validation import shown

if TYPE_CHECKING:
    from pathlib import Path

_LISTS = ("input_lens", "output_lens", "start_times", "ttfts", "itls")


def load_client_recording(path: Path) -> Recording:
    """Read a result made with ``--save-result --save-detailed``.

    The first token is there ``ttft`` after the start, the last one after all inter-token gaps. The engine's
    arguments are not in the file.

    Raises:
        InputError: the file lacks a list, a request failed, or a number makes no sense.
    """
    columns, model = _columns(path)
    rows = list(zip(*columns, strict=True))
    starts = [_time(path, "start_times", i, row[2]) for i, row in enumerate(rows)]
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
        first_token = arrival + _time(path, "ttfts", i, ttft)
        last_token = first_token + math.fsum(_time(path, "itls", i, gap) for gap in gaps)
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


def _columns(path: Path) -> tuple[list[list[Any]], str | None]:
    try:
        result = json.loads(read_text(path))  # figures of a run that went wrong can be NaN
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is not one JSON document: {error}; a result of `vllm bench serve` is"
        ) from None
    if not isinstance(result, dict):
        raise InputError(f"{path}: is no JSON object; a result of `vllm bench serve` is one")
    columns: list[list[Any]] = []
    for key in _LISTS:
        column = result.get(key)
        if not isinstance(column, list) or not column:
            raise InputError(
                f"{path}: {key}: is missing; a result of `vllm bench serve` has it when made with "
                "--save-detailed"
            )
        if columns and len(column) != len(columns[0]):
            raise InputError(
                f"{path}: {key}: has {len(column)} values, and {_LISTS[0]} has {len(columns[0])}"
            )
        columns.append(column)
    for i, reason in enumerate(result.get("errors") or []):
        if reason:
            raise InputError(f"{path}: errors[{i}]: request {i} failed: {shown(reason)}")
    model = result.get("model_id")
    named = isinstance(model, str) and model and model.isprintable()
    return columns, model if named else None


def _time(path: Path, key: str, index: int, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise InputError(f"{path}: {key}[{index}]: {shown(value)} is not allowed; must be seconds >= 0")
    return float(value)
