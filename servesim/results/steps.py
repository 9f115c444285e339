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


def draft_columns(instances: Sequence[InstanceLog]) -> dict[str, NDArray[np.int64]]:
    """Columns of the step file that only speculative decoding brings: drafts that a step verified, and those
    of them that it accepted; as many rows as :func:`steps_array` has."""
    if not any(instance.speculation for instance in instances):
        return {}
    counts: dict[str, list[int]] = {"num_draft_tokens": [], "num_accepted_tokens": []}
    for instance in instances:
        log, steps = instance.speculation, len(instance.steps)
        own = (log.draft_tokens, log.accepted_tokens) if log else ([0] * steps, [0] * steps)
        for column, values in zip(counts.values(), own, strict=True):
            column += values
    return {name: np.array(values, dtype=np.int64) for name, values in counts.items()}


def save_steps(
    steps: NDArray[Any],
    path: str | Path,
    metadata: Mapping[str, str],
    more: Mapping[str, NDArray[np.int64]] | None = None,
) -> None:
    """Write the step log as Parquet when ``path`` ends in ``.parquet``, as CSV otherwise.

    ``metadata``: see :attr:`servesim.results.result.Result.metadata`; ``more``: further columns.
    """
    check_suffix(path, TABLE_SUFFIXES, "steps")
    if is_parquet(path):
        require_parquet(path, "steps")
        with atomic_write(path, "wb") as handle:
            _write_parquet(steps, handle, metadata, more or {})
        return
    names = [*FILE_COLUMNS, *(more or {})]
    line = ",".join(["%d"] * len(names)) + "\n"
    with atomic_write(path, "w") as handle:
        handle.write(",".join(names) + "\n")
        for start in range(0, len(steps), _ROWS_AT_ONCE):
            rows = steps[list(FILE_COLUMNS)][start : start + _ROWS_AT_ONCE].tolist()
            if more:
                beside = zip(
                    *(column[start : start + _ROWS_AT_ONCE] for column in more.values()), strict=True
                )
                rows = [(*row, *rest) for row, rest in zip(rows, beside, strict=True)]
            handle.write("".join([line % row for row in rows]))


def _write_parquet(
    steps: NDArray[Any],
    handle: IO[bytes],
    metadata: Mapping[str, str],
    more: Mapping[str, NDArray[np.int64]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({**{name: np.ascontiguousarray(steps[name]) for name in FILE_COLUMNS}, **more})
    table = table.replace_schema_metadata(parquet_metadata(metadata))
    pq.write_table(table, handle, compression="zstd")


def write_steps(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    result.save_steps(path)
    return [path]
