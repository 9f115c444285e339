"""A recorded run simulated again from the recording's own arguments, and the comparison as people read it."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from servesim.bench.agreement import METRICS, STATISTICS, Agreement
from servesim.errors import InputError, NotSupportedError, RunError
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.slotted import dataclass
from servesim.terminal import screen_width

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from servesim.bench.agreement import Agreement
    from servesim.bench.recording import Recording
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.hardware import EngineSpec, HardwareSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

GIB_PER_GB = 2**30 / 1e9

_OPTIONS = {
    "dtype": "dtype",
    "kv_cache_dtype": "kv_cache_dtype",
    "block_size": "block_size",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "enable_prefix_caching": "enable_prefix_caching",
    "async_scheduling": "async_scheduling",
    "gpu_memory_utilization": "npu_memory_utilization",
    "max_model_len": "max_model_len",
}
"""vLLM's argument -> ours."""
_DEGREES = {"tensor_parallel_size": "tp_size", "pipeline_parallel_size": "pp_size"}
_WITHOUT_EFFECT = {
    "model",
    "seed",
    "data_parallel_size",
    "enable_expert_parallel",
    "enforce_eager",
    "num_gpu_blocks",
    "num_gpu_blocks_override",
    *_DEGREES,
}
"""Arguments that are read elsewhere, or that change no time."""
_SIZES_THE_CACHE = (
    *("num_gpu_blocks", "npu_memory_utilization", "block_size", "dtype", "kv_cache_dtype"),
    *("max_num_seqs", "max_num_batched_tokens"),
)
"""Flags with which the recorded number of KV blocks is not that of the run any more."""
_STATISTIC_NAMES = {"mean": "mean", "median": "median", "p90": "P90", "p95": "P95", "p99": "P99"}


@dataclass(slots=True, frozen=True)
class RecordedRun:
    """Everything a simulation of a recording needs."""

    recording: Recording
    cluster: ClusterSpec
    workload: Workload
    options: RuntimeOptions
    arrivals: str
    """Where the arrivals are from: ``workload`` or ``recording``."""
    not_simulated: dict[str, Any] = field(default_factory=dict)
    """Arguments of the recorded engine that the simulation knows nothing about."""
    kv_blocks: str = ""
    """Where the number of KV blocks is from; empty: it is estimated, as the recording does not say it."""

    def simulate(self, anchor: str, engine: EngineSpec | None = None) -> Agreement:
        """Run it and compare.

        Args:
            anchor: ``queued`` or ``arrival``.
            engine: constants that replace those of every instance; None: as the cluster and hardware say.

        Raises:
            InputError: the recording has no such anchor, or something the run needs is wrong.
            RunError: the simulation rejects a request that the real engine served.
        """
        from servesim.api import read_cluster, simulate_loaded

        self.recording.anchor_ns(anchor)
        cluster = self.cluster if engine is None else with_engine(self.cluster, engine)
        result = simulate_loaded(read_cluster(self.options, cluster), self.workload, self.options)
        if result.rejected:
            first = result.rejected[0]
            raise RunError(
                f"{self.recording.source}: request {first.request} was served in the recording, and the "
                f"simulation rejects it ({len(result.rejected)} in all): {first.reason}"
            )
        return Agreement(self.recording, result, anchor)


def recorded_run(
    recording: Recording,
    *,
    cluster_config: str | Path | None = None,
    dataset: str | Path | None = None,
    arrivals: str | None = None,
    flags: Mapping[str, Any] | None = None,
    link_gib: bool = False,
) -> RecordedRun:
    """The run of a recording: its cluster, its workload, its engine's arguments.

    Args:
        recording: what to simulate.
        cluster_config: None: the one recorded beside it.
        dataset: the workload that was sent, with token ids for prefix hits; None: lengths as recorded.
        arrivals: ``workload`` or ``recording``; None: of the workload if there is one.
        flags: options by name; they win over the recording's arguments.
        link_gib: ``link_bw`` of the cluster counts 2^30 bytes per second instead of 10^9.

    Raises:
        InputError: the cluster, the workload or an argument does not fit the recording.
    """
    from servesim.specs.cluster import load_cluster

    config = cluster_config if cluster_config is not None else recording.cluster
    if config is None:
        raise InputError(
            f"{recording.source}: has no cluster.json; --cluster-config names the cluster it was recorded on"
        )
    cluster = load_cluster(config)
    if link_gib:
        _check_links(cluster)
        rates = [rate * GIB_PER_GB for rate in cluster.link_bandwidths_gbs]
        cluster = cluster.model_copy(update={"link_bw": tuple(rates) if len(rates) > 1 else rates[0]})
    _check_cluster(recording, cluster)
    options, not_simulated = options_of(recording, flags or {})
    if arrivals == "workload" and dataset is None:
        raise InputError("--arrivals workload: needs the workload; --dataset names it")
    chosen = arrivals or ("workload" if dataset is not None else "recording")
    workload = recording.workload() if dataset is None else _sent_workload(recording, dataset)
    if chosen == "recording":
        for request, arrival_ns in zip(workload.requests, recording.arrival_ns.tolist(), strict=True):
            request.arrival_ns = arrival_ns
    options, kv_blocks = _with_recorded_blocks(recording, cluster, options, flags or {})
    return RecordedRun(recording, cluster, workload, options, chosen, not_simulated, kv_blocks)


