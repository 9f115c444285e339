"""Results of ``vllm bench serve --save-result --save-detailed`` and of SGLang's ``bench_serving
--output-details``: lengths and start times of a real run."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from servesim.errors import InputError
from servesim.workload.arrivals import arrivals_ns, start_at_zero
from servesim.workload.entries import MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from servesim.workload.entries import Item
    from servesim.workload.formats import Loading

_log = logging.getLogger("servesim")
KEYS = ("input_lens", "output_lens", "start_times")


def load_bench_result(source: str, lines: Iterable[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload that a benchmark run sent: one request a list item; the earliest arrives at 0.

    Results without start times (vLLM before 2026, SGLang) get arrivals at the ``request_rate`` and with the
    ``burstiness`` that they state, made from `loading.seed` as the client makes them, and a warning says so;
    they are all 0 where a rate given by the user is to replace them.
    Requests that failed have no output: they are errors, and `loading.lenient` leaves them out.
    """
    columns = _columns(
        source, whole_document(source, lines), loading.seed if loading.keeps_arrivals else None
    )

    def requests(row: tuple[Any, ...], index: int) -> list[Request]:
        start = row[2]
        if type(start) not in (int, float) or not (math.isfinite(start) and 0 <= start * 1e9 < 2**62):
            raise EntryError(f"start_times: {shown(start)} is not possible; must be seconds >= 0")
        return [
            Request(
                index,
                whole_number(row[0], "input_lens", 1, MAX_TOKENS),
                whole_number(row[1], "output_lens", 1, MAX_TOKENS),
                round(start * 1e9),
            )
        ]

    return of_document(source, zip(*columns, strict=True), requests, loading)


def of_document(
    source: str,
    entries: Iterable[Item],
    parse: Callable[[Item, int], list[Request]],
    loading: Loading,
) -> Workload:
    """The requests of a document's entries, named by their number in messages; the earliest arrives at 0."""
    workload = collect(
        *(source, enumerate(entries, 1), parse),
        num_reqs=loading.num_reqs,
        lenient=loading.lenient,
        place=": request ",
    )
    start_at_zero(workload)
    return workload


def whole_document(source: str, lines: Iterable[tuple[int, bytes]]) -> Any:
    """The one JSON document that a file is."""
    document = b"\n".join(line for _, line in lines)
    try:
        return json.loads(document)  # not orjson: figures of a run that went wrong can be NaN
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source}: is not one whole JSON document: {error}; a workload is JSON lines, "
            f"one object a line, or one result of a benchmark (append mode writes several: split them)"
        ) from None


def _columns(source: str, result: object, seed: int | None) -> list[list[object]]:
    """The three lists, of equal length."""
    if not isinstance(result, dict):
        raise InputError(
            f"{source}: is JSON, but a {'list' if isinstance(result, list) else 'value'}; a workload is "
            f"JSON lines, one object a line (`jq -c '.[]'` makes such), or one result of `vllm bench serve`"
        )
    if "input_config" in result or "aiperf_version" in result:
        raise InputError(
            f"{source}: holds statistics of a run, and no request; give AIPerf's profile_export.jsonl, or "
            "genai-perf's profile_export.json"
        )
    for key in KEYS[:2]:
        if not isinstance(result.get(key), list):
            raise InputError(
                f"{source}: {key}: is missing; a `vllm bench serve` result has it when made with "
                f"--save-detailed, one of SGLang with --output-details, and JSON lines must be one object a "
                "line"
            )
    inputs, outputs = result["input_lens"], result["output_lens"]
    starts = result.get("start_times") or _made_starts(source, result, len(inputs), seed)
    if not isinstance(starts, list) or not len(inputs) == len(outputs) == len(starts):
        raise InputError(
            f"{source}: input_lens, output_lens and start_times must be lists of the same length"
        )
    return [inputs, outputs, starts]


def _made_starts(source: str, result: dict[str, Any], count: int, seed: int | None) -> list[float]:
    """Start times in s of a result that has none: as its client made them, from another random seed.

    vLLM draws gamma gaps of shape ``burstiness`` (1: a Poisson process) and stretches them so that the last
    request comes at the time that the rate says.
    """
    if seed is None or count < 2:
        return [0.0] * count
    rate, burstiness = result.get("request_rate"), result.get("burstiness", 1.0)
    if rate in (math.inf, "inf"):
        return [0.0] * count
    if not (_is_positive(rate) and _is_positive(burstiness)):
        _log.warning(
            "%s: holds neither start_times nor a request_rate: all requests arrive at 0 s; "
            "--request-rate gives them a rate",
            source,
        )
        return [0.0] * count
    cv = 1 / math.sqrt(burstiness)
    arrivals = arrivals_ns("gamma", count, rate, np.random.default_rng(seed), cv=cv)
    stretch = (count - 1) / rate / max(int(arrivals[-1]) / 1e9, 1e-9)
    most = result.get("max_concurrency")
    _log.warning(
        "%s: holds no start_times: arrivals are made at its request_rate %g and burstiness %g, seed %d%s",
        *(source, rate, burstiness, seed),
        f"; its client kept at most {most} requests in flight: --max-concurrency {most}" if most else "",
    )
    return [float(at) * 1e-9 * stretch for at in arrivals]


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and 1e-9 <= value <= 1e9
