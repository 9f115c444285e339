"""What is printed before the first step: options as resolved, memory, where kernel times come from."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from servesim._version import __version__
from servesim.results.prefix_cache import tier_line
from servesim.results.stated_errors import RESULTS
from servesim.results.units import gib, seconds
from servesim.specs.dtypes import short_dtype
from servesim.specs.instance_options import InstanceOptions
from servesim.specs.options import RuntimeOptions
from servesim.specs.validation import UNLIMITED
from servesim.terminal import WIDTH, screen_width, wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.ledger import Share
    from servesim.memory.plan import KvCapacity
    from servesim.results.records import InstanceLog
    from servesim.specs.cluster import InstanceSpec
    from servesim.workload.request import Workload

_ALREADY_SHOWN = frozenset(
    {"variant", "kv_dtype", "skipped", "npu_memory_utilization", "num_gpu_blocks", "plan_as_vllm"}
)
"""Instance options that the lines of their instance show anyway."""
_SHOWN_WHEN_CHANGED = frozenset(
    {
        *(
            "enable_local_offloading",
            "enable_attn_offloading",
            "enable_sub_batch_interleaving",
            "enable_block_copy",
        ),
        *(
            "cudagraph",
            "scheduling_policy",
            "max_num_active_seqs",
            "max_num_scheduled_tokens",
            "long_prefill_token_threshold_adaptive",
            "prefill_schedule_interval",
            "watermark",
            "kv_load",
            "enable_lora",
            "max_loras",
            "disable_hybrid_kv_cache_manager",
            "decode_context_parallel_size",
            "dcp_comm_backend",
            "kv_cache_dtype_skip_layers",
            "num_reqs",
            "max_concurrency",
            "request_rate",
            "skip_prefill",
            "enable_prefix_sharing",
        ),
        *("prefix_storage", "request_routing_policy", "expert_routing_policy", "seed", "stepped", "preset"),
    }
)
"""Options that are worth a word only when they differ from their default."""


def banner(
    options: RuntimeOptions, workload: Workload, instances: Sequence[InstanceLog], notes: Sequence[str] = ()
) -> str:
    """The text above the heartbeat.

    Args:
        options: the options of the run; those an instance resolves for itself are shown as resolved.
        workload: the requests of the run.
        instances: as the engine set them up.
        notes: what was asked for and does not act.
    """
    lines = [
        f"servesim {__version__}",
        f"cluster   {options.cluster_config}, {_count(len(instances), 'instance')}",
    ]
    lines.append(f"workload  {workload_line(workload)}")
    common = _common_options(instances)
    shown = {**common, **_run_options(options)}
    lines += _wrapped("options   ", [_option(name, value) for name, value in shown.items()])
    for group in _alike(instances):
        lines += _instance_lines(group, common)
    lines += [f"note      {note}" for note in notes]
    width = screen_width()
    if width is None:  # in a pipe or a file, what belongs together stays in one line
        return "\n".join(lines)
    return "\n".join(wrapped(line, width, indent=" " * _indent(line)) for line in lines)


def workload_line(workload: Workload) -> str:
    """``name: 300 requests, 120000 input + 60000 output tokens, arrivals over 29.8s``."""
    prompt, output = (int(workload.column(name).sum()) for name in ("input_tokens", "output_tokens"))
    first = workload.column("arrival_ns")[workload.column("predecessor") < 0]
    parts = [f"{_count(len(workload), 'request')}, {prompt} input + {output} output tokens"]
    if len(first):
        parts.append(f"arrivals over {seconds(int(first.max() - first.min()))}")
    follow_ups = len(workload) - len(first)
    if follow_ups:
        parts.append(f"{follow_ups} follow-ups in sessions")
    if workload.skipped:
        parts.append(f"{_count(workload.skipped, 'bad line')} skipped")
    return f"{workload.source or 'given'}: {', '.join(parts)}"


def _indent(line: str) -> int:
    """Where the lines that a line of the banner is broken into begin: below its text."""
    return 12 if line.startswith("  ") else 10


def kv_cache_line(instance: InstanceLog) -> str:
    """The documented line about one instance's KV cache."""
    capacity = instance.capacity
    overridden = ", set by num_gpu_blocks" if capacity.overridden else ""
    groups = f"in {capacity.plan.words} " if capacity.plan else ""
    return (
        f"KV cache: {capacity.tokens} tokens / {capacity.num_blocks} blocks of {capacity.block_size} "
        f"{groups}({gib(capacity.kv_bytes)} GiB per NPU at utilization {capacity.utilization:.2f}"
        f"{overridden}), {capacity.bytes_per_token} bytes/token (kv {_kv_formats(instance.options)})"
    )


def _kv_formats(options: InstanceOptions) -> str:
    """``fp8``, or ``fp8, 4 layers bf16``."""
    name, count = short_dtype(options.kv_dtype), len(options.skipped)
    wide = short_dtype(options.wide_dtype)
    return f"{name}, {_count(count, 'layer')} {wide}" if count else name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _option(name: str, value: object) -> str:
    shown = str(value)
    if isinstance(value, bool):
        shown = "on" if value else "off"
    elif value == UNLIMITED:
        shown = "unlimited"
    return f"{name.removeprefix('enable_').replace('_', '-')} {shown}"


def _wrapped(first: str, parts: Sequence[str]) -> list[str]:
    """``parts`` joined by `` · `` into indented lines that fit the screen."""
    limit = screen_width() or WIDTH
    lines = []
    line = first
    for part in parts:
        joined = line + part if line == first or not line.strip() else f"{line} · {part}"
        if len(joined) > limit and line.strip():
            lines.append(line)
            line = " " * len(first) + part
        else:
            line = joined
    return [*lines, line.rstrip()]


