"""The figures of a comparison: what is shown of every option set, and how they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.explore.slo import num_gpus, per_gpu
from servesim.results.units import GIB
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from servesim.explore.slo import Slo
    from servesim.results.result import Result

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


def figures(results: Sequence[Result], slo: Slo | None = None) -> list[Row]:
    """All figures that every run has, in the order they are shown in."""
    summaries: list[Mapping[str, Any]] = [result.summary for result in results]
    rows: list[Row] = []

    def add(
        section: str, title: str, unit: str, key: str, value: Callable[[Mapping[str, Any]], float | None]
    ) -> None:
        values = [value(summary) for summary in summaries]
        known = [number for number in values if number is not None]
        if len(known) == len(values):
            rows.append(Row(section, title, unit, key, known))

    def kv(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        """A figure that every instance of a run has in common."""
        return lambda summary: summary["instances"][0]["kv_cache"][name] if _uniform(summary, name) else None

    def energy(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda summary: summary["energy"][name] if summary["energy"] else None

    def total(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda summary: summary[name]

    def of_run(section: str, title: str, unit: str, key: str, value: Callable[[Result], float]) -> None:
        rows.append(Row(section, title, unit, key, [value(result) for result in results]))

    of_run("cluster", "GPUs", "", "num_gpus", num_gpus)
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
    of_run("throughput", "output per GPU", "tok/s", "output_throughput_per_gpu", per_gpu)
    of_run(
        "throughput",
        "total per GPU",
        "tok/s",
        "total_token_throughput_per_gpu",
        lambda result: per_gpu(result, "total_token_throughput"),
    )
    add("throughput", "makespan", "s", "duration", total("duration"))
    if slo is not None:
        of_run("SLO", "SLO met", "", "slo_met", lambda result: float(slo.met(result)))
        of_run(
            "SLO",
            "within SLO",
            "%",
            "goodput_percent",
            lambda result: round(slo.goodput_share(result) * 100, 4),
        )
        of_run("SLO", "goodput", "req/s", "goodput", lambda result: _goodput(result, slo))
    for section, name in _LATENCIES:
        for title, statistic in _STATISTICS:
            key = f"{statistic}_{name}_ms"
            add(section, f"{section} {title}", "ms", key, total(key))
    for title, unit, key, name in _ENERGIES:
        add("energy", title, unit, key, energy(name))
    return rows


def _add_prefix_cache(add: Callable[..., None], caches: Sequence[dict[str, Any]]) -> None:
    """Rows about the prefix cache where any run found something, those of a lower tier where any has one."""

    def percent(name: str) -> Callable[[Mapping[str, Any]], float]:
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


def _gib(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda summary: round(summary["prefix_cache"][name] / GIB, 6)


def _uniform(summary: Mapping[str, Any], name: str) -> bool:
    return len({instance["kv_cache"][name] for instance in summary["instances"]}) == 1


def _goodput(result: Result, slo: Slo) -> float:
    """Requests within the SLO per second."""
    asked = len(result.requests) + len(result.rejected)
    duration = result.summary["duration"]
    return round(slo.goodput_share(result) * asked / duration, 6) if duration else 0.0
