"""The reports of what compares, searches and validates: option sets, rates, sweeps, fleets, recordings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim._version import __version__
from servesim.report.charts import busy_charts, cumulative, distribution_charts
from servesim.report.page import Chart, Page, Section, Series, TableBlock, Verbatim
from servesim.report.run import provenance
from servesim.results.units import MS, digits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servesim.bench.agreement import Agreement
    from servesim.bench.validate import RecordedRun
    from servesim.explore.compare import Comparison
    from servesim.explore.load_point import LoadPoint
    from servesim.explore.plan_result import Plan
    from servesim.explore.rate_search import LoadLimit
    from servesim.explore.sweep_table import Sweep
    from servesim.report.page import Block

_MOST_ROWS = 500
"""Rows of a table at most; all of them are in the command's own file."""
_THROUGHPUT = "output tok/s per GPU"


def compare_page(comparison: Comparison) -> Page:
    """Option sets side by side: verdict, figures, distributions, load over time."""
    named = dict(zip(comparison.names, comparison.results, strict=True))
    ran = {name: result for name, result in named.items() if not result.nothing_ran}
    failures = [
        f"{name}: every request was rejected: {reason}" for name, reason in comparison.failures.items()
    ]
    return Page(
        " against ".join(comparison.names),
        f"{comparison.results[0].workload.source}, servesim {__version__}",
        [
            Section("Verdict", [*failures, *comparison.verdict.splitlines(), *comparison.trust]),
            Section("Figures", [_figures(comparison), *_bands(comparison), *_trade(ran)]),
            Section("Latencies", distribution_charts(ran)),
            Section("Over time", busy_charts(ran)),
            *(Section(f"Provenance: {name}", provenance(result).blocks) for name, result in named.items()),
        ],
    )


def _figures(comparison: Comparison) -> TableBlock:
    names, rows = comparison.names, []
    for row in comparison.rows:
        changes = ["" if change is None else f"{change:+.1f} %" for change in row.changes()[1:]]
        rows.append([row.title, row.unit, *(digits(value) for value in row.values), *changes])
    header = ["", "", *names, *(f"{name} change" for name in names[1:])]
    return TableBlock(header, rows, "", frozenset({1}))


def _bands(comparison: Comparison) -> list[Block]:
    """The figures that decide at both ends of the capacity's band, and how noise spreads the differences."""
    rows = []
    for name, result, ends in zip(comparison.names, comparison.results, comparison.bands, strict=False):
        if ends is None:
            continue
        for title, key in _DECIDING:
            figures = [each.figure(key) for each in (ends.low, result, ends.high)]
            rows.append([name, title, *map(digits, figures)])
    header = ["set", "", "least KV", "as planned", "most KV"]
    blocks: list[Block] = [TableBlock(header, rows, "At the ends of the KV capacity's band", frozenset({1}))]
    if comparison.differences is not None:
        blocks.append(Verbatim(comparison.differences.text()))
    return blocks


_DECIDING = (
    ("output tok/s", "output_throughput"),
    ("mean TTFT ms", "mean_ttft_ms"),
    ("P99 TTFT ms", "p99_ttft_ms"),
    ("P99 TPOT ms", "p99_tpot_ms"),
)


def _trade(results: Mapping[str, Any]) -> list[Block]:
    from servesim.explore.slo import num_gpus

    charts: list[Block] = []
    for name in ("ttft", "tpot"):
        series = [
            Series(
                label,
                [result.summary[f"p99_{name}_ms"]],
                [result.summary["output_throughput"] / num_gpus(result)],
                [label],
            )
            for label, result in results.items()
        ]
        charts.append(
            Chart(
                f"Throughput against {name.upper()}",
                "scatter",
                f"P99 {name.upper()} (ms)",
                _THROUGHPUT,
                series,
            )
        )
    return charts


# ---------------------------------------------------------------------- the largest load


def slo_page(limit: LoadLimit) -> Page:
    """The largest load that keeps the bounds, and the curve that led there."""
    from servesim.explore.show_limit import limit_text

    points = [point for point in limit.curve if math.isfinite(point.load) and point.complete]
    load = "no load" if limit.load is None else f"{digits(limit.load)} {limit.unit}"
    charts: list[Block] = [
        _curve(limit, points, "TTFT", "ttft"),
        _curve(limit, points, "TPOT", "tpot"),
        Chart(
            "Requests that keep every bound",
            "line",
            limit.unit,
            "req/s",
            [Series("", [point.load for point in points], [point.good_per_s for point in points])],
        ),
        Chart(
            "Goodput",
            "line",
            limit.unit,
            "% of the requests",
            [Series("", [point.load for point in points], [point.goodput * 100 for point in points])],
        ),
    ]
    return Page(
        f"{load} keeps {limit.target.words()}",
        f"servesim {__version__}, {limit.runs} runs",
        [Section("Answer", [Verbatim(limit_text(limit))]), Section("The curve", charts)],
    )


def _curve(limit: LoadLimit, points: Sequence[LoadPoint], title: str, metric: str) -> Chart:
    loads = [point.load for point in points]
    series = [
        Series(name, loads, [point.figures[f"{key}_{metric}_ms"] for point in points])
        for key, name in (("median", "P50"), ("p99", "P99"))
    ]
    ends = [min(loads), max(loads)] if loads else []
    for bound in limit.target.slo.bounds:
        if bound.metric == metric and ends:
            series.append(Series(f"{bound.title} bound", ends, [bound.limit_ms] * 2))
    return Chart(title, "line", limit.unit, f"{title} (ms)", series, y_log=True)


