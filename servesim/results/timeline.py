"""The run as a Chrome trace: open the file in ui.perfetto.dev or chrome://tracing.

Every instance is a process. Its track "steps" shows every step with its batch, counters follow running and
waiting requests and used KV blocks, and every request is a span from arrival to end, split into queued,
prefill and decode. A node whose power is modelled is a process with a counter of its mean power. The format
is the "Trace Event Format" that Chromium publishes; times in it are µs.
"""

from __future__ import annotations

from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import orjson

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog, RequestRecord, RunLog
    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

_EVENTS_AT_ONCE = 1 << 14


def save_timeline(
    log: RunLog, path: str | Path, power: NDArray[np.void] | None, metadata: Mapping[str, str]
) -> None:
    """Write the trace of a run to ``path`` (JSON).

    ``power``: see :func:`servesim.results.energy.power_series`; ``metadata``:
    :attr:`servesim.results.result.Result.metadata`.
    """
    with atomic_write(path, "wb") as handle:
        handle.write(b'{"displayTimeUnit":"ms","otherData":%s,"traceEvents":[\n' % orjson.dumps(metadata))
        _write(handle, chain(_events(log), () if power is None else _power(log, power)))
        handle.write(b"\n]}\n")


def _write(handle: IO[bytes], events: Iterable[dict[str, Any]]) -> None:
    lines: list[bytes] = []
    first = True
    for event in events:
        lines.append(orjson.dumps(event))
        if len(lines) == _EVENTS_AT_ONCE:
            handle.write((b"" if first else b",\n") + b",\n".join(lines))
            lines, first = [], False
    if lines:
        handle.write((b"" if first else b",\n") + b",\n".join(lines))


def _events(log: RunLog) -> Iterator[dict[str, Any]]:
    for instance in log.instances:
        name = f"instance {instance.index}: {instance.spec.model_name} on {instance.spec.hardware}"
        yield {"ph": "M", "name": "process_name", "pid": instance.index, "args": {"name": name}}
        yield from _steps(instance)
    for record in log.requests:
        yield from _request(record)


def _steps(instance: InstanceLog) -> Iterator[dict[str, Any]]:
    pid = instance.index
    columns = [getattr(instance.steps, name) for name in instance.steps.COLUMNS]
    last_counts = None
    for step, row in enumerate(zip(*columns, strict=True)):
        start, end, prefill, decodes, running, waiting, used, preempted, hit, *_ = row
        yield {
            "ph": "X",
            "name": "prefill + decode" if prefill and decodes else "prefill" if prefill else "decode",
            "pid": pid,
            "tid": "steps",
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": {
                "step": step,
                "prefill_tokens": prefill,
                "decode_tokens": decodes,
                "preempted": preempted,
                "hit_tokens": hit,
            },
        }
        counts = {"running": running, "waiting": waiting}
        if (counts, used) != last_counts:
            last_counts = (counts, used)
            yield {"ph": "C", "name": "requests", "pid": pid, "ts": start / 1000, "args": counts}
            yield {"ph": "C", "name": "KV blocks", "pid": pid, "ts": start / 1000, "args": {"used": used}}


def _power(log: RunLog, power: NDArray[np.void]) -> Iterator[dict[str, Any]]:
    shown = set()
    for node, start, end, power_w in power.tolist():
        pid = len(log.instances) + node
        if node not in shown:
            shown.add(node)
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"node {node}"}}
        yield {"ph": "C", "name": "power (W)", "pid": pid, "ts": start / 1000, "args": {"mean": power_w}}
        if end == log.end_ns:
            yield {"ph": "C", "name": "power (W)", "pid": pid, "ts": end / 1000, "args": {"mean": 0}}


def _request(record: RequestRecord) -> Iterator[dict[str, Any]]:
    base = {"cat": "request", "id": record.request, "pid": record.decode_instance, "tid": "requests"}
    phases = (
        (f"request {record.request}", record.arrival_ns, record.end_ns),
        ("queued", record.arrival_ns, record.scheduled_ns),
        ("prefill", record.scheduled_ns, record.first_token_ns),
        ("decode", record.first_token_ns, record.end_ns),
    )
    for name, start, end in phases:
        yield {"ph": "b", "name": name, "ts": start / 1000, **base}
        yield {"ph": "e", "name": name, "ts": end / 1000, **base}


def write_timeline(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    result.save_timeline(path)
    return [path]
