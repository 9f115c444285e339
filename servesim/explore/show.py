"""A comparison as text: a table that fits the screen, coloured where that is shown, verdict and trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.explore.error_band import bands_text
from servesim.explore.kernels import speculation_text
from servesim.explore.slo import num_gpus, ttft_error, worst_error
from servesim.results.banner import workload_line
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.explore.compare import Comparison
    from servesim.explore.rows import Row
    from servesim.results.result import Result

_LESS_IS_BETTER = frozenset({"scheduling", "TTFT", "TPOT", "ITL", "latency", "energy"})
_MORE_IS_BETTER = frozenset(
    {
        *("output_throughput", "total_token_throughput", "tokens_per_s_per_w"),
        *("output_throughput_per_gpu", "total_token_throughput_per_gpu"),
        *("kv_cache_tokens", "kv_cache_blocks"),
        *("slo_met", "goodput_percent", "goodput"),
    }
)
_NEITHER = frozenset({"peak_batch", "mean_power_w", "num_gpus"})


def comparison_text(comparison: Comparison) -> str:
    """Heading, table, verdict, what does not act, and trust."""
    parts = ["\n".join(heading(comparison)), _table(comparison), wrapped_verdict(comparison)]
    if comparison.error_bands:
        parts.append(bands_text(comparison.names, comparison.error_bands))
    if comparison.differences is not None:
        parts.append(comparison.differences.text())
    for name, result in zip(comparison.names[1:], comparison.results[1:], strict=True):
        parts.append(wrapped(speculation_text(comparison.results[0], result, (comparison.names[0], name))))
    parts.append("\n".join(wrapped(f"note: {note}", indent="  ") for note in notes(comparison)))
    trust = "\n".join(wrapped(line, indent="  ") for line in comparison.trust)
    return "\n\n".join(filter(None, [*parts, trust]))


def notes(comparison: Comparison) -> list[str]:
    """The notes of all runs, each once, with the sets it is about where it is not about all."""
    about: dict[str, list[str]] = {}
    for name, result in zip(comparison.names, comparison.results, strict=True):
        for note in result.log.notes:
            about.setdefault(note, []).append(name)
    every = len(comparison.names)
    return [note if len(names) == every else f"{', '.join(names)}: {note}" for note, names in about.items()]


def heading(comparison: Comparison) -> list[str]:
    """What was compared: workload, and models and hardware, those of every set where they differ."""
    lines = [f"workload  {workload_line(result.workload)}" for result in comparison.results]
    clusters = [_cluster(result) for result in comparison.results]
    if len(set(lines)) == 1:
        lines = lines[:1]
    if len(set(clusters)) == 1:
        lines.append(f"cluster   {clusters[0]}")
    else:
        named = zip(comparison.names, clusters, strict=True)
        lines += [f"cluster   {name}: {cluster}" for name, cluster in named]
    return [wrapped(line, screen_width() or 10_000, indent=" " * 10) for line in lines]


def header(comparison: Comparison) -> list[str]:
    """Column titles: figure, unit, the baseline, and every other set with its difference."""
    others = [title for name in comparison.names[1:] for title in (name, "change")]
    return ["", "unit", comparison.names[0], *others]


def wrapped_verdict(comparison: Comparison) -> str:
    """The verdict in lines that fit the screen."""
    return "\n".join(wrapped(paragraph) for paragraph in comparison.verdict.splitlines())


def change_text(change: float | None) -> str:
    """A difference in %: ``+100%``, ``-3.2%``, ``=``; ``new`` for something out of nothing."""
    if change is None:
        return "new"
    if abs(change) < 0.05:
        return "="
    return f"{change:+,.0f}%" if abs(change) >= 99.95 else f"{change:+.1f}%"


def _cluster(result: Result) -> str:
    """``2 x H100 (meta-llama/Llama-3.1-8B, tp 2)``; several alike are counted."""
    counts: dict[str, int] = {}
    for log in result.instances:
        spec = log.spec
        role = f", {spec.pd_type}" if spec.pd_type else ""
        degrees = "".join(
            f", {name} {degree}"
            for name, degree in (("tp", spec.tp_size), ("pp", spec.pp_size), ("ep", spec.ep_size))
            if degree > 1
        )
        words = f"{spec.model_name} on {spec.num_npus} x {spec.hardware}{degrees}{role}"
        counts[words] = counts.get(words, 0) + 1
    parts = [words if count == 1 else f"{count} instances of {words}" for words, count in counts.items()]
    total = f"; {num_gpus(result)} GPUs" if len(result.instances) > 1 else ""
    return "; ".join(parts) + total


def _table(comparison: Comparison) -> str:
    """All rows; where the screen is narrow the unit follows the title, and what is left comes in parts."""
    width = screen_width()
    whole = _rows_of(comparison, units=True)
    if whole.fits(width):
        return whole.plain(width=width)
    return _rows_of(comparison, units=False).plain(width=width)


def _rows_of(comparison: Comparison, units: bool) -> Table:
    first = 2 if units else 1
    titles = header(comparison)
    table = Table(titles if units else [titles[0], *titles[2:]], kept=first + 1, together=2)
    for rows in _sections(comparison.rows):
        if table.rows:
            table.rows.append(None)
        for row in rows:
            named = [row.title, row.unit] if units else [", ".join(filter(None, (row.title, row.unit)))]
            for index, change in enumerate(row.changes()[1:], 1):
                pair = comparison.results[0], comparison.results[index]
                error = ttft_error(pair) if row.section == "TTFT" else worst_error(pair).percent
                table.meanings[len(table.rows), first + 2 * index] = _meaning(row, change, error)
            table.rows.append([*named, *_cells(row)])
    return table


def _sections(rows: Sequence[Row]) -> list[list[Row]]:
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    return list(sections.values())


def _cells(row: Row) -> list[str]:
    changes = row.changes()
    values = _alike(row.values)
    if row.key == "slo_met":
        values = ["yes" if value else "no" for value in row.values]
        return [values[0], *(cell for value in values[1:] for cell in (value, ""))]
    cells = [values[0]]
    for value, change in zip(values[1:], changes[1:], strict=True):
        cells += [value, change_text(change)]
    return cells


def _alike(values: Sequence[float]) -> list[str]:
    """The values of a row with the same number of decimals: those that the smallest needs, at most two beside
    larger ones."""
    if all(float(value).is_integer() for value in values):
        return [f"{value:,.0f}" for value in values]
    sizes = sorted(abs(value) for value in values if value)
    decimals = len(digits(sizes[0]).partition(".")[2])
    if sizes[-1] >= 1:
        decimals = min(decimals, 2)
    return [f"{value:,.{decimals}f}" for value in values]


def _meaning(row: Row, change: float | None, error: float) -> str:
    """Green for better and red for worse, beyond the error of what was compared."""
    if row.key in _NEITHER or (change is not None and abs(change) < error):
        return ""
    less = change is not None and change < 0
    if row.key in _MORE_IS_BETTER:
        return "bad" if less else "good"
    if row.section in _LESS_IS_BETTER or row.key == "duration":
        return "good" if less else "bad"
    return ""
