"""What is printed after the last step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.results.energy import energy_line
from servesim.results.prefix_cache import prefix_cache_lines
from servesim.results.reach import extrapolation_line
from servesim.results.saturation import saturation_line
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.results.result import Result

LATENCY_ROWS = (
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("latency", "e2el"),
    ("queuing delay", "queuing_delay"),
)
"""Shown name and name in the summary's keys."""
STATISTICS = (("mean", "mean"), ("median", "median"), ("P90", "p90"), ("P95", "p95"), ("P99", "p99"))


def closing(result: Result, wall_s: float | None = None) -> str:
    """Totals, throughput, latencies, memory and energy of a run.

    Args:
        result: the run.
        wall_s: how long the simulation took in real seconds; None leaves the line out.
    """
    summary = result.summary
    if result.nothing_ran:
        return "\n".join(
            ["", f"requests       0 completed, {summary['failed']} rejected", *_rejected(result)]
        )
    lines = [
        "",
        *_totals(summary),
        "",
        latency_table(summary).plain(width=screen_width()),
        "",
        *_front_end(summary),
        *_memory(summary),
    ]
    near = saturation_line(summary["saturation"])
    if near:
        lines.append(f"saturation     {near}")
    beyond = extrapolation_line(summary["extrapolated"])
    if beyond:
        lines.append(f"extrapolated   {beyond}")
    lines += _rejected(result)
    if wall_s is not None:
        lines.append(wall_line(summary["duration"], wall_s))
    return "\n".join(_fitted(lines))


def _fitted(lines: list[str]) -> list[str]:
    """Lines broken where the screen ends; in a pipe or a file, each stays whole."""
    width = screen_width()
    if width is None:
        return lines
    return [line if "\n" in line else wrapped(line, width, indent=" " * 15) for line in lines]


def _rejected(result: Result) -> list[str]:
    lines = [f"rejected request {each.request}: {each.reason}" for each in result.rejected[:3]]
    if len(result.rejected) > 3:
        lines.append(f"… and {len(result.rejected) - 3:,} more rejected")
    return lines


def latency_table(summary: Mapping[str, Any]) -> Table:
    """Mean and percentiles of every latency, in ms."""
    table = Table(["ms", *(title for title, _ in STATISTICS)])
    for title, name in LATENCY_ROWS:
        table.rows.append(
            [title, *(digits(summary[f"{statistic}_{name}_ms"]) for _, statistic in STATISTICS)]
        )
    return table


def _front_end(summary: Mapping[str, Any]) -> list[str]:
    """How much of TTFT lies outside the engine, where that is modelled."""
    entry = summary.get("front_end")
    if entry is None:
        return []
    return [
        f"front end      {digits(entry['mean_ms'])} ms of TTFT and latency; TTFT by the engine's own stamps: "
        f"mean {digits(entry['mean_engine_ttft_ms'])} ms, P99 {digits(entry['p99_engine_ttft_ms'])} ms"
    ]


def wall_line(duration_s: float, wall_s: float) -> str:
    """Real time taken and how much faster than real time that is, from the first arrival on."""
    ratio = f", {digits(duration_s / wall_s)} times real time" if wall_s > 0 else ""
    return f"wall time      {wall_s:.2f} s for {duration_s:.1f} simulated seconds{ratio}"


def _totals(summary: Mapping[str, Any]) -> list[str]:
    rejected = f", {summary['failed']} rejected" if summary["failed"] else ""
    cut = summary["cut_answers"]
    short = f" ({cut} answers cut at the longest context)" if cut else ""
    return [
        f"requests       {summary['completed']} completed{rejected} in {summary['duration']:.2f} simulated "
        f"seconds, {summary['steps']} steps",
        f"tokens         {summary['total_input_tokens']} input, "
        f"{summary['total_output_tokens']} output{short}",
        f"throughput     {digits(summary['request_throughput'])} req/s, "
        f"{digits(summary['output_throughput'])} output tok/s, "
        f"{digits(summary['total_token_throughput'])} total tok/s",
    ]


def _memory(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"KV cache       peak {summary['kv_cache']['peak']:.1%}, peak batch {summary['peak_batch']}",
        f"preemptions    {summary['preemptions']}, {summary['recomputed_tokens']} tokens recomputed",
        *prefix_cache_lines(summary["prefix_cache"]),
        f"energy         {energy_line(summary['energy'])}",
    ]
