"""The charts of a report as PNG or SVG, drawn by matplotlib (extra ``report``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.results.figures import new_figure, save_figure

if TYPE_CHECKING:
    from servesim.report.page import Chart, Page

_COLOURS = ("#0072b2", "#c44f00", "#00805c", "#a8518a", "#7a6200", "#2f7fb5", "#6b4fa0", "#555c66")
_MARKS = "o^sDPX*v"
_DASHES = ("-", "--", ":", "-.")


def save_images(page: Page, folder: str | Path) -> list[str]:
    """Write every chart of ``page`` into ``folder``, as PNG and as SVG; returns the paths."""
    written = []
    for chart in page.charts():
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
        for suffix in ("png", "svg"):
            path = Path(folder) / f"{name}.{suffix}"
            save_figure(_drawn(chart), path)
            written.append(str(path))
    return written


def _drawn(chart: Chart) -> Any:
    bars = chart.categories or []
    figure = new_figure(7, max(3.6, 1.2 + 0.32 * len(bars)))
    axes = figure.subplots()
    if bars:
        _draw_bars(axes, chart, bars)
    else:
        _draw_series(axes, chart)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
    axes.set_title(chart.title)
    axes.grid(alpha=0.3)
    if chart.log("x"):
        axes.set_xscale("log")
    if chart.log("y"):
        axes.set_yscale("log")
    if len(chart.series) > 1:
        axes.legend(fontsize="small")
    return figure


def _draw_series(axes: Any, chart: Chart) -> None:
    for at, series in enumerate(chart.series):
        colour = _COLOURS[at % len(_COLOURS)]
        if chart.kind == "scatter":
            axes.scatter(
                series.x, series.y, s=9, color=colour, marker=_MARKS[at % len(_MARKS)], label=series.name
            )
            continue
        axes.plot(
            series.x,
            series.y,
            color=colour,
            linestyle=_DASHES[at % len(_DASHES)],
            marker="o" if len(series.x) <= 40 else None,
            markersize=3,
            drawstyle="steps-post" if chart.kind == "step" else "default",
            label=series.name,
        )


def _draw_bars(axes: Any, chart: Chart, bars: list[str]) -> None:
    left = [0.0] * len(bars)
    for at, series in enumerate(chart.series):
        axes.barh(
            range(len(bars)), series.y, left=left, color=_COLOURS[at % len(_COLOURS)], label=series.name
        )
        left = [start + width for start, width in zip(left, series.y, strict=True)]
    axes.set_yticks(range(len(bars)), bars)
    axes.invert_yaxis()
    axes.set_xlabel(chart.y)
