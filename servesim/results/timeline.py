"""The run as a Chrome trace: open the file in ui.perfetto.dev or chrome://tracing.

Every instance is a process with lanes: one for its steps, or one for each stage of a pipeline, one for what
waits for the lower tier of its prefix cache, and its requests as spans that are split into queued, prefill,
transfer, decode and preempted. Counters follow running and waiting requests, used KV blocks, tokens of steps
and prefix hits. Links and shared memories are a process with a lane each, in which transfers are spans, and a
counter of the bytes under way. A node whose power is modelled is a process with a counter of its mean power.
The format is the "Trace Event Format" that Chromium publishes; times in it are µs.
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
    from servesim.results.sparse_columns import StartColumn
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


STEPS, TIER = 0, 1000
"""Numbers of lanes of an instance; stage k of a pipeline has k."""


def _named(kind: str, pid: int, name: str, tid: int = 0) -> dict[str, Any]:
    """The name of a process or a lane."""
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _counter(name: str, pid: int, time_ns: int, **values: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": time_ns / 1000, "args": values}


def _events(log: RunLog) -> Iterator[dict[str, Any]]:
    for instance in log.instances:
        name = f"instance {instance.index}: {instance.spec.model_name} on {instance.spec.hardware}"
        yield _named("process_name", instance.index, name)
        sort = {"sort_index": instance.index}
        yield {"ph": "M", "name": "process_sort_index", "pid": instance.index, "tid": 0, "args": sort}
        yield from _steps(instance)
        yield from _gates(instance)
    starts = [instance.steps.start_ns for instance in log.instances]
    for record in log.requests:
        yield from _request(record, log, starts)
    yield from _links(log)


def _steps(instance: InstanceLog) -> Iterator[dict[str, Any]]:
    pid = instance.index
    stages = instance.stages
    for number in range(len(stages) or 1):
        yield _named("thread_name", pid, f"stage {number}" if stages else "steps", STEPS + number)
    columns = [getattr(instance.steps, name) for name in instance.steps.COLUMNS]
    last: dict[str, Any] = {}
    for step, row in enumerate(zip(*columns, strict=True)):
        start, end, prefill, decodes, running, waiting, used, preempted, hit, *_ = row
        span = {
            "ph": "X",
            "name": "prefill + decode" if prefill and decodes else "prefill" if prefill else "decode",
            "pid": pid,
            "args": {
                "step": step,
                "prefill_tokens": prefill,
                "decode_tokens": decodes,
                "preempted": preempted,
                "hit_tokens": hit,
            },
        }
        for number, (begun, ended) in enumerate(_spans(instance, step, start, end)):
            yield {**span, "tid": STEPS + number, "ts": begun / 1000, "dur": (ended - begun) / 1000}
        for name, values in (
            ("requests", {"running": running, "waiting": waiting}),
            ("KV blocks", {"used": used}),
            ("tokens of a step", {"prefill": prefill, "decode": decodes}),
            ("prefix hits", {"tokens": hit}),
        ):
            if last.get(name) != values:
                last[name] = values
                yield _counter(name, pid, start, **values)


def _spans(instance: InstanceLog, step: int, start_ns: int, end_ns: int) -> list[tuple[int, int]]:
    """When a step computed, in each stage."""
    if not instance.stages:
        return [(start_ns, end_ns)]
    return [(stage.start_ns[step], stage.end_ns[step]) for stage in instance.stages]


def _gates(instance: InstanceLog) -> Iterator[dict[str, Any]]:
    """Steps that waited for KV from the lower tier, and what was read and written there."""
    steps, pid, tid = instance.steps, instance.index, TIER
    if instance.tier is None:
        return
    yield _named("thread_name", pid, f"lower tier ({instance.tier.storage})", tid)
    for step, waited in zip(instance.gates.step, instance.gates.ns, strict=True):
        args = {"step": step, "bytes": steps.recalled_bytes[step], "tokens": steps.recalled_tokens[step]}
        begun = steps.start_ns[step]
        yield {
            "ph": "X",
            "name": "recall",
            "pid": pid,
            "tid": tid,
            "ts": begun / 1000,
            "dur": waited / 1000,
            "args": args,
        }
    last = -1
    for start, moved in zip(steps.start_ns, steps.tier_bytes, strict=True):
        if moved != last:
            last = moved
            yield _counter("lower tier", pid, start, bytes=moved)


def _links(log: RunLog) -> Iterator[dict[str, Any]]:
    """Links and memories as the lanes of a process of their own, one after the last node's."""
    if not log.moved:
        return
    pid = len(log.instances) + 1 + max(instance.node for instance in log.instances)
    yield _named("process_name", pid, "links and memories")
    lanes = {name: tid for tid, name in enumerate(dict.fromkeys(p for m in log.moved for p in m.ports))}
    for name, tid in lanes.items():
        yield _named("thread_name", pid, name, tid)
    changes: dict[str, list[tuple[int, int]]] = {name: [] for name in lanes}
    for number, moved in enumerate(log.moved):
        for name in moved.ports:
            # transfers of one link overlap, so they are spans with an id and not stretches of a lane
            base = {"cat": name, "id": number, "name": name, "pid": pid, "tid": lanes[name]}
            yield {"ph": "b", "ts": moved.start_ns / 1000, "args": {"bytes": moved.size}, **base}
            yield {"ph": "e", "ts": moved.end_ns / 1000, **base}
            changes[name] += [(moved.start_ns, moved.size), (moved.end_ns, -moved.size)]
    for name, each in changes.items():
        under_way = 0
        for time_ns, change in sorted(each):
            under_way += change
            yield _counter(f"{name}: under way", pid, time_ns, bytes=under_way)


