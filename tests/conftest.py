"""What holds for every test."""

from __future__ import annotations

import os

from servesim.engine.simulation import Observer, Simulation
from servesim.results.records import RunLog

os.environ["SERVESIM_AUTO_PROFILE"] = (
    "0"  # no test depends on what happens to be installed; commands inherit it
)

os.environ["SERVESIM_CACHE"] = "0"  # nor on what an earlier run kept

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
