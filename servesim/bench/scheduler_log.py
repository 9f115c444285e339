"""The log of a scheduler: what it did in every step and when every request got its tokens; how two logs
differ.

On disk a log is JSON lines (gzip when the name ends in ``.gz``): a header, one line a step, one line a
request. A step counts when it has scheduled at least one token; all times are ns on the simulation clock.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass
from servesim.workload.files import numbered_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FORMAT = "servesim-scheduler-log/1"


@dataclass(slots=True)
class LoggedStep:
    """One engine step. Requests are named by their index in the workload."""

    start: int
    """Time at which the step began to run: the end of the step before it, or when it was scheduled."""
    end: int
    sched: dict[int, int]
    """Request -> tokens scheduled, in scheduling order."""
    preempted: list[int] = field(default_factory=list)
    """Requests preempted since the previous step was scheduled, in the order in which they were preempted."""
    finished: list[int] = field(default_factory=list)
    """Requests whose last token came with this step, in the order of :attr:`sched`."""
    free: int = 0
    """Free blocks right after the step was scheduled."""
    free_after: int = 0
    """Free blocks right after its tokens were processed; with asynchronous scheduling the next step is then
    already scheduled."""
    hits: dict[int, int] = field(default_factory=dict)
    """Request admitted (or resumed) in this step -> tokens it found in the prefix cache."""


@dataclass(slots=True)
class LoggedRequest:
    """One request: when things happened to it, and how often it was preempted."""

    req: int
    arrival: int
    queued: int
    """Step boundary at which the engine took it in."""
    scheduled: int
    """Time at which the first step that worked on it was scheduled."""
    first: int
    """Time of its first token."""
    end: int
    hit: int
    """Prompt tokens found in the prefix cache at its first admission."""
    preemptions: int = 0


@dataclass(slots=True)
class SchedulerLog:
    """Header, steps in the order they ran, requests by index."""

    header: dict[str, Any] = field(default_factory=dict)
    steps: list[LoggedStep] = field(default_factory=list)
    requests: list[LoggedRequest] = field(default_factory=list)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The log as JSON objects, one a line."""
        yield {"format": FORMAT, **self.header}
        for step in self.steps:
            yield asdict(step)
        for request in self.requests:
            yield asdict(request)


def log_from_lines(lines: Iterable[dict[str, Any]], where: str = "log") -> SchedulerLog:
    """Build a log from the objects of :meth:`SchedulerLog.lines`; ``where`` names the source in messages."""
    log = SchedulerLog()
    for number, line in enumerate(lines, 1):
        try:
            if "format" in line:
                if line["format"] != FORMAT:
                    raise InputError(
                        f"{where}: line {number}: format {line['format']!r}, expected {FORMAT!r}"
                    )
                log.header = {key: value for key, value in line.items() if key != "format"}
            elif "sched" in line:
                step = LoggedStep(**line)
                step.sched = {int(request): tokens for request, tokens in step.sched.items()}
                step.hits = {int(request): tokens for request, tokens in step.hits.items()}
                log.steps.append(step)
            else:
                log.requests.append(LoggedRequest(**line))
        except TypeError as error:
            raise InputError(
                f"{where}: line {number}: not a step, request or header of a log: {error}"
            ) from None
    return log


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """All JSON objects of a JSON-lines file (``.gz``: compressed)."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; a log is written by `servesim bench record-scheduler`"
        )
    objects = []
    for number, line in numbered_lines(path, str(path)):
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
    return objects


def write_json_lines(path: str | Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line; ``.gz``: compressed without a time stamp, so equal content is equal
    bytes."""
    from servesim.results.atomic import atomic_write

    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    data = text.encode()
    if Path(path).suffix == ".gz":
        data = gzip.compress(data, compresslevel=9, mtime=0)
    with atomic_write(path, mode="wb") as handle:
        handle.write(data)


def read_log(path: str | Path) -> SchedulerLog:
    """Read a log file."""
    return log_from_lines(read_json_lines(path), str(path))


def write_log(path: str | Path, log: SchedulerLog) -> None:
    """Write a log file."""
    write_json_lines(path, log.lines())


def differences(
    reference: SchedulerLog, candidate: SchedulerLog, limit: int = 20, ordered: bool = False
) -> list[str]:
    """Every field in which ``candidate`` departs from ``reference``, as sentences; empty when they agree.

    Steps are compared one by one in all fields, then the requests. The order of the requests within
    :attr:`LoggedStep.sched` counts only if ``ordered``: it tells nothing that :attr:`LoggedStep.finished` and
    the rest of the log do not. After ``limit`` differences the list ends, since one wrong decision changes
    all that follow.
    """
    found: list[str] = []
    for index, (ours, theirs) in enumerate(zip(candidate.steps, reference.steps, strict=False)):
        found += _field_differences(f"step {index}", ours, theirs)
        if ordered and not found and list(ours.sched) != list(theirs.sched):
            found.append(f"step {index}: order {list(ours.sched)}, expected {list(theirs.sched)}")
        if len(found) >= limit:
            return [*found[:limit], "…"]
    if len(candidate.steps) != len(reference.steps):
        found.append(f"{len(candidate.steps)} steps, expected {len(reference.steps)}")
    ours_by_index = {request.req: request for request in candidate.requests}
    for theirs_request in reference.requests:
        ours_request = ours_by_index.pop(theirs_request.req, None)
        if ours_request is None:
            found.append(f"request {theirs_request.req} is missing")
        else:
            found += _field_differences(f"request {theirs_request.req}", ours_request, theirs_request)
        if len(found) >= limit:
            return [*found[:limit], "…"]
    found += [f"request {index} is not in the reference" for index in ours_by_index]
    return found


def _field_differences(name: str, ours: object, theirs: object) -> list[str]:
    found = []
    for item in fields(theirs):  # type: ignore[arg-type]
        got, expected = getattr(ours, item.name), getattr(theirs, item.name)
        if got != expected:
            if isinstance(expected, dict) and isinstance(got, dict):
                keys = [key for key in {**expected, **got} if got.get(key) != expected.get(key)]
                got = {key: got.get(key) for key in keys}
                expected = {key: expected.get(key) for key in keys}
            found.append(f"{name}: {item.name} {got}, expected {expected}")
    return found
