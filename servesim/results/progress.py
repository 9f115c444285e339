"""A live progress line for terminals: requests done, simulated time, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from servesim.results.units import seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from servesim.results.records import RunLog

_SHOW_AFTER_S = 0.5
_REFRESH_S = 0.1


class ProgressBar:
    """An observer of the simulation that redraws one line; a run shorter than half a second shows none."""

    def __init__(self, interval_ns: int, total: int, stream: TextIO) -> None:
        """
        Args:
            interval_ns: simulated time after which to look again.
            total: requests of the workload.
            stream: the terminal.
        """
        self.next_ns = interval_ns
        self._interval_ns = interval_ns
        self._total = total
        self._stream = stream
        self._started_s = time.monotonic()
        self._drawn_s = self._started_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Redraw when enough real time has passed."""
        self.next_ns = now_ns + self._interval_ns
        real_s = time.monotonic()
        if real_s - self._drawn_s < (_REFRESH_S if self._bar else _SHOW_AFTER_S):
            return
        self._drawn_s = real_s
        if self._bar is None or self._task is None:
            self._bar, self._task = self._start()
        done = len(log.requests) + len(log.rejected)
        steps = sum(len(instance.steps) for instance in log.instances)
        self._bar.update(self._task, completed=done, state=f"t={seconds(now_ns)} step={steps}")
        self._bar.refresh()

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("simulating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests  {task.fields[state]}  left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            auto_refresh=False,  # no thread beside the simulation
            transient=True,
        )
        bar.start()
        return bar, bar.add_task("", total=self._total, state="")
