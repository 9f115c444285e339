"""What a person sees of a sweep: a live line with the time left on a terminal, a line now and then else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.2


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class SweepProgress:
    """Counts shots over all parts of a sweep and guesses the time left from the rates seen so far."""

    def __init__(self, stream: TextIO, planned: dict[str, int]) -> None:
        """
        Args:
            stream: where to write.
            planned: shots of each part of the sweep (``tp1 attention``), in the order they run.
        """
        self._stream = stream
        self._planned = planned
        self._done: dict[str, int] = dict.fromkeys(planned, 0)
        self._spent_s = dict.fromkeys(planned, 0.0)
        self._shown_s = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if stream.isatty() and any(planned.values()):
            self._start_bar()

    def replan(self, part: str, shots: int) -> None:
        """A part turned out to have ``shots`` shots."""
        self._planned[part] = shots
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=sum(self._planned.values()))

    def step(self, part: str, shot_s: float) -> None:
        """One shot of ``part`` is done and took ``shot_s`` seconds."""
        self._done[part] += 1
        self._spent_s[part] += shot_s
        now_s = time.monotonic()
        if now_s - self._shown_s >= (_REDRAW_EVERY_S if self._bar else _LINE_EVERY_S):
            self._shown_s = now_s
            self._show(part)

    def left_s(self) -> float:
        """Seconds left: every part at its own rate, parts without a shot yet at the rate of all."""
        done, spent = sum(self._done.values()), sum(self._spent_s.values())
        overall = spent / done if done else 0.0
        left = 0.0
        for part, planned in self._planned.items():
            rate = self._spent_s[part] / self._done[part] if self._done[part] else overall
            left += rate * (planned - self._done[part])
        return left

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, part: str) -> None:
        done, planned = sum(self._done.values()), sum(self._planned.values())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, part=part, left=duration(self.left_s()))
            self._bar.refresh()
            return
        print(
            f"{part}: {self._done[part]}/{self._planned[part]} shots, {done}/{planned} in all, "
            f"{duration(self.left_s())} left",
            file=self._stream,
            flush=True,
        )

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.fields[part]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shots, {task.fields[left]} left"),
            console=Console(file=self._stream),
            auto_refresh=False,  # a thread beside the stopwatch would disturb it
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=sum(self._planned.values()), part="", left="?")
