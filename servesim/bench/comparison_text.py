"""A comparison with a recording as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.bench.agreement import METRICS, STATISTICS
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width

if TYPE_CHECKING:
    from servesim.bench.agreement import Agreement
    from servesim.bench.validate import RecordedRun

_NAMES = {"mean": "mean", "median": "median", "p90": "P90", "p95": "P95", "p99": "P99"}


def comparison_text(run: RecordedRun, agreement: Agreement) -> str:
    """Head, figures of both sides with their differences, errors of single requests, throughput, load."""
    recording, report = run.recording, agreement.report()
    lines = [
        f"recording: {recording.name}: {recording.engine}, {recording.model or 'unknown model'}, "
        f"{len(recording)} requests",
        f"simulated: {agreement.result.instances[0].bundle_source}",
        f"           arrivals of the {run.arrivals}, TTFT and latency from {agreement.anchor}",
    ]
    if run.kv_blocks:
        lines.append(f"           KV blocks: {run.kv_blocks}")
    if run.not_simulated:
        left = ", ".join(f"{name}={value}" for name, value in run.not_simulated.items())
        lines.append(f"           not simulated: {left}")
    table = Table(["", "recorded", "simulated", "difference", "error"])
    for metric in METRICS:
        figures = report["metrics"][metric]
        if table.rows:
            table.rows.append(None)
        for statistic in STATISTICS:
            row = figures[statistic]
            table.rows.append(
                [
                    f"{metric} {_NAMES[statistic]}",
                    f"{digits(row['recorded_ms'])} ms",
                    f"{digits(row['simulated_ms'])} ms",
                    f"{_signed(row['error_ms'])} ms",
                    f"{row['error_percent']:+.2f} %",
                ]
            )
        single = figures["per_request"]
        table.rows.append(
            [
                f"{metric} of a request, median |error|",
                "",
                "",
                f"{digits(single['median_absolute_error_ms'])} ms",
                f"{single['median_absolute_error_percent']:.2f} %",
            ]
        )
    table.rows.append(None)
    for name, row in report["throughput"].items():
        unit = "s" if name == "duration_seconds" else "/s"
        label = name.removesuffix("_per_second").removesuffix("_seconds").replace("_", " ")
        table.rows.append(
            [
                label,
                f"{digits(row['recorded'])} {unit}",
                f"{digits(row['simulated'])} {unit}",
                f"{_signed(row['simulated'] - row['recorded'])} {unit}",
                f"{row['error_percent']:+.2f} %",
            ]
        )
    lines += ["", table.plain(width=screen_width())]
    if report["over_time"]:
        lines.append("")
        lines += [
            f"{name} over time: mean |error| {digits(row['mean_absolute_error'])} of a mean "
            f"{digits(row['recorded_mean'])}"
            for name, row in report["over_time"].items()
        ]
    return "\n".join(lines)


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{digits(abs(value))}"
