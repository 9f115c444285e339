"""The run as a benchmark client would have saved it: vLLM's result JSON and AIPerf's table.

So the tools that people have for those files work on simulated runs. Keys and columns are those of ``vllm
bench serve --save-result --save-detailed`` 0.33 and of AIPerf 0.13's ``profile_export_aiperf.csv``. The
client is taken to have no queue of its own, and a request that the engine rejects to have failed.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

_S = 1e9
_MS = 1e6
_DATE = "19700101-000000"
"""In the place of the wall clock's time: equal runs write equal files, and the simulation begins at 0."""


def vllm_result(result: Result) -> dict[str, Any]:
    """The object of ``vllm bench serve --save-result --save-detailed``, requests in order of their ids.

    Times are in s, those with ``_ms`` in ms; ``date`` is the simulation's 0. TPOT, ITL and their statistics
    are computed from the lists as the client does it.
    """
    rows, options = result.requests, result.options
    seconds = _duration_s(rows)
    models = sorted({instance.spec.model_name for instance in result.instances})
    model = ", ".join(models)
    cap = options.max_concurrency if options is not None and options.max_concurrency else None
    inputs, outputs = int(rows["input"].sum()), int(rows["output"].sum())
    tokens_per_s, concurrent = _busiest_second(result)
    return {
        "date": _DATE,
        "endpoint_type": "servesim",
        "backend": "servesim",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(rows) + len(result.rejected),
        "request_rate": _request_rate(result),
        "burstiness": 1.0,
        "max_concurrency": cap,
        "duration": seconds,
        "completed": len(rows),
        "failed": len(result.rejected),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(rows) / seconds if seconds else 0.0,
        "request_goodput": None,
        "output_throughput": outputs / seconds if seconds else 0.0,
        "total_token_throughput": (inputs + outputs) / seconds if seconds else 0.0,
        **_lists(result),
        "max_output_tokens_per_s": tokens_per_s,
        "max_concurrent_requests": concurrent,
        "rtfx": 0.0,
        **_statistics(result, with_queue=cap is not None),
    }


def _duration_s(rows: NDArray[np.void]) -> float:
    """From the first arrival to the last end."""
    return float(rows["end_time"].max() - rows["arrival"].min()) / _S if len(rows) else 0.0


def _request_rate(result: Result) -> float | str:
    """Requests per second that the client was told: what the user said, else what the arrivals come to."""
    asked = result.options.request_rate if result.options is not None else None
    if asked is not None:
        return asked if np.isfinite(asked) else "inf"
    heads = [request.arrival_ns for request in result.workload if request.predecessor < 0]
    span_ns = max(heads) - min(heads) if heads else 0
    return (len(heads) - 1) / (span_ns / _S) if span_ns else "inf"


def _lists(result: Result) -> dict[str, list[Any]]:
    """The lists with an entry for each request, those that failed at their place."""
    rows = result.requests
    done = {record.request: (at, record) for at, record in enumerate(result.records)}
    failed = {rejected.request: rejected for rejected in result.rejected}
    names = (
        *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
        *("generated_texts", "errors"),
    )
    lists: dict[str, list[Any]] = {name: [] for name in names}
    for index in sorted(done.keys() | failed.keys()):
        if index in done:
            at, record = done[index]
            row = rows[at]
            gaps = (result.token_gaps.of(record) / _S).tolist()
            values = (
                *(int(row["input"]), int(row["output"]), row["TTFT"] / _S, gaps, row["latency"] / _S),
                *(row["arrival"] / _S, 0.0, "", ""),
            )
        else:
            rejected = failed[index]
            asked = result.workload.requests[index].input_tokens
            values = (asked, 0, 0.0, [], 0.0, rejected.arrival_ns / _S, 0.0, "", rejected.reason)
        for name, value in zip(names, values, strict=True):
            lists[name].append(value)
    return lists


def _tpots_ns(rows: NDArray[np.void]) -> NDArray[np.float64]:
    """Times per output token of the requests that have more than one, without rounding."""
    many = rows["output"] > 1
    spans: NDArray[np.float64] = (rows["latency"] - rows["TTFT"])[many] / (rows["output"][many] - 1)
    return spans


def _every_gap_ns(result: Result) -> NDArray[np.int64]:
    values, counts = result.token_gaps.histogram()
    return np.repeat(values, counts)


