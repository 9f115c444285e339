"""Says in words what an option set did to a run and why, from the figures of both runs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from servesim.explore.kernels import kernel_changes
from servesim.explore.limits import limits
from servesim.results.units import digits

if TYPE_CHECKING:
    from servesim.explore.kernels import KernelChange
    from servesim.explore.limits import Limits
    from servesim.results.result import Result

NOTICEABLE_PERCENT = 1.0
"""Smaller differences are called none."""


def verdict(base_name: str, base: Result, name: str, other: Result) -> str:
    """One short paragraph on what ``other`` did compared with ``base``."""
    if not option_differences(base, other):
        return f"{name} resolves to the same options as {base_name} on every instance, so nothing can change."
    reasons = [_why_memory(base, other), _why_prefix_cache(base, other), _why_kernels(base, other)]
    sentences = [f"{name} {_outcome(base, other)}", *reasons]
    return " ".join(sentence for sentence in sentences if sentence)


def option_differences(base: Result, other: Result) -> dict[str, tuple[Any, Any]]:
    """Resolved options that differ between two runs, of instances and of the run: name -> (before, after)."""
    found: dict[str, tuple[Any, Any]] = {}
    if len(base.instances) != len(other.instances):
        found["instances"] = (len(base.instances), len(other.instances))
    for one, two in zip(base.instances, other.instances, strict=False):
        for option in fields(one.options):
            before, after = getattr(one.options, option.name), getattr(two.options, option.name)
            if before != after:
                found.setdefault(option.name, (before, after))
        if one.spec != two.spec:
            found.setdefault("instance", (one.spec, two.spec))
    if base.options is not None and other.options is not None:
        of_instances = {option.name for log in base.instances[:1] for option in fields(log.options)}
        for option_name in type(base.options).model_fields:
            before, after = getattr(base.options, option_name), getattr(other.options, option_name)
            if before != after and option_name not in of_instances:
                found.setdefault(option_name, (before, after))
    return found


def _change(base: Result, other: Result, key: str) -> float:
    before, after = base.summary[key], other.summary[key]
    return (after / before - 1) * 100 if before else 0.0


def _signed(percent: float) -> str:
    if abs(percent) < 0.05:
        return "unchanged"
    return f"{percent:+.0f}%" if abs(percent) >= 9.95 else f"{percent:+.1f}%"


def _outcome(base: Result, other: Result) -> str:
    """Whether the change pays, with the figures that decide it."""
    throughput, latency = _change(base, other, "output_throughput"), _change(base, other, "mean_e2el_ms")
    gains = throughput >= NOTICEABLE_PERCENT or latency <= -NOTICEABLE_PERCENT
    losses = throughput <= -NOTICEABLE_PERCENT or latency >= NOTICEABLE_PERCENT
    judgement = {
        (True, False): "pays here",
        (False, True): "does not pay here",
        (True, True): "is a trade here",
        (False, False): "does not pay here (no difference worth having)",
    }[gains, losses]
    ttft, tpot = _change(base, other, "mean_ttft_ms"), _change(base, other, "mean_tpot_ms")
    return (
        f"{judgement}: output throughput {_signed(throughput)}, mean latency {_signed(latency)} "
        f"(TTFT {_signed(ttft)}, TPOT {_signed(tpot)})."
    )


def _why_memory(base: Result, other: Result) -> str:
    """What the change did to the KV cache's capacity, and whether capacity was what limited the baseline."""
    before, after = base.summary["kv_cache"]["tokens"], other.summary["kv_cache"]["tokens"]
    was, now = limits(base), limits(other)
    capacity = "The KV cache holds as much as before"
    if abs(after / before - 1) * 100 >= NOTICEABLE_PERCENT:
        capacity = f"The KV cache holds {after / before:.2f} times the tokens ({before:,} to {after:,})"
    if was.kv_bound:
        batch = f"peak batch {base.summary['peak_batch']} to {other.summary['peak_batch']}"
        return (
            f"{capacity}, and its size was what limited the run: before, {_kv_words(was)}; "
            f"now, {_kv_words(now)}; {batch}."
        )
    peak = f"peak {base.summary['kv_cache']['peak']:.1%}, no preemptions"
    if now.kv_bound:
        return f"{capacity}; its size was not a limit before ({peak}), but is now: {_kv_words(now)}."
    instead = f"; requests waited for {was.other}" if was.other else ""
    return f"{capacity}, but its size was no limit ({peak}){instead}."


def _why_prefix_cache(base: Result, other: Result) -> str:
    """How much less, or more, of the prompts had to be computed."""
    before, after = base.summary["prefix_cache"], other.summary["prefix_cache"]
    if abs(after["hit_rate"] - before["hit_rate"]) * 100 < NOTICEABLE_PERCENT:
        return ""
    return (
        f"Of the prompt tokens {_hit_words(after)} came from the prefix cache, before {_hit_words(before)}."
    )


def _hit_words(cache: dict[str, Any]) -> str:
    tier = f" ({cache['storage_hit_rate']:.0%} from the {cache['storage']} tier)" if cache["storage"] else ""
    return f"{cache['hit_rate']:.0%}{tier}"


def _kv_words(found: Limits) -> str:
    preemptions = f"{found.preemptions} preemption{'' if found.preemptions == 1 else 's'}"
    waiting = f"requests waited for KV blocks {found.blocks:.0%} of the time"
    if found.blocks < 0.005:
        waiting = "no waiting for KV blocks"
        if found.other:
            waiting += f" but for {found.other}"
    return f"{preemptions}, {waiting}"


def _why_kernels(base: Result, other: Result) -> str:
    """Which typical steps of the baseline got faster or slower."""
    changes = kernel_changes(base, other)
    return f"Typical steps of the baseline: {'; '.join(map(_kernel_words, changes))}." if changes else ""


def _kernel_words(change: KernelChange) -> str:
    percent = (change.after_us / change.before_us - 1) * 100
    times = f"{digits(change.before_us / 1000)} to {digits(change.after_us / 1000)} ms"
    speed = f"takes {abs(percent):.0f}% {'less' if percent < 0 else 'more'}"
    if abs(percent) < NOTICEABLE_PERCENT:
        speed = "takes as long as before"
    kernel = ""
    if change.kernel_before_us and change.kernel_before_us != change.kernel_after_us:
        kernel = f", {change.kernel} {_signed((change.kernel_after_us / change.kernel_before_us - 1) * 100)}"
    return f"{change.step} {speed} ({times}{kernel})"
