"""Warnings and log records, as one line each on stderr."""

from __future__ import annotations

import logging
import sys
import warnings

from servesim.terminal import painted


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
