"""One case in this process, within limits of time and memory, and what is wrong with how it ended."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import os
import resource
import shutil
import signal
import warnings
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from servesim.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.cases import Case

CPU_S = 10.0
"""Processor time that a case may take; none of them has more than a few requests."""
MEMORY_BYTES = 2 << 30
"""Address space beyond what the process has at its start."""
_rarely = cycle([False] * 19 + [True]).__next__
OUTPUT_CHARACTERS = 5_000_000
STATUSES = (0, 1, 2, 130)


class OutOfTimeError(BaseException):
    """The case took longer than it may."""


class TooMuchOutputError(BaseException):
    """The case printed more than it may."""


class _Screen(io.StringIO):
    """Takes what a case prints, up to a limit."""

    def __init__(self) -> None:
        super().__init__()
        self._left = OUTPUT_CHARACTERS

    def write(self, text: str) -> int:
        self._left -= len(text)
        if self._left < 0:
            raise TooMuchOutputError
        return super().write(text)


@dataclass
class Outcome:
    """How a case ended."""

    status: int | None
    faults: list[str]
    stderr: str


def limit_memory() -> None:
    """From here on this process gets no more than :data:`MEMORY_BYTES` on top of what it has."""
    with Path("/proc/self/statm").open() as handle:
        used = int(handle.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def judge(case: Case, keep: Path | None = None) -> Outcome:
    """Run the case in a folder of its own (``keep``, which stays, or a temporary one)."""
    folder = keep or Path(mkdtemp(prefix="fuzz-"))
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    here = Path.cwd()
    os.chdir(folder)
    try:
        outcome = _run(case, folder)
        if outcome.faults or _rarely():
            gc.collect()  # servesim puts off looking for garbage, and a case must not pay for those before it
        return outcome
    finally:
        os.chdir(here)
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _run(case: Case, folder: Path) -> Outcome:
    before = _files(folder)
    out, err = _Screen(), _Screen()
    status: int | None = None
    faults: list[str] = []
    shower = warnings.showwarning
    try:
        with _time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(case.argv)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except OutOfTimeError:
        faults.append(f"takes more than {CPU_S:g} s")
    except TooMuchOutputError:
        faults.append(f"prints more than {OUTPUT_CHARACTERS:,} characters")
    except BaseException as error:  # whatever gets out of main
        faults.append(f"{type(error).__name__} gets out of main: {error}"[:300])
    finally:
        warnings.showwarning = shower
    words = err.getvalue() + out.getvalue()
    bad = ("a fault of servesim", "Traceback (")
    faults += [line.strip()[:500] for line in words.splitlines() if any(word in line for word in bad)]
    if status is not None and status not in STATUSES:
        faults.append(f"exit status {status}")
    if status == 2 and not err.getvalue().strip():
        faults.append("exit status 2 without a message")
    faults += _bad_files(folder, before, case, status)
    return Outcome(status, faults, err.getvalue())


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _bad_files(folder: Path, before: set[str], case: Case, status: int | None) -> Iterator[str]:
    """Files that are left over, half written, missing, or there although nothing was done."""
    made = sorted(_files(folder) - before)
    asked = [word for word in case.argv if word.endswith((".csv", ".json", ".jsonl", ".html"))]
    for name in made:
        if name.endswith(".tmp"):
            yield f"{name} is left over"
        elif (folder / name).is_dir():
            continue
        elif name not in asked and not name.endswith(".rejected.jsonl") and "--output-root" not in case.argv:
            yield f"{name} was not asked for"
        elif status == 2:
            yield f"{name} was written although the input was refused"
        elif reason := _half_written(folder / name):
            yield f"{name} is half written: {reason}"


def _half_written(path: Path) -> str | None:
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".csv", ".json", ".jsonl"):
        return None
    try:
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                json.loads(line)
        else:
            csv.field_size_limit(1 << 30)
            widths = {len(row) for row in csv.reader(text.splitlines())}
            if len(widths) != 1:
                return f"rows of {sorted(widths)} fields"
    except ValueError as error:
        return str(error)
    return None if text.endswith("\n") else "no line end"
