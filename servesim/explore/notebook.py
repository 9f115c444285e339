"""Results and progress in a notebook: tables and small charts as HTML, and a line that is written over."""

from __future__ import annotations

import math
import sys
import time
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from servesim.results.table import Table

_WIDTH, _HEIGHT, _MARGIN = 560, 220, 48
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito, Color Universal Design: told apart by everybody."""
_BETWEEN_S = 0.2
"""Least time between two updates of a line."""


def table_html(table: Table) -> str:
    """The cells of a table, first column to the left; cells that are good or bad are coloured."""
    colours = {"good": "#1a7f37", "bad": "#b3261e"}

    def cell(tag: str, text: str, column: int, meaning: str = "") -> str:
        style = f"text-align:{'right' if column else 'left'}"
        if meaning in colours:
            style += f";color:{colours[meaning]}"
        return f'<{tag} style="{style}">{escape(text)}</{tag}>'

    lines = ["<table><thead><tr>", *(cell("th", title, n) for n, title in enumerate(table.header))]
    lines.append("</tr></thead><tbody>")
    for number, row in enumerate(table.rows):
        if row is not None:
            cells = (cell("td", text, n, table.meanings.get((number, n), "")) for n, text in enumerate(row))
            lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*lines, "</tbody></table>"])


def page_html(text: str, *parts: str) -> str:
    """A few lines of text above tables and charts."""
    return f"<pre>{escape(text)}</pre>{''.join(parts)}"


def chart_svg(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Lines through points, y on a logarithmic scale; ``marks`` are vertical lines. Empty without points."""
    points = [
        (x, y) for line in series.values() for x, y in line if y > 0 and math.isfinite(x) and math.isfinite(y)
    ]
    if len(points) < 2:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = math.log(min(y for _, y in points)), math.log(max(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (math.log(y) - low) / (high - low or 1)
        return _MARGIN + across * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'role="img" aria-label="{escape(y_title)} over {escape(x_title)}" font-size="11" '
        'font-family="sans-serif" fill="currentColor">'
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = [at(x, y) for x, y in line if (x, y) in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in drawn]
        parts.append(f'<text x="{_MARGIN + 110 * number}" y="14" fill="{colour}">{escape(name)}</text>')
    for name, x in marks:
        if left <= x <= right:
            place, _ = at(x, math.exp(low))
            parts.append(
                f'<line x1="{place:.1f}" x2="{place:.1f}" y1="24" y2="{_HEIGHT - _MARGIN}" '
                f'stroke="currentColor" stroke-dasharray="4"/><text x="{place + 4:.1f}" y="34">'
                f"{escape(name)}</text>"
            )
    for x in (left, right):
        place, _ = at(x, math.exp(low))
        parts.append(
            f'<text x="{place:.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{escape(f"{x:.4g}")}</text>'
        )
    for y in (math.exp(low), math.exp(high)):
        _, place = at(left, y)
        parts.append(f'<text x="{_MARGIN - 6}" y="{place:.1f}" text-anchor="end">{escape(f"{y:.4g}")}</text>')
    middle = _WIDTH / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text x="4" y="{_HEIGHT / 2:.0f}">{escape(y_title)}</text></svg>')
    return "".join(parts)


def line() -> Callable[[str], None] | None:
    """Something that shows a text in a notebook's cell, in place of the one before; None elsewhere."""
    ipython: Any = sys.modules.get("IPython")  # not imported: a notebook has it already
    shell = ipython.get_ipython() if ipython is not None else None
    if type(shell).__name__ != "ZMQInteractiveShell":
        return None
    handle = ipython.display.display(ipython.display.HTML(""), display_id=True)
    last_s = 0.0

    def show(text: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _BETWEEN_S or not text:
            last_s = time.monotonic()
            handle.update(ipython.display.HTML(escape(text)))

    return show


def rows_line() -> Callable[[int, int, int], None] | None:
    """The same for (done, all, failed) rows."""
    show = line()
    if show is None:
        return None

    def progress(done: int, total: int, failed: int) -> None:
        show(f"{done} of {total}" + (f", {failed} failed" if failed else "") if done < total else "")

    return progress