def _statistics(result: Result, *, with_queue: bool) -> dict[str, float]:
    """Mean, median, deviation and P99 of the client's metrics, in ms; 0 where there is nothing."""
    rows = result.requests
    samples: dict[str, NDArray[Any]] = {
        "ttft": rows["TTFT"],
        "tpot": _tpots_ns(rows),
        "itl": _every_gap_ns(result),
        "e2el": rows["latency"],
    }
    if with_queue:
        samples["client_queue_time"] = np.zeros(len(rows))
    found = {}
    for name, sample in samples.items():
        values = sample / _MS if len(sample) else np.zeros(1)
        found[f"mean_{name}_ms"] = float(np.mean(values))
        found[f"median_{name}_ms"] = float(np.median(values))
        found[f"std_{name}_ms"] = float(np.std(values))
        found[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    return found


def _busiest_second(result: Result) -> tuple[float, int]:
    """Most tokens that came within a second, and most requests that were there at some time of a second."""
    rows = result.requests
    if not len(rows):
        return 0.0, 0
    first = int(rows["arrival"].min())
    size = int(rows["end_time"].max() - first) // 10**9 + 2
    tokens = np.zeros(size, dtype=np.int64)
    for record in result.records:
        for track, begin, last in record.token_steps:
            times = result.token_gaps.tracks[track].between(begin, last + 1)
            tokens += np.bincount((times - first) // 10**9, minlength=size)
    changes = np.bincount((rows["arrival"] - first) // 10**9, minlength=size + 1)
    changes = changes - np.bincount((rows["end_time"] - first) // 10**9 + 1, minlength=size + 1)
    return float(tokens.max()), int(np.cumsum(changes).max())


def write_vllm_result(
    result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]
) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    with atomic_write(path, "wb") as handle:
        handle.write(orjson.dumps(vllm_result(result), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    return [path]


# ---------------------------------------------------------------------- AIPerf

_PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_HEADER = ("Metric", "avg", "min", "max", "sum", *(f"p{percent}" for percent in _PERCENTS), "std")


def aiperf_table(result: Result) -> str:
    """The two tables of ``profile_export_aiperf.csv``: figures with percentiles, and single values.

    A request's inter-token latency is its mean, as AIPerf has it (which is its TPOT).
    """
    rows = result.requests
    tpots_ms = _tpots_ns(rows) / _MS
    spread = {  # in the order of AIPerf's tags
        "Input Sequence Length (tokens)": rows["input"],
        "Inter Token Latency (ms)": tpots_ms,
        "Output Sequence Length (tokens)": rows["output"],
        "Output Token Throughput Per User (tokens/sec/user)": 1000 / tpots_ms[tpots_ms > 0],
        "Request Latency (ms)": rows["latency"] / _MS,
        "Time to First Token (ms)": rows["TTFT"] / _MS,
    }
    seconds = _duration_s(rows)
    inputs, outputs = int(rows["input"].sum()), int(rows["output"].sum())
    single = {
        "Benchmark Duration (sec)": seconds,
        "Error Request Count": len(result.rejected),
        "Output Token Throughput (tokens/sec)": outputs / seconds if seconds else 0.0,
        "Request Count": len(rows),
        "Request Throughput (requests/sec)": len(rows) / seconds if seconds else 0.0,
        "Total Input Sequence Length (tokens)": inputs,
        "Total Output Sequence Length (tokens)": outputs,
        "Total Token Throughput (tokens/sec)": (inputs + outputs) / seconds if seconds else 0.0,
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(_HEADER)
    for name, values in spread.items():
        writer.writerow([name, *map(_figure, _row(np.asarray(values)))])
    writer.writerow([])
    writer.writerow(["Metric", "Value"])
    for name, value in single.items():
        writer.writerow([name, _figure(value)])
    return text.getvalue()


def _row(values: NDArray[Any]) -> list[float | int | None]:
    if not len(values):
        return [None] * (len(_HEADER) - 1)
    percentiles = [float(value) for value in np.percentile(values, _PERCENTS)]
    least, most = values.min().item(), values.max().item()
    return [float(values.mean()), least, most, values.sum().item(), *percentiles, float(values.std())]


def _figure(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value}" if isinstance(value, int) else f"{value:.2f}"


def write_aiperf_table(
    result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]
) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    with atomic_write(path, "w") as handle:
        handle.write(aiperf_table(result))
    return [path]
