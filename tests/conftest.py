"""What holds for every test."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from servesim.engine.simulation import Observer, Simulation
from servesim.results.records import RunLog

if TYPE_CHECKING:
    from pathlib import Path

os.environ["SERVESIM_AUTO_PROFILE"] = (
    "0"  # no test depends on what happens to be installed; commands inherit it
)

os.environ["SERVESIM_CACHE"] = "0"  # nor on what an earlier run kept

os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="servesim-tests-")  # nor on the bundles of this user
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)

# Nor on how fast the machine is, nor on chance: examples of properties follow from the tests alone. Others
# are drawn with `pytest --hypothesis-profile chance`.
for profile, derandomize in (("chance", False), ("tests", True)):
    settings.register_profile(
        profile, deadline=None, derandomize=derandomize, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # nor on whether they run behind a shell's `&`: commands that tests start would ignore interrupts, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)  # what is printed depends on no screen

_run = Simulation.run


def _run_and_check(self: Simulation, observer: Observer | None = None) -> RunLog:
    """Every run of every test leaves its block pools and lower tiers whole."""
    log = _run(self, observer)
    for instance in self.instances:
        instance.scheduler.kv.pool.check_integrity()
        for connector in instance.scheduler.connectors:
            connector.check_integrity()
    return log


Simulation.run = _run_and_check  # type: ignore[method-assign]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test, empty at first. Shipped files are found from anywhere; nothing is written
    into the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
