"""What happens when a run asks for a bundle, or a degree of one, that is not there, or finds an old one.

Nothing, unless a maker or a refresher was put in place: the packages below know no source of kernel times, so
that whoever starts a run says who makes bundles for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from servesim.errors import MissingFileError, ServingError
from servesim.specs import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Maker = Callable[[str, str, str, int], Path | None]
    """(hardware, model, variant, tp) -> folder of a bundle with this degree; None: it makes none of these."""
    Refresher = Callable[[Path, str, str, str], None]
    """(folder, hardware, model, variant): looks at a bundle of the user's data folder before it is read, and
    may replace it."""

_maker: ContextVar[Maker | None] = ContextVar("maker", default=None)
_refresher: ContextVar[Refresher | None] = ContextVar("refresher", default=None)


@contextmanager
def missing_bundles_from(maker: Maker | None, refresher: Refresher | None = None) -> Iterator[None]:
    """Inside the block, bundles that are not there are those that ``maker`` makes, and ``refresher`` sees
    those that are before they are read; None: an error again, and nothing."""
    tokens = _maker.set(maker), _refresher.set(refresher)
    try:
        yield
    finally:
        _maker.reset(tokens[0])
        _refresher.reset(tokens[1])


def refreshed(folder: Path, hardware: str, model: str, variant: str) -> Path:
    """``folder``, a bundle that was found, once it was seen to; bundles outside of the user's data folder are
    their owners' business."""
    refresher = _refresher.get()
    if refresher is not None and folder.resolve().is_relative_to(paths.user_data_dir().resolve()):
        refresher(folder, hardware, model, variant)
    return folder


def made_for(hardware: str, model: str, variant: str, tp: int, missing: MissingFileError) -> Path:
    """The folder of a bundle made for this degree.

    Raises:
        MissingFileError: ``missing`` itself when nobody makes such bundles; with the reason added when
            making it failed.
    """
    maker = _maker.get()
    if maker is None:
        raise missing
    try:
        folder = maker(hardware, model, variant, tp)
    except ServingError as error:
        raise MissingFileError(f"{missing}\nIt was not made on demand: {error}") from None
    if folder is None:
        raise missing
    return folder
