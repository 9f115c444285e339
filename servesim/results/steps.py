"""The step log as a structured array and as a file."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np

from servesim.results.atomic import atomic_write, check_suffix
from servesim.results.csv import TABLE_SUFFIXES, is_parquet, parquet_metadata, require_parquet
from servesim.results.step_log import StepLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog, SpeculationLog
    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

STEP_DTYPE = np.dtype([(name, np.int64) for name in ("instance", "step", *StepLog.COLUMNS)])

FILE_COLUMNS = (
    "instance", "step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens", "running", "waiting",
    "kv_blocks_used", "preempted",
)  # fmt: skip
"""Columns of the step file, a fixed contract; the structured array holds all of :data:`STEP_DTYPE`."""

DRAFT_COLUMNS = ("num_draft_tokens", "num_accepted_tokens")
"""Columns that only speculative decoding brings: drafts that a step verified, and those of them that it
accepted."""

_ROWS_AT_ONCE = 1 << 14
_PARQUET_ROWS = 1 << 20
"""Steps of a row group, as pyarrow has it by default."""


def steps_array(instances: Sequence[InstanceLog]) -> NDArray[np.void]:
    """One row per step, instance by instance, of dtype :data:`STEP_DTYPE`; shape (steps,)."""
    total = sum(len(instance.steps) for instance in instances)
    rows = np.empty(total, dtype=STEP_DTYPE)
    start = 0
    for instance in instances:
        part = rows[start : start + len(instance.steps)]
        part["instance"] = instance.index
        part["step"] = np.arange(len(part))
        for name in StepLog.COLUMNS:
            part[name] = instance.steps.column(name)
        start += len(part)
    return rows


def file_columns(instances: Sequence[InstanceLog]) -> tuple[str, ...]:
    """Columns that the step file of these instances has."""
    drafts = any(instance.speculation for instance in instances)
    return (*FILE_COLUMNS, *(DRAFT_COLUMNS if drafts else ()))


def columns_of(instance: InstanceLog, names: Sequence[str], first: int, last: int) -> list[NDArray[np.int64]]:
    """Some of :func:`file_columns` of steps ``first`` to ``last - 1`` of an instance."""

    def drafts(log: SpeculationLog | None, name: str) -> NDArray[np.int64]:
        if log is None:
            return np.zeros(last - first, dtype=np.int64)
        counts = log.draft_tokens if name == "num_draft_tokens" else log.accepted_tokens
        return np.array(counts[first:last], dtype=np.int64)

    found = []
    for name in names:
        if name == "instance":
            found.append(np.full(last - first, instance.index, dtype=np.int64))
        elif name == "step":
            found.append(np.arange(first, last, dtype=np.int64))
        elif name in DRAFT_COLUMNS:
            found.append(drafts(instance.speculation, name))
        else:
            found.append(instance.steps.column(name, first, last))
    return found


def header_line(names: Sequence[str]) -> str:
    """The first line of the CSV file."""
    return ",".join(names) + "\n"


def csv_lines(instance: InstanceLog, names: Sequence[str], first: int, last: int) -> Iterator[str]:
    """The lines of steps ``first`` to ``last - 1`` of an instance, many in one text."""
    line = ",".join(["%d"] * len(names)) + "\n"
    for start in range(first, last, _ROWS_AT_ONCE):
        columns = columns_of(instance, names, start, min(start + _ROWS_AT_ONCE, last))
        yield "".join([line % row for row in zip(*(each.tolist() for each in columns), strict=True)])


def save_steps(instances: Sequence[InstanceLog], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the step log as Parquet when ``path`` ends in ``.parquet``, as CSV otherwise; instance by
    instance, some steps at a time.

    ``metadata``: see :attr:`servesim.results.result.Result.metadata`.
    """
    check_suffix(path, TABLE_SUFFIXES, "steps")
    names = file_columns(instances)
    if is_parquet(path):
        require_parquet(path, "steps")
        with atomic_write(path, "wb") as handle:
            _write_parquet(instances, names, handle, metadata)
        return
    with atomic_write(path, "w") as handle:
        handle.write(header_line(names))
        for instance in instances:
            handle.writelines(csv_lines(instance, names, 0, len(instance.steps)))


def _write_parquet(
    instances: Sequence[InstanceLog], names: Sequence[str], handle: IO[bytes], metadata: Mapping[str, str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.int64()) for name in names])
    schema = schema.with_metadata(parquet_metadata(metadata))
    with pq.ParquetWriter(handle, schema, compression="zstd") as writer:
        for parts in _groups(instances) or [[]]:
            columns = [columns_of(*part[:1], names, *part[1:]) for part in parts]
            joined = [np.concatenate([*each, np.zeros(0, np.int64)]) for each in zip(*columns, strict=True)]
            arrays = [pa.array(each) for each in joined] or [pa.array([], pa.int64()) for _ in names]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _groups(instances: Sequence[InstanceLog]) -> list[list[tuple[InstanceLog, int, int]]]:
    """The steps of all instances, one after the other, in groups of :data:`_PARQUET_ROWS`: of each instance
    in a group the first and behind the last."""
    groups: list[list[tuple[InstanceLog, int, int]]] = []
    room = 0
    for instance in instances:
        first = 0
        while first < len(instance.steps):
            if not room:
                groups.append([])
                room = _PARQUET_ROWS
            last = min(first + room, len(instance.steps))
            groups[-1].append((instance, first, last))
            room -= last - first
            first = last
    return groups


def write_steps(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    if result.step_stream is None or not result.step_stream.hand_over(result.instances):
        result.save_steps(path)
    return [path]