def _with_recorded_blocks(
    recording: Recording, cluster: ClusterSpec, options: RuntimeOptions, flags: Mapping[str, Any]
) -> tuple[RuntimeOptions, str]:
    """The options with the recorded number of KV blocks, and a line about it."""
    blocks = recording.num_gpu_blocks
    if blocks is None:
        return options, ""
    others = sorted(set(flags) & set(_SIZES_THE_CACHE))
    if others:
        return options, f"not the recorded {blocks} a replica, since {others[0]} is given"
    if all(instance.num_gpu_blocks is not None for _, instance in cluster.instances):
        return options, f"num_gpu_blocks of {cluster.source}, not the recorded {blocks} a replica"
    return options.replace(num_gpu_blocks=blocks), f"{blocks} a replica, as recorded"


def options_of(recording: Recording, flags: Mapping[str, Any]) -> tuple[RuntimeOptions, dict[str, Any]]:
    """Our options for the recorded engine's arguments, ``flags`` winning, and the arguments left over.

    Raises:
        InputError: an argument has a value that is not allowed.
    """
    from servesim.specs.options import RuntimeOptions
    from servesim.specs.validation import validated

    values: dict[str, Any] = {}
    left = {}
    for name, value in recording.arguments.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _OPTIONS:
            if value != "auto" or name != "dtype":
                values[_OPTIONS[name]] = value
        elif value is not False:
            left[name] = value
    if recording.arguments.get("enforce_eager"):
        values["cudagraph"] = False
    return validated(RuntimeOptions, {**values, **flags}, f"{recording.source}: engine_kwargs"), left


def with_engine(cluster: ClusterSpec, engine: EngineSpec) -> ClusterSpec:
    """The cluster with the engine constants of every instance replaced."""
    return _with_instances(cluster, lambda _: engine)


def with_calibration(cluster: ClusterSpec, hardware: HardwareSpec, source: str) -> ClusterSpec:
    """The cluster with the calibrated constants on the instances of that hardware.

    Raises:
        InputError: the file holds no constants, or no instance is of its hardware.
    """
    if "engine" not in hardware.model_fields_set:
        raise InputError(f"{source}: has no engine block; `servesim bench calibrate` writes one")
    there = sorted({instance.hardware for _, instance in cluster.instances})
    if hardware.name not in there:
        raise InputError(
            f"{source}: was calibrated for {hardware.name}, and the cluster has {', '.join(there)}; "
            "constants of one machine say nothing about another"
        )
    return _with_instances(
        cluster, lambda instance: hardware.engine if instance.hardware == hardware.name else instance.engine
    )


def _with_instances(cluster: ClusterSpec, engine_of: Any) -> ClusterSpec:
    nodes = tuple(
        node.model_copy(
            update={
                "instances": tuple(
                    instance.model_copy(update={"engine": engine_of(instance)}) for instance in node.instances
                )
            }
        )
        for node in cluster.nodes
    )
    return cluster.model_copy(update={"nodes": nodes})


def _check_cluster(recording: Recording, cluster: ClusterSpec) -> None:
    """The cluster must be the one that was recorded, as far as the recording tells."""
    for index, (_, instance) in enumerate(cluster.instances):
        where = f"{cluster.source}: instance {index}"
        if recording.model is not None and instance.model_name != recording.model:
            raise InputError(
                f"{where}: model_name {instance.model_name} is not the recorded {recording.model}; give the "
                "cluster that was recorded with --cluster-config"
            )
        _check_degrees(recording, instance, where)
    replicas = recording.arguments.get("data_parallel_size") or 1
    if recording.arguments and replicas != len(cluster.instances):
        raise InputError(
            f"{cluster.source}: has {len(cluster.instances)} instances, and the recording has "
            f"data_parallel_size {replicas}"
        )
    if replicas != 1 and all(instance.dp_group is None for _, instance in cluster.instances):
        raise NotSupportedError(
            f"{recording.source}: data_parallel_size {replicas}: the instances of {cluster.source} need a "
            "dp_group, for the recorded engines kept step with one another"
        )


def _check_links(cluster: ClusterSpec) -> None:
    """Links matter where there is more than one GPU.

    Raises:
        InputError: there is one alone.
    """
    if sum(instance.num_npus for _, instance in cluster.instances) < 2:
        raise InputError(
            f"--link-unit GiB: has no effect here: {cluster.source} has one GPU, and nothing goes over a "
            "link; leave it out"
        )


def _check_degrees(recording: Recording, instance: InstanceSpec, where: str) -> None:
    for theirs, ours in _DEGREES.items():
        recorded = recording.arguments.get(theirs)
        if recorded is not None and recorded != getattr(instance, ours):
            raise InputError(
                f"{where}: {ours} {getattr(instance, ours)} is not the recording's {theirs} {recorded}; give "
                "the cluster that was recorded with --cluster-config"
            )


def _sent_workload(recording: Recording, dataset: str | Path) -> Workload:
    """The workload that was recorded; its first requests when the recording stopped earlier.

    Raises:
        InputError: it is not the recorded one.
    """
    from servesim.workload.formats import load_workload

    workload = load_workload(dataset)
    if len(workload) < len(recording):
        raise InputError(
            f"{dataset}: has {len(workload)} requests, and the recording {len(recording)}; give the workload "
            "that was recorded"
        )
    del workload.requests[len(recording) :]
    lengths = zip(recording.input_tokens.tolist(), recording.output_tokens.tolist(), strict=True)
    for request, (prompt, output) in zip(workload.requests, lengths, strict=True):
        if (request.input_tokens, request.output_tokens) != (prompt, output):
            raise InputError(
                f"{dataset}: request {request.index} has {request.input_tokens} prompt and "
                f"{request.output_tokens} output tokens, and the recording {prompt} and {output}; give the "
                "workload that was recorded"
            )
    return workload


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
    lines += [f"           note: {note}" for note in agreement.result.log.notes]
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
                    f"{metric} {_STATISTIC_NAMES[statistic]}",
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
