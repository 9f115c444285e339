"""What a command shows while it goes: banner, heartbeat lines or a progress bar, warnings on stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from servesim.results.banner import banner
from servesim.results.heartbeat import Heartbeat, ProgressBar
from servesim.results.units import SECOND
from servesim.terminal import painted

if TYPE_CHECKING:
    from servesim.results.records import RunLog
    from servesim.results.step_stream import StepStream
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload


def say(text: str) -> None:
    """Print one text at once; once the reader of stdout has gone, nothing, for the run still matters."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends


class RunScreen:
    """An observer that prints the banner before the first step, then heartbeat lines or a progress bar."""

    def __init__(
        self,
        options: RuntimeOptions,
        workload: Workload,
        cluster: ClusterSpec,
        steps: StepStream | None = None,
    ) -> None:
        """``steps``: where the steps go meanwhile."""
        self._options = options
        self._steps = steps
        self._workload = workload
        self._banner_shown = False
        interval_ns = max(round(options.log_interval * SECOND), 1)
        self._bar = None
        self._heartbeat = None
        if sys.stdout.isatty() and options.log_level == "WARNING":
            self._bar = ProgressBar(interval_ns, len(workload), sys.stdout)
        else:
            self._heartbeat = Heartbeat(interval_ns, say, cluster)
        self.next_ns = -1
        """Asks to be called at the very start, when the instances are set up."""

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Show what is due by ``now_ns``."""
        if not self._banner_shown:
            say(banner(self._options, self._workload, log.instances, log.notes))
            self._banner_shown = True
        following = self._bar or self._heartbeat
        if following is not None:
            if now_ns >= following.next_ns:
                following.advance(now_ns, log)
            self.next_ns = following.next_ns
        if self._steps is not None:
            if now_ns >= self._steps.next_ns:
                self._steps.advance(now_ns, log)
            self.next_ns = min(self.next_ns, self._steps.next_ns)

    def finish(self, log: RunLog) -> None:
        """Show what is left at the end of the run."""
        self.advance(log.end_ns, log)
        if self._heartbeat is not None:
            self._heartbeat.finish(log)

    def close(self) -> None:
        """Leave the terminal tidy, whatever happened."""
        if self._bar is not None:
            self._bar.close()


def set_up_messages(level: str) -> None:
    """Show log records of servesim from ``level`` on, and every Python warning once, without source lines."""
    logger = logging.getLogger("servesim")
    logger.handlers[:] = [_OnStderr()]
    logger.setLevel(level)
    warnings.showwarning = _show_warning


def tell(line: str) -> None:
    """A line on stderr about something that was done for the user."""
    print(line, file=sys.stderr)


class _OnStderr(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        label = f"[{record.levelname}]"
        if record.levelno >= logging.WARNING:
            label = painted(label, "warning", error_stream=True)
        print(f"{label} {record.getMessage()}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    logging.getLogger("servesim").warning("%s", message)
