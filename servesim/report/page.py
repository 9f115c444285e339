"""A report as data, and as one HTML file that needs no network.

A page is sections of paragraphs, tables and charts. The same charts become images, see
:mod:`servesim.report.images`. The charts of the HTML file are drawn by Chart.js, which is part of the file.
"""

from __future__ import annotations

import html
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import orjson

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

Kind = Literal["line", "step", "scatter", "bar"]
_FAR_APART = 8.0
"""Largest value over smallest from which on a logarithmic axis helps."""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""What the file may load: nothing but itself."""


@dataclass(slots=True)
class Series:
    """One set of points or bars of a chart."""

    name: str
    x: list[float]
    """Empty where the chart has categories."""
    y: list[float]
    labels: list[str] | None = None
    """What a point is called when it is pointed at."""


@dataclass(slots=True)
class Chart:
    """A chart; ``x`` and ``y`` name the axes with their units."""

    title: str
    kind: Kind
    x: str
    y: str
    series: list[Series]
    x_log: bool = False
    y_log: bool = False
    categories: list[str] | None = None
    """Names of the bars of a stacked bar chart."""
    note: str = ""
    """A sentence below it."""

    def log(self, axis: Literal["x", "y"]) -> bool:
        """Whether an axis is logarithmic: where that is wished for, and its values are far apart."""
        if not (self.x_log if axis == "x" else self.y_log):
            return False
        values = [value for series in self.series for value in (series.x if axis == "x" else series.y)]
        return bool(values) and min(values) > 0 and max(values) / min(values) >= _FAR_APART

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(series.y for series in self.series)


@dataclass(slots=True)
class TableBlock:
    """A table; cells are text already."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    wide: frozenset[int] = frozenset()
    """Columns of words rather than figures."""


@dataclass(slots=True)
class Tiles:
    """A few figures to see first: (name, value, unit)."""

    figures: list[tuple[str, str, str]]


@dataclass(slots=True)
class Verbatim:
    """Text as a command prints it."""

    text: str


Block = str | TableBlock | Chart | Tiles | Verbatim


@dataclass(slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(slots=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: list[Section]

    def charts(self) -> list[Chart]:
        """All charts that have something to show, in their order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return [block for block in blocks if isinstance(block, Chart) and not block.is_empty]

    def html(self) -> str:
        """The file; the same page gives the same bytes."""
        counter = iter(range(len(self.charts())))
        kept = [section for section in self.sections if any(map(_shows, section.blocks))]
        links = "".join(
            f'<a href="#part-{at}">{html.escape(section.title)}</a>' for at, section in enumerate(kept)
        )
        body = "".join(
            f'<section id="part-{at}"><h2>{html.escape(section.title)}</h2>'
            f"{_blocks(section.blocks, counter)}</section>"
            for at, section in enumerate(kept)
        )
        data = orjson.dumps([_plain(chart) for chart in self.charts()]).decode()
        return _TEMPLATE.format(
            policy=_POLICY,
            title=html.escape(self.title),
            subtitle=html.escape(self.subtitle),
            css=_asset("page.css"),
            links=links,
            body=body,
            data=data.replace("<", "\\u003c"),
            library=_asset("chart.umd.min.js"),
            script=_asset("page.js"),
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.html())


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="servesim">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header><h1>{title}</h1><p class="sub">{subtitle}</p><nav aria-label="parts">{links}</nav></header>
<main>
<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>
{body}
</main>
<footer>Made by servesim. This file loads nothing from elsewhere; its charts are drawn by Chart.js (MIT
licence), which is part of it.</footer>
<script type="application/json" id="charts">{data}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def _shows(block: Block) -> bool:
    if isinstance(block, Chart):
        return not block.is_empty
    return bool(block.rows) if isinstance(block, TableBlock) else bool(block)


def _blocks(blocks: Iterable[Block], counter: Iterable[int]) -> str:
    """HTML of blocks; charts that follow each other stand side by side where there is room."""
    parts: list[str] = []
    row: list[str] = []
    numbers = iter(counter)
    for block in blocks:
        if isinstance(block, Chart):
            if not block.is_empty:
                row.append(_figure(block, next(numbers)))
            continue
        if row:
            parts.append(f'<div class="charts">{"".join(row)}</div>')
            row = []
        if _shows(block):
            parts.append(_text_block(block))
    if row:
        parts.append(f'<div class="charts">{"".join(row)}</div>')
    return "".join(parts)


def _figure(chart: Chart, number: int) -> str:
    names = ", ".join(series.name for series in chart.series if series.name)
    spoken = f"{chart.title}: {chart.y} over {chart.x or 'categories'}" + (f"; {names}" if names else "")
    note = f"<figcaption>{html.escape(chart.note)}</figcaption>" if chart.note else ""
    tall = " tall" if chart.categories and len(chart.categories) > 6 else ""
    return (
        f'<figure><h3>{html.escape(chart.title)}</h3><div class="plot{tall}"><canvas id="chart-{number}" '
        f'role="img" aria-label="{html.escape(spoken)}"></canvas></div>{note}</figure>'
    )


def _text_block(block: str | TableBlock | Tiles | Verbatim) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Verbatim):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Tiles):
        tiles = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)} "
            f"<small>{html.escape(unit)}</small></dd></div>"
            for name, value, unit in block.figures
        )
        return f'<dl class="tiles">{tiles}</dl>'
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in block.header)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="text">{html.escape(cell)}</td>'
            if at in block.wide
            else f"<td>{html.escape(cell)}</td>"
            for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in block.rows
    )
    caption = f"<caption>{html.escape(block.caption)}</caption>" if block.caption else ""
    spoken = html.escape(block.caption or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{spoken}">'
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _plain(chart: Chart) -> dict[str, Any]:
    """A chart as the page's script takes it, figures to 6 digits."""
    entry = asdict(chart) | {"x_log": chart.log("x"), "y_log": chart.log("y")}
    for series in entry["series"]:
        for axis in ("x", "y"):
            series[axis] = [_short(value) for value in series[axis]]
    return entry


def _short(value: float) -> float:
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


@cache
def _asset(name: str) -> str:
    text = (files("servesim.report") / "assets" / name).read_text(encoding="utf-8")
    return re.sub(r"\n?//# sourceMappingURL=\S+\s*$", "\n", text)
