"""The folder a replay writes, in the form that ``servesim bench validate`` reads; a rerun goes on from it.

``requests.jsonl`` grows by one line for each finished request while the replay runs; ``meta.json`` says with
which arguments, so that a rerun with others is refused; ``errors.jsonl`` lists what failed in the last
session. The replay second by second (throughput, running and waiting requests) follows from the stamps of the
requests once all are there.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from dataclasses import asdict, field
from datetime import UTC, datetime
from os import fsync
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from servesim._version import __version__
from servesim.errors import InputError, RunError
from servesim.results.atomic import atomic_write, check_creatable
from servesim.slotted import dataclass
from servesim.specs.reading import read_json_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.bench.target import TargetFacts

TICK_S = 1.0
_TICKS_HEADER = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"
_CLIENT_STAMPS = {
    "side": "client",
    "arrival_time": "wall clock when the request was sent",
    "queued_ts": "monotonic clock when the request was sent: a client cannot see the queue",
    "scheduled_ts": "as queued_ts",
    "first_token_ts": "monotonic clock when the first token was received",
    "last_token_ts": "monotonic clock when the last token was received",
    "token_ts": "monotonic clock when each token was received",
}
_ENGINE_STAMPS = {
    "side": "engine",
    "arrival_time": "wall clock when vLLM took the request over",
    "queued_ts": "vLLM's engine core",
    "scheduled_ts": "vLLM's engine core",
    "first_token_ts": "vLLM's engine core",
    "last_token_ts": "vLLM's engine core",
    "token_ts": "monotonic clock when each token left the engine",
}
STAMPS = {"client": _CLIENT_STAMPS, "engine": _ENGINE_STAMPS}
"""Side -> what each stamp of ``requests.jsonl`` means."""


def utc_text(wall_s: float) -> str:
    """A time on the wall clock as ISO 8601."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class Segment:
    """One session of a replay; more than one when it was interrupted and went on. Wall clock, in seconds."""

    started_s: float
    finished_s: float | None = None
    completed: int = 0
    failed: int = 0


