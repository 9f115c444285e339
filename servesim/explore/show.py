"""A comparison on screen: a coloured table for terminals, the same as plain text for pipes."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from servesim.results.banner import workload_line
from servesim.results.table import Table
from servesim.results.units import digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.explore.compare import Comparison, Row

WIDTH = 100
_LESS_IS_BETTER = frozenset({"scheduling", "TTFT", "TPOT", "ITL", "latency", "energy"})
_MORE_IS_BETTER = frozenset(
    {
        *("output_throughput", "total_token_throughput", "tokens_per_s_per_w"),
        *("kv_cache_tokens", "kv_cache_blocks"),
    }
)
_NEITHER = frozenset({"peak_batch", "mean_power_w"})
_UNCOLOURED_PERCENT = 1.0


def comparison_text(comparison: Comparison) -> str:
    """Heading, table and verdict as plain text."""
    table = Table(header(comparison))
    for rows in _sections(comparison.rows):
        if table.rows:
            table.rows.append(None)
        for row in rows:
            table.rows.append([row.title, row.unit, *_cells(row)])
    return "\n".join([*heading(comparison), "", table.plain(), "", wrapped_verdict(comparison)])


def show_comparison(comparison: Comparison) -> None:
    """The same on the terminal, with gains in green and losses in red."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for line in heading(comparison):
        console.print(line, markup=False)
    table = RichTable(box=SIMPLE, pad_edge=False)
    for index, title in enumerate(header(comparison)):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
    for rows in _sections(comparison.rows):
        for row in rows:
            changes = row.changes()
            cells = [Text(cell) for cell in _cells(row)]
            for index in range(1, len(row.values)):
                cells[2 * index].stylize(_style(row, changes[index]))
            table.add_row(Text(row.title), Text(row.unit, style="dim"), *cells)
        table.add_section()
    console.print(table)
    console.print(wrapped_verdict(comparison), markup=False)


def heading(comparison: Comparison) -> list[str]:
    """What was compared: workload, and model and hardware."""
    result = comparison.results[0]
    lines = [f"workload  {workload_line(result.workload)}"]
    specs = {
        f"{log.spec.model_name} on {log.spec.num_npus} x {log.spec.hardware}" for log in result.instances
    }
    count = f"{len(result.instances)} instances of " if len(result.instances) > 1 else ""
    lines.append(f"cluster   {count}{', '.join(sorted(specs))}")
    return lines


def header(comparison: Comparison) -> list[str]:
    """Column titles: figure, unit, the baseline, and every other set with its difference."""
    others = [title for name in comparison.names[1:] for title in (name, "change")]
    return ["", "unit", comparison.names[0], *others]


def wrapped_verdict(comparison: Comparison) -> str:
    """The verdict in lines of at most 100 characters."""
    return "\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in comparison.verdict.splitlines())


def change_text(change: float | None) -> str:
    """A difference in %: ``+100%``, ``-3.2%``, ``=``; ``new`` for something out of nothing."""
    if change is None:
        return "new"
    if abs(change) < 0.05:
        return "="
    return f"{change:+,.0f}%" if abs(change) >= 99.95 else f"{change:+.1f}%"


def _sections(rows: Sequence[Row]) -> list[list[Row]]:
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    return list(sections.values())


def _cells(row: Row) -> list[str]:
    changes = row.changes()
    values = _alike(row.values)
    cells = [values[0]]
    for value, change in zip(values[1:], changes[1:], strict=True):
        cells += [value, change_text(change)]
    return cells


def _alike(values: Sequence[float]) -> list[str]:
    """The values of a row with the same number of decimals: those of the largest."""
    if all(float(value).is_integer() for value in values):
        return [f"{value:,.0f}" for value in values]
    decimals = len(digits(max(map(abs, values))).partition(".")[2])
    return [f"{value:,.{decimals}f}" for value in values]


def _style(row: Row, change: float | None) -> str:
    if row.key in _NEITHER or (change is not None and abs(change) < _UNCOLOURED_PERCENT):
        return ""
    if row.key in _MORE_IS_BETTER:
        return "red" if change is not None and change < 0 else "green"
    if row.section in _LESS_IS_BETTER or row.key == "duration":
        return "green" if change is not None and change < 0 else "red"
    return ""
