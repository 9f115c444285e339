"""The same workload on the same cluster under several option sets, side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from servesim.api import read_workload, simulate, with_flags
from servesim.errors import InputError
from servesim.explore.verdict import verdict
from servesim.results.atomic import atomic_write
from servesim.results.units import GIB
from servesim.specs.cluster import ClusterSpec, load_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

KV_BOUND_WORKLOAD = "workloads/long_context.jsonl"
"""Shipped workload that one accelerator cannot hold in 16-bit KV."""
DEFAULT_SETS: dict[str, dict[str, Any]] = {
    "kv auto": {"kv_cache_dtype": "auto"},
    "kv fp8": {"kv_cache_dtype": "fp8"},
}

_STATISTICS = (("mean", "mean"), ("median", "median"), ("P90", "p90"), ("P95", "p95"), ("P99", "p99"))
_LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("latency", "e2el"))

_ENERGIES = (
    ("energy", "J", "energy_j", "total_j"),
    ("mean power", "W", "mean_power_w", "mean_w"),
    ("energy per token", "J", "j_per_output_token", "j_per_output_token"),
    ("tokens per energy", "tok/s/W", "tokens_per_s_per_w", "tokens_per_s_per_w"),
)
"""Title, unit, name here and name in the summary; of output tokens."""


@dataclass(slots=True, frozen=True)
class Row:
    """One figure of every option set."""

    section: str
    """Rows of a section stand together."""
    title: str
    unit: str
    key: str
    """Name in JSON and CSV."""
    values: list[float]

    def changes(self) -> list[float | None]:
        """Difference of each value to the first in %, None where the first is 0; [0] is 0."""
        base = self.values[0]
        return [
            None if base == 0 and value != 0 else (value / base - 1) * 100 if base else 0.0
            for value in self.values
        ]


@dataclass
class Comparison:
    """Results of several option sets, the first being what the others are compared with."""

    names: list[str]
    results: list[Result]

    @cached_property
    def rows(self) -> list[Row]:
        """All figures, in the order they are shown in."""
        return _rows([result.summary for result in self.results])

    @cached_property
    def verdict(self) -> str:
        """What each change did and why, in a few sentences derived from the results."""
        others = zip(self.names[1:], self.results[1:], strict=True)
        return "\n".join(verdict(self.names[0], self.results[0], name, result) for name, result in others)

    def to_dict(self) -> dict[str, Any]:
        """Figures, differences and verdict, ready for JSON."""
        rows = {
            row.key: {
                "title": row.title,
                "unit": row.unit,
                "values": dict(zip(self.names, row.values, strict=True)),
                "change_percent": dict(zip(self.names[1:], map(_rounded, row.changes()[1:]), strict=True)),
            }
            for row in self.rows
        }
        summaries = dict(zip(self.names, (result.summary for result in self.results), strict=True))
        return {
            "baseline": self.names[0],
            "sets": self.names,
            "rows": rows,
            "verdict": self.verdict,
            "summaries": summaries,
        }

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.json_text())

    def json_text(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write one line per figure: its name, unit, the value of every set and the differences in %."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.csv_text())

    def csv_text(self) -> str:
        """The text of :meth:`save_csv`."""
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["figure", "unit", *self.names, *(f"{name} change %" for name in self.names[1:])])
        for row in self.rows:
            changes = ["" if change is None else _rounded(change) for change in row.changes()[1:]]
            writer.writerow([row.key, row.unit, *row.values, *changes])
        return text.getvalue()


def compare(
    cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None,
    workload: Workload | str | PathLike[str] | None = None,
    sets: Mapping[str, Mapping[str, Any]] | None = None,
    options: RuntimeOptions | None = None,
    *,
    before_run: Callable[[str], None] | None = None,
    **flags: Any,
) -> Comparison:
    """Run every option set and put the results side by side.

    Args:
        cluster: as for :func:`servesim.simulate`.
        workload: as for :func:`servesim.simulate`; None: a shipped workload that the KV cache limits, unless
            ``options`` name a dataset.
        sets: label -> options by name, the first being the baseline; None: KV cache dtype auto against fp8.
        options: what holds for every set unless the set says otherwise.
        before_run: called with the label of each set before it runs.
        **flags: single options for every set.

    Raises:
        InputError: fewer than two sets, or something given is wrong.
    """
    chosen = DEFAULT_SETS if sets is None else sets
    if len(chosen) < 2:
        raise InputError("a comparison needs at least two option sets")
    common = with_flags(options, flags)
    if workload is None and "dataset" not in common.model_fields_set:
        common = common.replace(dataset=KV_BOUND_WORKLOAD)
    own = {name: _changed(common, name, changes) for name, changes in chosen.items()}  # all checked first
    results = []
    loaded: dict[tuple[object, ...], Workload] = {}
    for name, each in own.items():
        spec = cluster if isinstance(cluster, ClusterSpec) else load_cluster(cluster or each.cluster_config)
        key = (each.dataset, each.num_reqs, each.lenient, each.request_rate, each.seed)
        if workload is None and key not in loaded:
            loaded[key] = read_workload(each)
        if before_run is not None:
            before_run(name)
        requests = loaded[key] if workload is None else workload
        results.append(simulate(spec, requests, each))
    return Comparison(list(own), results)


def _changed(common: RuntimeOptions, name: str, changes: Mapping[str, Any]) -> RuntimeOptions:
    try:
        return common.replace(**changes)
    except InputError as error:
        raise InputError(f"option set {name!r}: {error}") from None


def _rounded(change: float | None) -> float | None:
    return None if change is None else round(change, 4)


def _rows(summaries: Sequence[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []

    def add(
        section: str, title: str, unit: str, key: str, value: Callable[[dict[str, Any]], float | None]
    ) -> None:
        values = [value(summary) for summary in summaries]
        known = [number for number in values if number is not None]
        if len(known) == len(values):
            rows.append(Row(section, title, unit, key, known))

    def kv(name: str) -> Callable[[dict[str, Any]], float | None]:
        """A figure that every instance of a run has in common."""
        return lambda summary: summary["instances"][0]["kv_cache"][name] if _uniform(summary, name) else None

    def energy(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda summary: summary["energy"][name] if summary["energy"] else None

    def total(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda summary: summary[name]

    add("KV cache", "KV cache capacity", "tokens", "kv_cache_tokens", lambda s: s["kv_cache"]["tokens"])
    add("KV cache", "KV cache capacity", "blocks", "kv_cache_blocks", lambda s: s["kv_cache"]["blocks"])
    add("KV cache", "KV size", "bytes/token", "kv_bytes_per_token", kv("bytes_per_token"))
    add(
        "KV cache",
        "KV cache peak",
        "%",
        "kv_cache_peak_percent",
        lambda s: round(s["kv_cache"]["peak"] * 100, 4),
    )
    _add_prefix_cache(add, [summary["prefix_cache"] for summary in summaries])
    add("scheduling", "peak batch", "requests", "peak_batch", total("peak_batch"))
    add("scheduling", "preemptions", "", "preemptions", total("preemptions"))
    add("scheduling", "recomputed", "tokens", "recomputed_tokens", total("recomputed_tokens"))
    if any(summary["failed"] for summary in summaries):
        add("scheduling", "rejected", "requests", "failed", total("failed"))
    add("throughput", "output throughput", "tok/s", "output_throughput", total("output_throughput"))
    add("throughput", "total throughput", "tok/s", "total_token_throughput", total("total_token_throughput"))
    add("throughput", "makespan", "s", "duration", total("duration"))
    for section, name in _LATENCIES:
        for title, statistic in _STATISTICS:
            key = f"{statistic}_{name}_ms"
            add(section, f"{section} {title}", "ms", key, total(key))
    for title, unit, key, name in _ENERGIES:
        add("energy", title, unit, key, energy(name))
    return rows


def _add_prefix_cache(add: Callable[..., None], caches: Sequence[dict[str, Any]]) -> None:
    """Rows about the prefix cache where any run found something, those of a lower tier where any has one."""

    def percent(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda summary: round(summary["prefix_cache"][name] * 100, 4)

    section = "prefix cache"
    if any(cache["hit_tokens"] for cache in caches):
        add(section, "prefix hits, NPU", "%", "npu_hit_percent", percent("npu_hit_rate"))
    if any(cache["storage"] for cache in caches):
        add(section, "prefix hits, tier", "%", "storage_hit_percent", percent("storage_hit_rate"))
        add(
            section, "tier capacity", "tokens", "storage_tokens", lambda s: _storage_tokens(s["prefix_cache"])
        )
        add(section, "read from tier", "GiB", "storage_read_gib", _gib("storage_read_bytes"))
        add(section, "written to tier", "GiB", "storage_written_gib", _gib("storage_written_bytes"))


def _storage_tokens(cache: dict[str, Any]) -> int:
    return sum(pool["tokens"] for pool in cache["storage_pools"])


def _gib(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda summary: round(summary["prefix_cache"][name] / GIB, 6)


def _uniform(summary: dict[str, Any], name: str) -> bool:
    return len({instance["kv_cache"][name] for instance in summary["instances"]}) == 1
