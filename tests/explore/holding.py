"""A sweep that stands still once some of its rows are finished, so that it can be killed at that point on any
machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

    from servesim.explore.journal import Journal

ROWS = 2
"""Finished rows from which on every run waits."""
_GO = Path("go")
_POLICY = """\
import time
from pathlib import Path

def choose(request, instances):
    journal = Path({journal!r})
    while journal.exists() and journal.read_bytes().count(b"\\n") >= {rows} and not Path("go").exists():
        time.sleep(0.02)
    return instances[0]
"""


def holding(journal: Journal) -> list[str]:
    """Flags of a router that waits; it needs a cluster of several instances."""
    Path("hold.py").write_text(_POLICY.format(journal=str(journal.path), rows=ROWS), encoding="utf-8")
    return ["--request-routing-policy", "hold:choose"]


def wait_for_rows(journal: Journal, running: subprocess.Popen[bytes]) -> None:
    """Until the runs wait."""
    deadline = time.monotonic() + 600
    while len(journal.rows()) < ROWS:
        assert running.poll() is None, "the sweep is over"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def let_go() -> None:
    """From now on no run waits."""
    _GO.touch()
