"""Where recorded data lie: kept beside the project, not in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_PROJECT = Path(__file__).resolve().parent.parent


def recorded_path(*parts: str) -> Path:
    """The recorded file or folder; skips the calling test where there is none."""
    root = Path(os.environ.get("SERVESIM_RECORDED") or _PROJECT.parent / "shared" / "data" / "recorded")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no recorded data at {path}; set SERVESIM_RECORDED to the folder that holds them")
    return path
