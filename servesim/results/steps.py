"""The step log as a structured array and as a file."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np

from servesim.results.atomic import atomic_write, check_suffix
from servesim.results.csv import TABLE_SUFFIXES, is_parquet, parquet_metadata, require_parquet
from servesim.results.step_log import StepLog

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog
    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

STEP_DTYPE = np.dtype([(name, np.int64) for name in ("instance", "step", *StepLog.COLUMNS)])

FILE_COLUMNS = (
    "instance", "step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens", "running", "waiting",
    "kv_blocks_used", "preempted",
)  # fmt: skip
"""Columns of the step file, a fixed contract; the structured array holds all of :data:`STEP_DTYPE`."""

_ROWS_AT_ONCE = 1 << 16


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


def save_steps(steps: NDArray[Any], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the step log as Parquet when ``path`` ends in ``.parquet``, as CSV otherwise.

    ``metadata``: see :attr:`servesim.results.result.Result.metadata`.
    """
    check_suffix(path, TABLE_SUFFIXES, "steps")
    if is_parquet(path):
        require_parquet(path, "steps")
        with atomic_write(path, "wb") as handle:
            _write_parquet(steps, handle, metadata)
        return
    line = ",".join(["%d"] * len(FILE_COLUMNS)) + "\n"
    with atomic_write(path, "w") as handle:
        handle.write(",".join(FILE_COLUMNS) + "\n")
        for start in range(0, len(steps), _ROWS_AT_ONCE):
            rows = steps[list(FILE_COLUMNS)][start : start + _ROWS_AT_ONCE].tolist()
            handle.write("".join([line % row for row in rows]))


def _write_parquet(steps: NDArray[Any], handle: IO[bytes], metadata: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: np.ascontiguousarray(steps[name]) for name in FILE_COLUMNS})
    table = table.replace_schema_metadata(parquet_metadata(metadata))
    pq.write_table(table, handle, compression="zstd")


def write_steps(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    result.save_steps(path)
    return [path]
