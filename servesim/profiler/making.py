"""The one door to bundles made while a run waits for them; the commands and the Python API go through it."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from servesim.cost.finding import makes_bundles, missing_bundles_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from servesim.cost.finding import Maker, Refresher
    from servesim.cost.identity import Wanted


@contextmanager
def bundles_on_demand(wanted: bool, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside the block, bundles that are missing, outdated or made for something else are made where that is
    possible.

    Args:
        wanted: False: none are made, and old ones are only warned of.
        tell: gets a line per bundle made; None: the logger ``servesim``. A block within another that makes
            bundles leaves this to the outer one.
    """
    if wanted and makes_bundles():
        yield
        return
    logger = logging.getLogger("servesim")
    say = tell or logger.warning

    @cache
    def parts() -> tuple[Maker | None, Refresher]:
        from servesim.profiler.on_demand import maker, refresher  # most runs read a shipped bundle: no need

        return maker(say, wanted=wanted), refresher(say, logger.warning, wanted=wanted)

    def make(asked: Wanted, tp: int) -> Path | None:
        maker, _ = parts()
        return maker(asked, tp) if maker else None

    def refresh(folder: Path, asked: Wanted) -> None:
        parts()[1](folder, asked)

    with missing_bundles_from(make if wanted else None, refresh):
        yield
