"""Figures drawn with matplotlib (extra ``report``), and their PNG files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping


def require_matplotlib(flag: str = "--plots") -> None:
    """Say before the work that the plots of ``flag`` cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError(f"{flag}: needs matplotlib; install it with  pip install 'servesim[report]'")


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
        written.append(Path(folder) / name)
        save_figure(figure, written[-1])
    return written


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as SVG where the path ends in ``.svg``, else as PNG; the same figure, the same bytes."""
    from matplotlib import rc_context

    svg = path.suffix.lower() == ".svg"
    with rc_context({"svg.hashsalt": "servesim"}), atomic_write(path) as handle:
        if svg:
            figure.savefig(handle, format="svg", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(handle, format="png", dpi=110, metadata={"Software": None})