@dataclass(slots=True)
class ReplayFolder:
    """The recording as it stands on disk."""

    path: Path
    arguments: dict[str, Any]
    """What decides the outcome; a rerun with other values is refused."""
    segments: list[Segment] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Finished requests."""
    model: str | None = None
    """The model recorded in earlier sessions."""

    @property
    def requests_path(self) -> Path:
        """Where the finished requests are."""
        return self.path / "requests.jsonl"

    @property
    def done(self) -> set[str]:
        """Ids of the finished requests."""
        return {row["request_id"] for row in self.rows}

    def open(self) -> None:
        """See that the folder can be created, or take up what an earlier session left in it.

        A new one is made by :meth:`write_meta`, so that a replay that does not begin leaves none.

        Raises:
            InputError: it holds something else, or a replay with other arguments.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output {self.path}: is a file; give a folder")
        meta_path = self.path / "meta.json"
        if not meta_path.exists():
            if self.requests_path.exists():
                raise InputError(
                    f"--output {self.path}: has a requests.jsonl but no meta.json, so it is no replay that "
                    "could go on; give another folder"
                )
            if not self.path.exists():
                check_creatable(self.path, "--output")
            return
        self._take_up(_read_meta(meta_path))

    def write_meta(
        self, facts: TargetFacts, side: str, dataset: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> None:
        """Write ``meta.json``; ``extra`` wins over what stands there otherwise."""
        last = self.segments[-1]
        meta = {
            "schema_version": 1,
            "model": facts.model,
            "vllm_version": facts.vllm_version,
            "engine_kwargs": {"model": facts.model, **facts.engine_kwargs},
            **dataset,
            "started_at": utc_text(self.segments[0].started_s),
            "finished_at": None if last.finished_s is None else utc_text(last.finished_s),
            "tick_seconds": TICK_S,
            "recorded_by": f"servesim {__version__} bench replay",
            "stamps": STAMPS[side],
            "arguments": self.arguments,
            "segments": [asdict(segment) for segment in self.segments],
            **(extra or {}),
        }
        with atomic_write(self.path / "meta.json", "w") as handle:
            handle.write(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")

    def finish_requests(self) -> None:
        """Put the lines of ``requests.jsonl`` into the order of the workload."""
        self.rows.sort(key=lambda row: int(row["request_id"].rpartition("-")[2]))
        with atomic_write(self.requests_path) as handle:
            handle.writelines(orjson.dumps(row) + b"\n" for row in self.rows)

    def _take_up(self, meta: dict[str, Any]) -> None:
        recorded = meta.get("arguments")
        if not isinstance(recorded, dict) or not isinstance(meta.get("segments"), list):
            raise InputError(
                f"--output {self.path}: holds a recording that bench replay did not make; give another folder"
            )
        changed = [
            f"{name} was {recorded.get(name)!r} and is {value!r}"
            for name, value in self.arguments.items()
            if recorded.get(name) != value
        ]
        if changed:
            raise InputError(
                f"--output {self.path}: holds a replay with other arguments: {'; '.join(changed)}; give the "
                "same arguments to go on with it, or another folder"
            )
        self.model = meta.get("model")
        self.segments = [Segment(**segment) for segment in meta["segments"]]
        self.rows = _read_rows(self.requests_path)


class Journal:
    """Appends lines to a file from a thread of its own: a slow disk must not delay the stamps.

    What :meth:`append` was given is on the disk, whole lines in order, at the latest when :meth:`close`
    returns; normally a few milliseconds later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def append(self, row: dict[str, Any]) -> None:
        """Have one line written.

        Raises:
            RunError: an earlier line could not be written.
        """
        self._check()
        self._lines.put(orjson.dumps(row) + b"\n")

    def close(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            RunError: a line could not be written.
        """
        self._lines.put(None)
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            reason = self._error.strerror or self._error
            raise RunError(f"{self._path}: cannot be written: {reason}") from self._error

    def _write(self) -> None:
        try:
            with self._path.open("ab") as handle:
                going_on = True
                while going_on:
                    lines = [self._lines.get()]
                    while not self._lines.empty():
                        lines.append(self._lines.get())
                    going_on = lines[-1] is not None
                    handle.writelines(line for line in lines if line is not None)
                    handle.flush()
                    fsync(handle.fileno())
        except OSError as error:
            self._error = error


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except InputError as error:
        raise InputError(f"{error}; give another --output folder") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``requests.jsonl``; a last line that was cut short is removed from the file."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    good = 0
    with path.open("r+b") as handle:
        for number, line in enumerate(handle, 1):
            row = _row(line)
            if row is None:
                if handle.read(1):
                    raise InputError(
                        f"{path}: line {number}: is no finished request; give another --output folder"
                    )
                handle.truncate(good)
                break
            rows.append(row)
            good += len(line)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("request_id"), str) else None


def tick_rows(
    rows: Sequence[dict[str, Any]], segments: Sequence[Segment], tick_s: float
) -> list[tuple[float, float, float, int, int]]:
    """(seconds since the start, prompt tokens/s, generated tokens/s, running, waiting) of every tick.

    A prompt counts in the tick of its first token; a request waits from being sent to its first token and
    runs from there to its last. Without times of single tokens they are spread evenly. Pauses between two
    sessions are left out.
    """
    if not rows or not segments:
        return []
    origin = segments[0].started_s
    sent = np.array([row["arrival_time"] for row in rows]) - origin
    # from the engine's or the client's monotonic clock to seconds since the start, request by request
    shift = sent - np.array([row["queued_ts"] for row in rows])
    first = np.array([row["first_token_ts"] for row in rows]) + shift
    last = np.array([row["last_token_ts"] for row in rows]) + shift
    tokens = np.concatenate([_token_times(row) + offset for row, offset in zip(rows, shift, strict=True)])
    prompts = np.array([row["input_toks"] for row in rows], dtype=np.float64)
    end_s = float(last.max())
    spans = [(each.started_s - origin, (each.finished_s or math.inf) - origin) for each in segments]
    edges = np.arange(0.0, end_s + 2 * tick_s, tick_s)
    prompt_sums, _ = np.histogram(first, edges, weights=prompts)
    token_sums, _ = np.histogram(tokens, edges)
    table = []
    for i, end in enumerate(edges[1:].tolist()):
        if end - tick_s <= end_s and any(start <= end and end - tick_s <= stop for start, stop in spans):
            running = int(((first <= end) & (end < last)).sum())
            waiting = int(((sent <= end) & (end < first)).sum())
            table.append(
                (end, float(prompt_sums[i] / tick_s), float(token_sums[i] / tick_s), running, waiting)
            )
    return table


def save_ticks(
    path: Path, rows: Sequence[dict[str, Any]], segments: Sequence[Segment], tick_s: float
) -> None:
    """Write :func:`tick_rows` as CSV; ``kv_cache_pct`` stays empty, for a client cannot see it."""
    with atomic_write(path, "w") as handle:
        handle.write(_TICKS_HEADER + "\n")
        for end, prompt, generated, running, waiting in tick_rows(rows, segments, tick_s):
            handle.write(f"{end:.1f},{prompt:.1f},{generated:.1f},{running},{waiting},\n")


def _token_times(row: dict[str, Any]) -> NDArray[np.float64]:
    """Times of a request's tokens on the clock of its stamps."""
    if "token_ts" in row:
        return np.array(row["token_ts"], dtype=np.float64)
    return np.linspace(row["first_token_ts"], row["last_token_ts"], row["output_toks"])
