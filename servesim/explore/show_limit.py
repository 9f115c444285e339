"""How the largest load is shown: a few lines, a table of the curve, and a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from servesim.explore.rate_search import LEAST_PATTERNS
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.explore.load_point import LoadPoint
    from servesim.explore.rate_search import LoadLimit

_INDENT = " " * 15


def limit_text(limit: LoadLimit) -> str:
    """What ``servesim slo`` prints."""
    lines = [*_answer(limit), "", _curve(limit).plain(width=screen_width())]
    if any(point.growing and point.meets for point in limit.curve):
        lines += ["", "* the queue grew while requests arrived: a longer workload keeps less at this load"]
    if any(not point.complete for point in limit.curve):
        lines += ["", "+ ended once the bounds were certain to be missed: of the requests finished by then"]
    lines += [_line("note", note) for note in limit.notes]
    return "\n".join(lines)


def limit_html(limit: LoadLimit) -> str:
    """The same in a notebook, with a chart."""
    from servesim.explore.notebook import chart_svg, page_html, table_html

    points = [point for point in limit.curve if not math.isinf(point.load) and point.complete]
    series = {
        name: [(point.load, point.figures[key]) for point in points]
        for name, key in (("TTFT P99", "p99_ttft_ms"), ("TPOT P99", "p99_tpot_ms"))
    }
    marks = [] if limit.load is None else [("largest", limit.load)]
    chart = chart_svg(series, limit.unit, "ms", marks)
    return page_html("\n".join(_answer(limit)), chart, table_html(_curve(limit)))


def _answer(limit: LoadLimit) -> list[str]:
    target = limit.target.words()
    if limit.load is None:
        lowest = limit.curve[0]
        return [
            _line("no load", f"keeps {target}"),
            _line("", f"even {lowest.missed_words(limit.target, limit.unit)}"),
        ]
    if math.isinf(limit.load):
        return [
            _line("any load", f"keeps {target}"),
            _line("", "even with everything at once; a longer workload may show a limit"),
        ]
    what = "largest rate" if limit.by == "rate" else "concurrency"
    lines = [_line(what, f"{_load(limit, limit.load)} {limit.unit} keeps {target}")]
    lines.append(_line("band", f"{_bands(limit)}"))
    lines.append(_line("binds", limit.binding))
    if limit.left_out or limit.wide:
        lines.append(_line("quick", _quick(limit)))
    return lines


def _bands(limit: LoadLimit) -> str:
    parts = []
    if limit.band is None:
        parts.append("one arrival pattern, the workload's own: how far others differ was not asked")
    else:
        low, high = (_load(limit, end) for end in limit.band)
        error = limit.standard_error or 0.0
        reached = f"standard error {error * 100:.1f} %, {limit.precision * 100:g} % wanted"
        stable = "" if limit.stable else "; not stable, try more with --patterns"
        if len(limit.loads) < LEAST_PATTERNS:
            stable = ""
        parts.append(f"{low} to {high} over {len(limit.loads)} arrival patterns ({reached}{stable})")
    if limit.kernel_band is not None:
        ends = ["none" if end is None else _load(limit, end) for end in limit.kernel_band]
        parts.append(
            f"{ends[0]} to {ends[1]} if all kernel times are {limit.kernel_error_percent:g} % longer or "
            "shorter, their stated error"
        )
    return "; ".join(parts)


def _quick(limit: LoadLimit) -> str:
    """What a quick search left open."""
    parts = []
    if limit.wide:
        parts.append(f"the least load that misses is {limit.reached * 100:.0f} % above")
    if limit.left_out:
        parts.append(f"not tried: {', '.join(limit.left_out)}")
    return f"{'; '.join(parts)}; --effort full takes longer and does all of it"


def _load(limit: LoadLimit, load: float) -> str:
    return f"{load:,.0f}" if limit.by == "concurrency" else digits(load)


def _line(label: str, text: str) -> str:
    return wrapped(f"{label:<{len(_INDENT)}}{text}", screen_width(), indent=_INDENT)


def _curve(limit: LoadLimit) -> Table:
    table = Table(
        [
            limit.unit,
            "TTFT P50 ms",
            "TTFT P99 ms",
            "TPOT P50 ms",
            "TPOT P99 ms",
            "goodput %",
            "good req/s",
            "output tok/s",
            "",
        ]
    )
    for point in limit.curve:
        figures = point.figures
        load = "all at once" if math.isinf(point.load) else _load(limit, point.load)
        table.rows.append(
            [
                load + ("*" if point.growing and point.meets else "") + ("" if point.complete else "+"),
                *(digits(figures[f"{name}_ms"]) for name in _LATENCIES),
                f"{point.goodput * 100:.1f}" if point.complete else "",
                digits(point.good_per_s),
                f"{figures['output_throughput']:,.0f}",
                "keeps" if point.meets else "misses",
            ]
        )
        table.meanings[len(table.rows) - 1, 8] = "good" if point.meets else "bad"
    return table


_LATENCIES = ("median_ttft", "p99_ttft", "median_tpot", "p99_tpot")


def save_plot(limit: LoadLimit, path: Path) -> None:
    """Draw the curve: latencies and goodput over the load; PNG or SVG by the ending of ``path``.

    Raises:
        InputError: matplotlib is not installed.
    """
    from servesim.results.figures import new_figure, require_matplotlib, save_figure

    require_matplotlib("--plot")
    points = [point for point in limit.curve if not math.isinf(point.load) and point.complete]
    figure = new_figure(12.0, 3.8)
    ttft, tpot, good = figure.subplots(1, 3)
    for axes, name, metric in ((ttft, "TTFT", "ttft"), (tpot, "TPOT", "tpot")):
        for key, label in (("median", "P50"), ("p99", "P99")):
            axes.plot(*_series(points, f"{key}_{metric}_ms"), marker="o", label=label)
        for bound in limit.target.slo.bounds:
            if bound.metric == metric:
                axes.axhline(bound.limit_ms, linestyle="--", color="black", label=f"{bound.title} bound")
        axes.set_ylabel(f"{name}, ms")
        axes.set_yscale("log")
    good.plot([point.load for point in points], [point.good_per_s for point in points], marker="o")
    good.set_ylabel("requests within the bounds, req/s")
    for axes in (ttft, tpot, good):
        axes.set_xlabel(limit.unit)
        axes.grid(alpha=0.3)
        if limit.load is not None and math.isfinite(limit.load):
            axes.axvline(limit.load, color="tab:green", label="largest load")
            if limit.band is not None:
                axes.axvspan(*limit.band, color="tab:green", alpha=0.15)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    save_figure(figure, path)


def _series(points: list[LoadPoint], key: str) -> tuple[list[float], list[Any]]:
    return [point.load for point in points], [point.figures[key] for point in points]
