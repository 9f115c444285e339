"""Every error that servesim raises on purpose, and the exit status each one ends the command with."""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors that a user is meant to read; printed as one message, without a traceback."""

    exit_status = 1


class RunError(ServingError):
    """A run that started on good input could not be finished (exit status 1)."""


class BrokenRunError(RunError):
    """The simulator found that its own books do not agree; the input that led there is worth a report."""


class InputError(ServingError, ValueError):
    """Something the user gave is wrong (exit status 2).

    The message is complete in itself: where (file, line or field path), what was found, what is allowed, and
    the way out.
    """

    exit_status = 2


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder the run needs is not there; shown to the user as ``FileNotFoundError`` (exit status
    2)."""

    def __str__(self) -> str:  # OSError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class NotSupportedError(InputError):
    """A documented option whose machinery is not built yet (exit status 2); never silently ignored."""
