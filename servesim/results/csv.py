"""The per-request file: CSV or Parquet, and the list of rejected requests beside it."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError
from servesim.results.atomic import atomic_write, check_suffix, remove
from servesim.results.stats import GapText

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

MODEL_COLUMN = "model"
ITL_COLUMN = "ITL"
SESSION_COLUMN = "session id"
COLUMNS = (
    "instance id", "request id", MODEL_COLUMN, "input", "output", "arrival", "end_time", "latency",
    "queuing_delay", "TTFT", "TPOT", ITL_COLUMN, "queued", SESSION_COLUMN, "sub request", "prefix hit",
    "npu hit", "storage hit", "preemptions", "decode instance",
)  # fmt: skip
"""Columns of the file in order; the first twelve are a fixed contract, times are integer ns."""

NUMERIC_COLUMNS = tuple(name for name in COLUMNS if name not in (MODEL_COLUMN, ITL_COLUMN, SESSION_COLUMN))

METADATA_PREFIX = "servesim."
"""Of the keys under which the metadata of a Parquet file's schema has those of the run."""
_CSV_ROWS = 4096
_PARQUET_ROWS = 4096
"""Requests per Parquet row group: bounds the inter-token latencies held in memory at once."""


TABLE_SUFFIXES = (".csv", ".parquet")
"""Endings of the files that tables are written to."""


def is_parquet(path: str | Path) -> bool:
    """Whether a file of this name is written as Parquet rather than CSV."""
    return Path(path).suffix.lower() == ".parquet"


def parquet_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a run says of itself, under the keys of a Parquet file."""
    return {METADATA_PREFIX + key: value for key, value in metadata.items()}


def require_parquet(path: str | Path, what: str) -> None:
    """Refuse a ``.parquet`` path when pyarrow is not installed.

    Raises:
        InputError: with the command that installs it.
    """
    if is_parquet(path) and find_spec("pyarrow") is None:
        raise InputError(
            f"{what} {path}: writing Parquet needs pyarrow, which is not installed; "
            "pip install 'servesim[parquet]', or give a path that ends in .csv"
        )


def rejected_path(path: str | Path) -> Path:
    """Where the rejected requests of a run are listed: ``<output>.rejected.jsonl``."""
    return Path(f"{path}.rejected.jsonl")


def save_requests(result: Result, path: str | Path, *, itl: bool = True) -> None:
    """Write one row per finished request, ordered by request id.

    Rejected requests go to ``<path>.rejected.jsonl``; without any, that file is removed.

    Args:
        result: the run.
        path: ``.parquet`` is written as Parquet (pyarrow), everything else as CSV.
        itl: write the inter-token latencies; without them the column stays empty.
    """
    check_suffix(path, TABLE_SUFFIXES, "output")
    if is_parquet(path):
        require_parquet(path, "output")
        with atomic_write(path, "wb") as handle:
            _write_parquet(result, handle, itl=itl)
    else:
        with atomic_write(path, "w") as handle:
            _write_csv(result, handle, itl=itl)
    _save_rejected(result, rejected_path(path))


@lru_cache(maxsize=4096)
def _csv_text(text: str) -> str:
    """A CSV field, quoted when it holds a separator, a quote or a line end."""
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def text_columns(result: Result, start: int = 0, stop: int | None = None) -> dict[str, list[str]]:
    """The columns of text but ITL: name → a value for finished requests ``start`` to ``stop - 1``, for all by
    default, empty where there is none."""
    models = [instance.spec.model_name for instance in result.instances]
    records, sessions = result.records, result.session_ids
    return {
        MODEL_COLUMN: [models[index] for index in records.column("instance", start, stop).tolist()],
        SESSION_COLUMN: [
            sessions.get(request) or "" for request in records.column("request", start, stop).tolist()
        ],
    }


def _write_csv(result: Result, handle: IO[str], *, itl: bool) -> None:
    handle.write(",".join(COLUMNS) + "\n")
    gap_text = GapText(result.token_gaps) if itl else None
    line = ",".join(["%s"] * len(COLUMNS)) + "\n"
    # a few at a time: as Python's numbers they take five times the memory
    for start in range(0, len(result.table), _CSV_ROWS):
        stop = start + _CSV_ROWS
        rows, texts = result.table.rows(start, stop), text_columns(result, start, stop)
        columns: list[list[Any]] = []
        for name in COLUMNS:
            if name in texts:
                columns.append(list(map(_csv_text, texts[name])))
            elif name != ITL_COLUMN:
                columns.append(rows[name.replace(" ", "_")].tolist())
            elif gap_text is not None:
                columns.append([f'"{gap_text.of(record)}"' for record in result.records[start:stop]])
            else:
                columns.append([""] * len(rows))
        handle.writelines(map(line.__mod__, zip(*columns, strict=True)))


def _gap_lists(result: Result, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inter-token latencies of requests start..stop-1 end to end, and where each one's begin."""
    lists = [result.token_gaps.of(record) for record in result.records[start:stop]]
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(gaps) for gaps in lists], out=offsets[1:])
    values = np.concatenate(lists) if lists else np.empty(0, dtype=np.int64)
    return values, offsets


def _write_parquet(result: Result, handle: IO[bytes], *, itl: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {ITL_COLUMN: pa.large_list(pa.int64()), MODEL_COLUMN: pa.string(), SESSION_COLUMN: pa.string()}
    schema = pa.schema([(name, types.get(name, pa.int64())) for name in COLUMNS])
    schema = schema.with_metadata(parquet_metadata(result.metadata))
    with pq.ParquetWriter(handle, schema, compression="zstd") as writer:
        for start in range(0, max(len(result.table), 1), _PARQUET_ROWS):
            stop, columns = start + _PARQUET_ROWS, []
            rows, texts = result.table.rows(start, stop), text_columns(result, start, stop)
            for name in COLUMNS:
                if name in texts:
                    column = pa.array([text or None for text in texts[name]], pa.string())
                elif name != ITL_COLUMN:
                    column = pa.array(np.ascontiguousarray(rows[name.replace(" ", "_")]))
                elif itl:
                    values, offsets = _gap_lists(result, start, stop)
                    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
                else:
                    column = pa.nulls(len(rows), types[ITL_COLUMN])
                columns.append(column)
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _save_rejected(result: Result, path: Path) -> None:
    """Write one JSON line per rejected request; without any, remove what an earlier run left at ``path``."""
    if not result.rejected:
        remove(path)
        return
    with atomic_write(path, "w") as handle:
        handle.writelines(_rejected_lines(result))


def _rejected_lines(result: Result) -> Sequence[str]:
    lines = []
    for rejected in sorted(result.rejected, key=lambda entry: entry.request):
        request = result.workload.requests[rejected.request]
        line = {
            "request id": rejected.request,
            "instance id": rejected.instance,
            "arrival": rejected.arrival_ns,
            "input": request.input_tokens,
            "output": request.output_tokens,
            "session id": request.session_id,
            "sub request": request.sub_request,
            "reason": rejected.reason,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def write_requests(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del extra
    result.save(path, itl=options.itl)
    return [path, str(rejected_path(path))] if result.rejected else [path]
