"""The report of one run: figures, charts, and where the time of slow requests went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.report.charts import distribution_charts, dots, names_of, over_time
from servesim.report.page import Chart, Page, Section, Series, TableBlock, Tiles, Verbatim
from servesim.results.blame import MEANINGS, PARTS, TITLES, blame
from servesim.results.closing import LATENCY_ROWS, STATISTICS
from servesim.results.reach import extrapolation_line
from servesim.results.saturation import saturation_line
from servesim.results.units import MS, SECOND, digits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servesim.report.page import Block
    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions

_SLOWEST = 20


def write_report(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options, extra
    run_page(result).save(path)
    return [path]


def write_plots(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`; ``path`` is a folder."""
    from servesim.report.images import save_images

    del options, extra
    save_images(run_page(result), path)
    return [path]


def run_page(result: Result) -> Page:
    """The whole report of a run."""
    if result.nothing_ran:
        reason = f"Every request was rejected: {result.rejected[0].reason}"
        return Page(_title(result), _subtitle(result), [Section("Summary", [reason]), provenance(result)])
    return Page(
        _title(result),
        _subtitle(result),
        [
            Section("Summary", _summary(result)),
            Section("Latencies", distribution_charts({"": result})),
            Section("Over time", over_time(result)),
            Section("Requests", _requests(result)),
            Section("Why requests are slow", _blame(result)),
            provenance(result),
        ],
    )


def _title(result: Result) -> str:
    specs = [instance.spec for instance in result.instances]
    counted: dict[str, int] = {}
    for spec in specs:
        name = f"{spec.model_name} on {spec.hardware}"
        counted[name] = counted.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())


def _subtitle(result: Result) -> str:
    summary = result.summary
    return (
        f"{summary['completed']:,} requests of {result.workload.source} in {summary['duration']:,.1f} "
        f"simulated seconds; servesim {summary['versions']['servesim']}, run {summary['run_id']}"
    )


def _summary(result: Result) -> list[Block]:
    summary = result.summary
    cache, energy = summary["prefix_cache"], summary["energy"]
    tiles = [
        ("requests", f"{summary['completed']:,}", f"of {len(result.workload):,}"),
        ("throughput", digits(summary["request_throughput"]), "req/s"),
        ("output", digits(summary["output_throughput"]), "tok/s"),
        ("TTFT mean", digits(summary["mean_ttft_ms"]), "ms"),
        ("TTFT P99", digits(summary["p99_ttft_ms"]), "ms"),
        ("TPOT mean", digits(summary["mean_tpot_ms"]), "ms"),
        ("TPOT P99", digits(summary["p99_tpot_ms"]), "ms"),
        ("KV cache peak", f"{summary['kv_cache']['peak']:.1%}", ""),
        ("preemptions", f"{summary['preemptions']:,}", ""),
    ]
    if cache["lookup_tokens"]:
        tiles.append(("prefix hits", f"{cache['hit_rate']:.1%}", "of prompt tokens"))
    if energy is not None:
        tiles.append(("energy", digits(energy["total_j"]), "J"))
    blocks: list[Block] = [Tiles(tiles)]
    for label, line in (
        ("Saturation", saturation_line(summary["saturation"])),
        ("Extrapolated", extrapolation_line(summary["extrapolated"])),
    ):
        if line:
            blocks.append(f"{label}: {line}")
    blocks += [f"Kernel times: {line}" for line in _errors(result)]
    rows = [
        [title, *(digits(summary[f"{statistic}_{name}_ms"]) for _, statistic in STATISTICS)]  # type: ignore[literal-required]
        for title, name in LATENCY_ROWS
    ]
    blocks.append(TableBlock(["ms", *(title for title, _ in STATISTICS)], rows))
    if result.rejected:
        blocks.append(f"{len(result.rejected):,} requests were rejected: {result.rejected[0].reason}")
    return blocks


