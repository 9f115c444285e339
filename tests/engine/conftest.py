"""What tests of the engine share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.toy_world import toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[Path]:
    """A working folder with the toy models and their kernel times."""
    with toy_world(tmp_path) as root:
        yield root
