"""Figures drawn with matplotlib (extra ``report``), and their PNG files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping


def require_matplotlib() -> None:
    """Say before the work that plots cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("--plots: needs matplotlib; install it with  pip install 'servesim[report]'")


def new_figure(width: float, height: float) -> Any:
    """A figure on the Agg canvas: no display is asked for, and no global state is touched. In inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figures(figures: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write each figure under its file name; the same figure gives the same bytes. Returns the paths."""
    written = []
    for name, figure in figures.items():
        path = Path(folder) / name
        with atomic_write(path) as handle:
            figure.savefig(handle, format="png", dpi=110, metadata={"Software": None})
        written.append(path)
    return written