def _is_default(name: str, value: object) -> bool:
    return bool(RuntimeOptions.model_fields[name].default == value)


def _run_options(options: RuntimeOptions) -> dict[str, Any]:
    """Options of the whole run, as opposed to one instance, that differ from their default."""
    of_instances = {field.name for field in fields(InstanceOptions)}
    chosen = {
        name: getattr(options, name) for name in RuntimeOptions.model_fields if name not in of_instances
    }
    return {
        name: value
        for name, value in chosen.items()
        if name in _SHOWN_WHEN_CHANGED and not _is_default(name, value)
    }


def _options_of(instance: InstanceLog) -> dict[str, Any]:
    """What an instance runs with, without what is at its default and rarely touched."""
    options = instance.options
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    return {
        name: value
        for name, value in chosen.items()
        if name not in _ALREADY_SHOWN
        and name != "speculative"  # a note says it, and where its acceptance comes from
        and not (name in _SHOWN_WHEN_CHANGED and _is_default(name, value))
        and (name, value) != ("long_prefill_token_threshold", UNLIMITED)
    }


def _common_options(instances: Sequence[InstanceLog]) -> dict[str, Any]:
    """The options that every instance has the same value of."""
    if not instances:
        return {}
    first, *others = [_options_of(instance) for instance in instances]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _alike(instances: Sequence[InstanceLog]) -> list[list[InstanceLog]]:
    """Instances in groups that need to be described only once, in order of first appearance."""
    groups: dict[str, list[InstanceLog]] = {}
    for instance in instances:
        tier = tier_line(instance.tier) if instance.tier else ""
        key = repr((instance.spec, instance.options, instance.capacity, instance.bundle_source, tier))
        groups.setdefault(key, []).append(instance)
    return list(groups.values())


def _index_ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _shape(spec: InstanceSpec) -> list[str]:
    """How an instance is spread over NPUs and what part it has: ``tp 2``, ``pp 2``, ``decode``."""
    shape = [f"tp {spec.tp_size}"]
    shape += [f"pp {spec.pp_size}"] if spec.pp_size > 1 else []
    shape += [f"ep {spec.ep_size}"] if spec.ep_size > 1 else []
    shape += [f"dp_group {spec.dp_group}"] if spec.dp_group is not None else []
    return [*shape, spec.pd_type] if spec.pd_type else shape


def _instance_lines(group: Sequence[InstanceLog], common: dict[str, Any]) -> list[str]:
    instance = group[0]
    spec, capacity = instance.spec, instance.capacity
    name = f"instance{'s' if len(group) > 1 else ''} {_index_ranges([member.index for member in group])}"
    lines = [f"{name}: {spec.model_name} on {spec.num_npus} x {spec.hardware} ({', '.join(_shape(spec))})"]
    own = {key: value for key, value in _options_of(instance).items() if key not in common}
    if own:
        lines += _wrapped("  options   ", [_option(key, value) for key, value in own.items()])
    lines.append(f"  kernels   {instance.options.variant}: {instance.bundle_source}")
    if instance.stated_error is not None:
        error = instance.stated_error
        of_ttft = ""
        if error.ttft_percent > error.percent:
            of_ttft = f", TTFT ±{error.ttft_percent:g} % by public serving runs"
        lines.append(
            f"  trust     kernel times ±{error.percent:g} % ({error.reason}){of_ttft}; see {RESULTS}"
        )
    lines.append(f"  host      {instance.host}")
    lines.append(f"  memory    {_memory_parts(capacity)}")
    lines.append(f"  {kv_cache_line(instance)}")
    lines += [f"  band      {line}" for line in _band(capacity)]
    lines += [f"  note      {line}" for line in instance.notes]
    if instance.tier:
        lines.append(f"  {tier_line(instance.tier)}")
    lines += [f"  {_outside_line(place, capacity)}" for place in capacity.outside]
    return lines


def _memory_parts(capacity: KvCapacity) -> str:
    """What one NPU's memory goes to, beside the KV cache."""
    graphs = f", CUDA graphs {gib(capacity.graph_bytes)}" if capacity.graph_bytes else ""
    return (
        f"{gib(capacity.total_bytes)} GiB per NPU: weights {gib(capacity.weight_bytes)}, activations "
        f"{gib(capacity.activation_bytes)}{graphs}, other {gib(capacity.non_torch_bytes)} GiB"
    )


def _band(capacity: KvCapacity) -> list[str]:
    """How sure the size of the KV cache is; nothing where it is not estimated."""
    low, high = capacity.band_tokens
    if low == high:
        return []
    changes = [f"{(end / capacity.tokens - 1) * 100:+.1f}%" for end in (low, high)]
    return [
        f"{low} to {high} tokens ({changes[0]}, {changes[1]}): activations and other are estimated as "
        f"vLLM {capacity.engine} starts"
    ]


def _outside_line(share: Share, capacity: KvCapacity) -> str:
    """What an instance keeps in a memory that is not its NPUs'."""
    parts = [f"weights {gib(share.weight_bytes)}"] if share.weight_bytes else []
    if share.kv_bytes_per_token:
        parts.append(f"KV cache {gib(share.kv_bytes_per_token * capacity.tokens)}")
    return f"{share.place:<10}{', '.join(parts)} of {gib(share.memory.total_bytes)} GiB"