def _power(log: RunLog, power: NDArray[np.void]) -> Iterator[dict[str, Any]]:
    shown = set()
    for node, start, end, power_w in power.tolist():
        pid = len(log.instances) + node
        if node not in shown:
            shown.add(node)
            yield _named("process_name", pid, f"node {node}")
        yield _counter("power (W)", pid, start, mean=power_w)
        if end == log.end_ns:
            yield _counter("power (W)", pid, end, mean=0)


def _request(record: RequestRecord, log: RunLog, starts: list[StartColumn]) -> Iterator[dict[str, Any]]:
    """A span from arrival to end, and in it one after the other what the request went through."""
    base = {"cat": "request", "id": record.request, "pid": record.decode_instance, "tid": 0}

    def span(name: str, start: int, end: int) -> Iterator[dict[str, Any]]:
        yield {"ph": "b", "name": name, "ts": start / 1000, **base}
        yield {"ph": "e", "name": name, "ts": end / 1000, **base}

    yield {"ph": "b", "name": f"request {record.request}", "ts": record.arrival_ns / 1000, **base}
    yield from span("queued", record.arrival_ns, record.scheduled_ns)
    if record.load_ended_ns >= 0:
        yield from span("KV load", record.load_began_ns, record.load_ended_ns)
    first_ns = record.first_token_ns
    if record.prefill_step is None:
        yield from span("prefill", record.scheduled_ns, first_ns)
    else:
        track, entry = record.prefill_step
        beyond = track - len(log.instances)
        ends = log.instances[track].steps.end_ns if beyond < 0 else log.pipeline_tracks[beyond]
        yield from span("prefill", record.scheduled_ns, ends[entry])
        if record.handed_over_ns > ends[entry]:  # else the decode side loads it later
            yield from span("KV transfer", ends[entry], record.handed_over_ns)
        yield from span("first token", record.handed_over_ns, first_ns)
    lost = []
    for where, step, back_ns in record.away or ():
        begun = starts[where][step] if step < len(starts[where]) else record.end_ns
        if first_ns <= begun < back_ns:  # in its decode; before, it is a part of the prefill
            lost.append((begun, back_ns))
    since = first_ns
    for begun, back_ns in lost:
        yield from span("decode", since, max(begun, since))
        yield from span("preempted", max(begun, since), max(back_ns, since))
        since = max(back_ns, since)
    yield from span("decode", since, record.end_ns)
    yield {"ph": "e", "name": f"request {record.request}", "ts": record.end_ns / 1000, **base}


def write_timeline(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    result.save_timeline(path)
    return [path]
