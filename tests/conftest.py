"""What holds for every test."""

from __future__ import annotations

import os

os.environ["SERVESIM_AUTO_PROFILE"] = (
    "0"  # no test depends on what happens to be installed; commands inherit it
)

for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)  # what is printed depends on no screen
