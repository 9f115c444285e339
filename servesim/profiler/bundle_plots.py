"""PNG plots of a bundle; needs matplotlib (extra ``report``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.results.figures import new_figure, require_matplotlib, save_figures

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.cost.bundle import RankTables

_MAX_LINES = 8


def save_plots(tables: RankTables, title: str, folder: Path) -> list[Path]:
    """Draw one degree's tables into ``folder``; returns the files written.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    figures = {"dense.png": _dense(tables, title), "attention.png": _attention(tables, title)}
    if tables.moe is not None:
        figures["moe.png"] = _moe(tables, title)
    return save_figures(figures, folder)


def _figure(panels: int, title: str) -> tuple[Any, Any]:
    """A figure with panels side by side."""
    figure = new_figure(5.2 * panels, 4.2)
    figure.suptitle(title)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _finish(axes: Any, title: str, label: str, legend: str | None) -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel("us")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(title=legend, fontsize="small")


def _dense(tables: RankTables, title: str) -> Any:
    figure, (tokens, sequences) = _figure(2, title)
    for axes, curves, label in (
        (tokens, tables.dense, "tokens"),
        (sequences, tables.per_sequence, "sequences"),
    ):
        for name, curve in curves.items():
            axes.plot(curve.points, curve.values, label=name)
        _finish(axes, f"layers over {label}", label, None)
    return figure


def _attention(tables: RankTables, title: str) -> Any:
    figure, (alone, prefill, mixed) = _figure(3, title)
    surface = tables.attention
    chunks, decodes, histories, lengths = surface.axes
    chunks, decodes, lengths = (axis[axis > 0] for axis in (chunks, decodes, lengths))
    zeros = np.zeros(len(lengths))
    for n in _few(decodes):
        alone.plot(lengths, surface.at(zeros, zeros + n, zeros, lengths), label=str(n))
    _finish(alone, "decodes alone", "KV tokens", "sequences")
    zeros = np.zeros(len(chunks))
    for history in _few(histories):
        prefill.plot(chunks, surface.at(chunks, zeros, zeros + history, zeros), label=str(history))
    _finish(prefill, "a chunk alone", "chunk tokens", "history")
    middle = int(lengths[len(lengths) // 2])
    for n in _few(decodes):
        mixed.plot(chunks, surface.at(chunks, zeros + n, zeros, zeros + middle), label=str(n))
    _finish(mixed, f"a chunk beside decodes of {middle} tokens", "chunk tokens", "sequences")
    return figure


def _moe(tables: RankTables, title: str) -> Any:
    figure, (axes,) = _figure(1, title)
    if tables.moe is not None:
        surface = tables.moe.surface
        tokens, experts = surface.axes
        for active in _few(experts):
            axes.plot(tokens, surface.at(tokens, np.full(len(tokens), active)), label=str(active))
    _finish(axes, "experts", "tokens", "activated")
    return figure


def _few(points: Any) -> list[int]:
    step = max(1, -(-len(points) // _MAX_LINES))
    return [int(point) for point in points[::step]]
