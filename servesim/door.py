"""The door of the console script and of ``python -m``: Ctrl-C while modules load ends the program quietly.

Only what listens to the signal is imported here; until a command works, there is nothing to clean up.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Load and run the command; returns its exit status."""
    # signal itself loads enum, which takes longer than all before it
    import _signal as signal  # type: ignore[import-not-found]

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    # A program started in the background by a shell ignores the signal, and must go on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from servesim.__main__ import main as run

    return run(at_work=_listen_as_usual)


def _listen_as_usual() -> None:
    import signal

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what is half done is being removed
        sys.exit(128 + signal.SIGTERM)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
