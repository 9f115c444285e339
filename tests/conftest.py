"""What holds for every test."""

from __future__ import annotations

import os

os.environ["SERVESIM_AUTO_PROFILE"] = (
    "0"  # no test depends on what happens to be installed; commands inherit it
)
