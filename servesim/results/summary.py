"""Figures of a whole run, under the names that ``vllm bench serve`` gives them in its result file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, is_dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from servesim._version import __version__
from servesim.results.atomic import atomic_write
from servesim.results.energy import energy_entry
from servesim.results.prefix_cache import PROMPT_FIELDS, prefix_cache_entry
from servesim.results.reach import extrapolation_entry
from servesim.results.saturation import saturation_entry
from servesim.results.stats import Distribution, describe, exact_sum
from servesim.results.units import MS, SECOND
from servesim.specs.options import output_fields
from servesim.specs.presets import LIMITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from servesim.results.records import InstanceLog, SpeculationLog
    from servesim.results.request_table import RequestTable
    from servesim.results.result import Result
    from servesim.results.step_log import StepLog
    from servesim.specs.options import RuntimeOptions

_PROFILES = "profiler/perf/"
_NOT_IN_SUMMARY = frozenset(
    {
        *("cluster_config", "dataset", "run_id", "tokenizer", "estimate_tokens", "columns"),
        *("itl", "log_interval", "log_level", "lenient", "stepped"),
        *("ensemble", "step_noise", "run_noise", "arrival_jitter"),
        *("network_backend", "inputs_root", "cleanup_inputs"),
    }
)
"""Options that say where files are or what is written, and so do not belong to the outcome."""


def distributions(result: Result) -> dict[str, Distribution]:
    """``ttft``, ``tpot``, ``itl``, ``e2el`` and ``queuing_delay`` of all finished requests, in ns.

    As in vLLM's benchmark, a request with a single token has no TPOT; ITL counts every gap of every request
    once.
    """
    rows = result.table
    gaps, counts = result.token_gaps.histogram()
    return {
        "ttft": describe(rows["TTFT"]),
        "tpot": describe(rows["TPOT"][rows["output"] > 1]),
        "itl": describe(gaps, counts),
        "e2el": describe(rows["latency"]),
        "queuing_delay": describe(rows["queuing_delay"]),
    }


def duration_ns(result: Result) -> int:
    """First arrival to last end of a finished request, in ns; 0 when none finished."""
    rows = result.table
    return int(rows["end_time"].max() - rows["arrival"].min()) if len(rows) else 0


def _per_second(amount: int, elapsed_ns: int) -> float:
    return round(amount * SECOND / elapsed_ns, 6) if elapsed_ns > 0 else 0.0


def _latency_keys(result: Result) -> dict[str, float]:
    keys = {}
    for name, figures in distributions(result).items():
        for statistic, value in (
            ("mean", figures.mean),
            ("median", figures.median),
            ("std", figures.std),
            ("p90", figures.p90),
            ("p95", figures.p95),
            ("p99", figures.p99),
        ):
            keys[f"{statistic}_{name}_ms"] = round(value / MS, 6)
    return keys


def _front_end_entry(result: Result) -> dict[str, dict[str, float]]:
    """Time between client and engine, and TTFT without it, as the engine's own stamps have it.

    Nothing where no front end is modelled.
    """
    front_end = result.records.column("front_end_ns")
    if not front_end.any():
        return {}
    engine = describe(result.table["TTFT"] - front_end)
    figures = {"mean": engine.mean, "median": engine.median, "p90": engine.p90, "p99": engine.p99}
    entry = {f"{name}_engine_ttft_ms": round(value / MS, 6) for name, value in figures.items()}
    return {"front_end": {"mean_ms": round(describe(front_end).mean / MS, 6), **entry}}


def kv_peak_blocks(instance: InstanceLog) -> int:
    """Most KV blocks in use during any step of the instance."""
    return instance.steps.most("kv_blocks_used")


def _kv_cache(instance: InstanceLog) -> dict[str, Any]:
    capacity = instance.capacity
    peak = kv_peak_blocks(instance)
    groups: dict[str, Any] = {}
    if capacity.plan is not None:
        groups["groups"] = [
            {"kind": g.kind, "layers": len(g.pages), "block_size": g.block_size, "reach": g.reach}
            for g in capacity.plan.groups
        ]
    return {
        "tokens": capacity.tokens,
        "tokens_band": list(capacity.band_tokens),
        "blocks": capacity.num_blocks,
        "blocks_band": list(capacity.band_blocks),
        "block_size": capacity.block_size,
        "bytes_per_token": capacity.bytes_per_token,
        "bytes_per_block": capacity.bytes_per_block,
        **groups,
        "peak_blocks": peak,
        "peak": round(peak / capacity.usable_blocks, 6),
    }


def _portable(bundle_source: str) -> str:
    """The source of kernel times without the folder in which this machine keeps the profiles."""
    _, root, rest = bundle_source.partition(_PROFILES)
    return root + rest if root else bundle_source


def _busy_ns(steps: StepLog) -> int:
    return sum(exact_sum(steps.durations(first, last)) for first, last in steps.parts())


def _instance_entry(instance: InstanceLog, rows: RequestTable) -> dict[str, Any]:
    steps, mine = instance.steps, rows["instance_id"] == instance.index
    options = asdict(instance.options) if is_dataclass(instance.options) else {}
    if options.get("speculative", ...) is None:
        del options["speculative"]
    if options.get("kv_load") == "step":
        del options["kv_load"]
    return {
        "instance": instance.index,
        "node": instance.node,
        "model": instance.spec.model_name,
        "hardware": instance.spec.hardware,
        "bundle": _portable(instance.bundle_source),
        "host": instance.host,
        "options": options,
        "weight_bytes": instance.capacity.weight_bytes,
        "outside": [
            {
                "place": memory.place,
                "weight_bytes": memory.weight_bytes,
                "kv_bytes": memory.kv_bytes_per_token * instance.capacity.tokens,
            }
            for memory in instance.capacity.outside
        ],
        "kv_cache": _kv_cache(instance),
        "prefix_cache": prefix_cache_entry([instance], {name: rows[name][mine] for name in PROMPT_FIELDS}),
        "steps": len(steps),
        "dummy_steps": len(instance.dummies),
        "peak_batch": steps.most("running"),
        "preemptions": steps.preempted.total(),
        "busy_s": round(_busy_ns(steps) / SECOND, 9),
    }


def speculation_keys(logs: Sequence[SpeculationLog]) -> dict[str, Any]:
    """What became of drafts, under the names of ``vllm bench serve``; nothing where nothing was drafted.

    The acceptance rate is in percent, of drafted tokens; the acceptance length counts the token that is no
    draft; the rates by position are of verifications.
    """
    if not logs:
        return {}
    drafts = sum(log.num_drafts for log in logs)
    drafted = sum(sum(log.draft_tokens) for log in logs)
    accepted = sum(sum(log.accepted_tokens) for log in logs)
    counts = [sum(per) for per in zip_longest(*(log.accepted_per_position for log in logs), fillvalue=0)]
    return {
        "spec_decode_acceptance_rate": round(100 * accepted / drafted, 6) if drafted else 0.0,
        "spec_decode_acceptance_length": round(1 + accepted / drafts, 6) if drafts else 0.0,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": [round(count / max(drafts, 1), 6) for count in counts],
    }


def _kv_cache_totals(result: Result) -> dict[str, Any]:
    """Capacity over all instances; ``peak`` is the fullest one's, ``bytes_per_block`` null if they differ.

    The ends of a band are those of every instance together: what makes one estimate wrong does so with all.
    """
    per_instance = [_kv_cache(instance) for instance in result.instances]
    sizes = {entry["bytes_per_block"] for entry in per_instance}
    return {
        "tokens": sum(entry["tokens"] for entry in per_instance),
        "tokens_band": [sum(entry["tokens_band"][end] for entry in per_instance) for end in (0, 1)],
        "blocks": sum(entry["blocks"] for entry in per_instance),
        "blocks_band": [sum(entry["blocks_band"][end] for entry in per_instance) for end in (0, 1)],
        "bytes_per_block": sizes.pop() if len(sizes) == 1 else None,
        "peak": max((entry["peak"] for entry in per_instance), default=0.0),
    }


def _options(result: Result) -> dict[str, Any] | None:
    if result.options is None:
        return None
    chosen: dict[str, Any] = result.options.model_dump(mode="json")
    if result.options.preset is not None:  # decides these by the hardware of each instance
        for name in set(LIMITS) - result.options.model_fields_set:
            found = {getattr(instance.options, name) for instance in result.instances}
            chosen[name] = found.pop() if len(found) == 1 else None
    return {
        name: "inf" if value == math.inf else value
        for name, value in chosen.items()
        if name not in _NOT_IN_SUMMARY and name not in output_fields()
        if value is not None or not name.startswith("speculative_")
        if (name, value) != ("kv_load", "step")
    }


def summarise(result: Result) -> dict[str, Any]:
    """All figures of a run as plain numbers and strings, ready for JSON.

    Times named ``_ms`` are milliseconds, ``duration`` is in seconds; nothing depends on the wall clock, the
    machine or the place of the files.
    """
    rows = result.table
    elapsed = duration_ns(result)
    input_tokens, output_tokens = int(rows["input"].sum()), int(rows["output"].sum())
    return {
        "duration": elapsed / SECOND,
        "completed": len(rows),
        "failed": len(result.rejected),
        "cut_answers": int((result.records.column("cut_tokens") > 0).sum()),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": _per_second(len(rows), elapsed),
        "output_throughput": _per_second(output_tokens, elapsed),
        "total_token_throughput": _per_second(input_tokens + output_tokens, elapsed),
        **_latency_keys(result),
        **_front_end_entry(result),
        "kv_cache": _kv_cache_totals(result),
        "peak_batch": max((instance.steps.most("running") for instance in result.instances), default=0),
        "steps": sum(len(instance.steps) for instance in result.instances),
        **speculation_keys([instance.speculation for instance in result.instances if instance.speculation]),
        "preemptions": int(rows["preemptions"].sum()),
        "recomputed_tokens": result.records.total("recomputed_tokens"),
        "prefix_cache": prefix_cache_entry(result.instances, rows),
        "saturation": saturation_entry(result),
        "extrapolated": extrapolation_entry(result),
        "energy": energy_entry(result),
        "skipped_lines": result.workload.skipped,
        "options": _options(result),
        "notes": list(result.log.notes),
        "instances": [_instance_entry(instance, rows) for instance in result.instances],
        "bundle": sorted({_portable(instance.bundle_source) for instance in result.instances}),
        "run_id": result.run_id,
        "versions": {"servesim": __version__, "vllm": result.metadata["vllm_version"]},
    }


def save_summary(summary: Mapping[str, Any], path: str | Path) -> None:
    """Write a summary as indented JSON."""
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    with atomic_write(path, "w") as handle:
        handle.write(text + "\n")


def _plain(value: object) -> object:
    """NumPy numbers as Python numbers, everything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def write_summary(result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """See :class:`servesim.results.outputs.Writer`."""
    del options
    save_summary({**result.summary, **extra}, path)
    return [path]


class Summary(TypedDict):
    """Figures of a run under the names of ``vllm bench serve``, and ours; docs/output.md explains each.

    Times of distributions are in ms, ``duration`` in s, throughputs per second of the run.
    """

    duration: float
    completed: int
    failed: int
    cut_answers: int
    """Answers that are shorter than asked for, since the context was full."""
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    std_ttft_ms: float
    p90_ttft_ms: float
    p95_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    std_tpot_ms: float
    p90_tpot_ms: float
    p95_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    std_itl_ms: float
    p90_itl_ms: float
    p95_itl_ms: float
    p99_itl_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    std_e2el_ms: float
    p90_e2el_ms: float
    p95_e2el_ms: float
    p99_e2el_ms: float
    mean_queuing_delay_ms: float
    median_queuing_delay_ms: float
    std_queuing_delay_ms: float
    p90_queuing_delay_ms: float
    p95_queuing_delay_ms: float
    p99_queuing_delay_ms: float
    front_end: NotRequired[dict[str, float]]
    kv_cache: dict[str, Any]
    peak_batch: int
    steps: int
    preemptions: int
    recomputed_tokens: int
    prefix_cache: dict[str, Any]
    saturation: dict[str, Any]
    extrapolated: list[Any]
    energy: dict[str, Any] | None
    skipped_lines: int
    options: dict[str, Any]
    notes: list[Any]
    instances: list[Any]
    bundle: list[Any]
    run_id: str
    versions: dict[str, Any]
