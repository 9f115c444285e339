"""What happens when a run asks for a bundle, or a degree of one, that is not there or was made for something
else, or finds an old one.

Nothing, unless a maker or a refresher was put in place: the packages below know no source of kernel times, so
that whoever starts a run says who makes bundles for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from servesim.errors import InputError, MissingFileError, ServingError
from servesim.specs import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from servesim.cost.identity import Wanted

    Maker = Callable[[Wanted, int], Path | None]
    """(wanted, tp) -> folder of a bundle with this degree; None: it makes none of these."""
    Refresher = Callable[[Path, Wanted], None]
    """(folder, wanted): looks at a bundle before it is read, and may replace it."""

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


def makes_bundles() -> bool:
    """Whether somebody makes bundles that are missing."""
    return _maker.get() is not None


def refreshed(folder: Path, wanted: Wanted) -> Path:
    """``folder``, a bundle that was found, once it was seen to; those shipped with us are as we are."""
    refresher = _refresher.get()
    if refresher is not None and not folder.resolve().is_relative_to(paths.packaged_data_dir()):
        refresher(folder, wanted)
    return folder


def made_for_run(wanted: Wanted, tp: int, problem: InputError) -> Path:
    """The folder of a bundle made for this degree.

    Raises:
        InputError: ``problem`` itself, that it is missing or was made for something else, when nobody makes
            such bundles; with the reason added when making it failed.
    """
    maker = _maker.get()
    if maker is None:
        raise problem
    try:
        folder = maker(wanted, tp)
    except ServingError as error:
        kind = MissingFileError if isinstance(problem, MissingFileError) else InputError
        raise kind(f"{problem}\nIt was not made on demand: {error}") from None
    if folder is None:
        raise problem
    return folder