def _errors(result: Result) -> list[str]:
    """How far the kernel times of the instances are off, each told once."""
    stated = [instance.stated_error for instance in result.instances]
    told = [f"±{error.percent:g} % ({error.reason})" for error in stated if error is not None]
    return list(dict.fromkeys(told))


def _requests(result: Result) -> list[Block]:
    rows = result.requests
    names = names_of(result)
    of_instance = [
        (name, rows[rows["instance_id"] == instance.index])
        for name, instance in zip(names, result.instances, strict=True)
    ]
    return [
        Chart(
            "TTFT by prompt length",
            "scatter",
            "prompt (tokens)",
            "TTFT (ms)",
            [
                dots(name, part, part["input"].astype(np.float64), part["TTFT"] / MS)
                for name, part in of_instance
                if len(part)
            ],
            y_log=bool((rows["TTFT"] > 0).all()),
        ),
        Chart(
            "Latency by output length",
            "scatter",
            "output (tokens)",
            "latency (s)",
            [
                dots(name, part, part["output"].astype(np.float64), part["latency"] / SECOND)
                for name, part in of_instance
                if len(part)
            ],
        ),
    ]


def _blame(result: Result) -> list[Block]:
    """What the latency of all requests and of the slowest consists of."""
    parts, rows = blame(result), result.requests
    used = [name for name in PARTS if parts[name].any()]
    slowest = np.argsort(-rows["latency"], kind="stable")[:_SLOWEST]
    shown = [int(at) for at in slowest[:10]]
    categories = ["mean of all", *(f"request {rows['request_id'][at]}" for at in shown)]
    bars = [
        Series(
            TITLES[name], [], [float(parts[name].mean()) / MS, *(float(parts[name][at]) / MS for at in shown)]
        )
        for name in used
    ]
    first = np.argsort(-rows["TTFT"], kind="stable")[:_SLOWEST]
    header = [
        "request",
        "prompt",
        "output",
        "latency ms",
        "TTFT ms",
        *(f"{TITLES[name]} ms" for name in used),
    ]

    def table(caption: str, which: Sequence[int]) -> TableBlock:
        cells = [
            [
                str(rows["request_id"][at]),
                f"{rows['input'][at]:,}",
                f"{rows['output'][at]:,}",
                digits(rows["latency"][at] / MS),
                digits(rows["TTFT"][at] / MS),
                *(digits(parts[name][at] / MS) for name in used),
            ]
            for at in which
        ]
        return TableBlock(header, cells, caption)

    return [
        "The parts of a request's latency sum to it. Steps that compute for several requests count for "
        "each of them in full, as each waits for the whole step.",
        Chart(
            "Where the time of the slowest requests went",
            "bar",
            "",
            "latency (ms)",
            bars,
            categories=categories,
        ),
        table("The slowest requests", slowest.tolist()),
        table("The longest waits for a first token", first.tolist()),
        TableBlock(
            ["part", "meaning"], [[TITLES[name], MEANINGS[name]] for name in used], "", frozenset({1})
        ),
    ]


def provenance(result: Result) -> Section:
    """With what the run was made, and what to know about it."""
    summary = result.summary
    options = summary["options"] or {}
    set_options = "\n".join(f"{name} = {value}" for name, value in options.items() if value is not None)
    rows = [
        [
            str(instance.index),
            instance.spec.model_name,
            instance.spec.hardware,
            f"{instance.spec.num_npus}",
            f"{instance.capacity.tokens:,}",
            instance.options.variant,
            instance.bundle_source,
        ]
        for instance in result.instances
    ]
    header = ["instance", "model", "hardware", "NPUs", "KV tokens", "dtypes", "kernel times"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    blocks: list[Block] = [
        f"Versions: {versions}. Run {summary['run_id']}. Workload: {result.workload.source}.",
        TableBlock(header, rows, "Instances", frozenset({1, 2, 5, 6})),
    ]
    blocks += [f"Note: {note}" for note in summary["notes"]]
    blocks += [note for instance in result.instances for note in instance.notes]
    if set_options:
        blocks.append(Verbatim(set_options))
    return Section("Provenance", blocks)