# ---------------------------------------------------------------------- sweeps and fleets


def sweep_page(sweep: Sweep) -> Page:
    """All configurations: what each trades for what, and the table."""
    able = [row for row in sweep.rows if row["status"] == "ok"]
    charts: list[Block] = [_pareto(sweep, able, name) for name in ("ttft", "tpot", "e2el")]
    hidden = {"key", "options", "bundle", "notes", "run_id", "servesim"}
    columns = [name for name in sweep.columns if name not in hidden]
    rows = [[_cell(row.get(name)) for name in columns] for row in sweep.rows[:_MOST_ROWS]]
    more = len(sweep.rows) - len(rows)
    caption = (
        f"the first {_MOST_ROWS:,} rows; {more:,} more are in the table of the sweep" if more > 0 else ""
    )
    best = sweep.best
    told = f"{sweep.counted()}, {len(sweep.failed):,} without figures."
    if best is not None:
        told += f" Best per GPU: {_label(sweep, best)}."
    return Page(
        f"Sweep over {', '.join(sweep.names)}",
        f"servesim {__version__}",
        [
            Section("Trade-offs", [told, *charts]),
            Section("Configurations", [TableBlock(columns, rows, caption, frozenset({1}))]),
        ],
    )


def _label(sweep: Sweep, row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(row.get(name))}" for name in sweep.names)


def _pareto(sweep: Sweep, rows: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    """Throughput per GPU against a latency; on the front are those that none beats in both."""
    key = f"p99_{metric}_ms"
    known = sorted((row for row in rows if key in row), key=lambda row: float(row[key]))
    front, others, best = [], [], -1.0
    for row in known:
        if row["output_throughput_per_gpu"] > best:
            best = row["output_throughput_per_gpu"]
            front.append(row)
        else:
            others.append(row)
    title = {"e2el": "latency"}.get(metric, metric.upper())
    series = [
        Series(
            name,
            [row[key] for row in part],
            [row["output_throughput_per_gpu"] for row in part],
            [_label(sweep, row) for row in part],
        )
        for name, part in (("Pareto front", front), ("others", others))
        if part
    ]
    return Chart(f"Throughput against {title}", "scatter", f"P99 {title} (ms)", _THROUGHPUT, series)


def plan_page(plan: Plan) -> Page:
    """The cheapest fleet, what it was chosen from, and what would change the choice."""
    from servesim.explore.plan_result import LATENCY

    ran = [trial for trial in plan.trials if trial.point is not None]
    front = plan.front
    on_front = {id(trial) for trial in front}
    parts = {
        "Pareto front": front,
        "keeps the bounds": [trial for trial in ran if trial.meets and id(trial) not in on_front],
        "misses them": [trial for trial in ran if not trial.meets],
    }
    charts: list[Block] = [
        Chart(
            f"Cost against {title}",
            "scatter",
            "$ per hour",
            f"{title} (ms)",
            [
                Series(
                    name,
                    [trial.figures["cost_per_hour"] for trial in part],
                    [trial.figures[key] for trial in part],
                    [trial.fleet.words() for trial in part],
                )
                for name, part in parts.items()
                if part and key in part[0].figures
            ],
            y_log=True,
        )
        for title, key in (("P99 latency", LATENCY), ("P99 TTFT", "p99_ttft_ms"), ("P99 TPOT", "p99_tpot_ms"))
    ]
    rows = [trial.row() for trial in plan.trials[:_MOST_ROWS]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    answer = plan.best.words() if plan.best else "No fleet keeps the bounds"
    return Page(
        answer,
        f"{plan.question.target.words()}; {plan.workload.source}; prices of {plan.prices.as_of}; "
        f"servesim {__version__}",
        [
            Section("Answer", [Verbatim(plan.text()), *(Verbatim(line) for line in plan.serve_lines()[:1])]),
            Section("Trade-offs", charts),
            Section(
                "Fleets that were run",
                [TableBlock(columns, [[_cell(row.get(name)) for name in columns] for row in rows])],
            ),
        ],
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return digits(value) if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------- recordings


def validate_page(recorded: RecordedRun, agreement: Agreement) -> Page:
    """A recorded run and its simulation: figures, distributions, load over time."""
    from servesim.bench.validate import comparison_text

    charts: list[Block] = [
        Chart(
            f"Distribution of {metric}",
            "line",
            f"{metric} (ms)",
            "at most so long (%)",
            [
                cumulative(name, np.asarray(times.metric(metric) / MS))
                for name, times in (("recorded", agreement.recorded), ("simulated", agreement.simulated))
            ],
            note=f"mean {100 * agreement.error(metric):+.1f} %",
        )
        for metric in agreement.distributions
    ]
    charts += [
        Chart(
            name[0].upper() + name[1:],
            "line",
            "time (s)",
            name,
            [
                Series("recorded", curves.times_s.tolist(), curves.recorded.tolist()),
                Series("simulated", curves.times_s.tolist(), curves.simulated.tolist()),
            ],
        )
        for name, curves in agreement.curves.items()
    ]
    return Page(
        f"{recorded.recording.name}: recorded and simulated",
        f"{len(recorded.recording):,} requests, servesim {__version__}",
        [
            Section("Agreement", [Verbatim(comparison_text(recorded, agreement))]),
            Section("Distributions and load", charts),
            provenance(agreement.result),
        ],
    )
