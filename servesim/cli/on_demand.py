"""Bundles that a command makes when its run asks for ones that are not there, or finds them old."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servesim.cost.missing import Maker, Refresher


@contextmanager
def bundles_on_demand(wanted: bool) -> Iterator[None]:
    """Inside the block, missing and outdated bundles are made where that is possible, each with a line on
    stderr."""
    from servesim.cost.missing import missing_bundles_from

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    @cache
    def parts() -> tuple[Maker | None, Refresher]:
        from servesim.profiler.on_demand import maker, refresher  # most runs read a shipped bundle: no need

        warn = logging.getLogger("servesim").warning
        return maker(tell, wanted=wanted), refresher(tell, warn, wanted=wanted)

    def make(hardware: str, model: str, variant: str, tp: int) -> Path | None:
        maker, _ = parts()
        return maker(hardware, model, variant, tp) if maker else None

    def refresh(folder: Path, hardware: str, model: str, variant: str) -> None:
        parts()[1](folder, hardware, model, variant)

    with missing_bundles_from(make, refresh):
        yield
