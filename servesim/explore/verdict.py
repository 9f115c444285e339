"""Says in words what an option set did to a run and why, from the figures of both runs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from servesim.explore.capacity_band import capacity_matters
from servesim.explore.kernels import kernel_changes
from servesim.explore.limits import limits, percent
from servesim.explore.slo import (
    ALIKE,
    FAILS,
    FIGURES,
    TRADES,
    change,
    judge,
    num_gpus,
    survives,
    ttft_error,
    worst_error,
)
from servesim.results.units import digits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.explore.capacity_band import BandRuns
    from servesim.explore.ensemble import Spread
    from servesim.explore.kernels import KernelChange
    from servesim.explore.limits import Limits
    from servesim.explore.slo import Judgement, Slo
    from servesim.results.result import Result

_NOTICEABLE_PERCENT = 1.0
"""Smaller differences of a capacity, a hit rate or a kernel's time are called none: those are counted, or
come from the same tables."""


def verdict(
    base_name: str,
    base: Result,
    name: str,
    other: Result,
    *,
    slo: Slo | None = None,
    noise: Mapping[str, Spread] | None = None,
    bands: tuple[BandRuns | None, BandRuns | None] = (None, None),
) -> str:
    """One short paragraph on what ``other`` did compared with ``base``.

    Args:
        base_name: label of the baseline.
        base: the run compared with.
        name: label of the other run.
        other: the run in question.
        slo: decides whether the change pays.
        noise: spread of the differences in %, by key; see :func:`judge`.
        bands: both runs at the ends of their capacity bands, where that was looked at.
    """
    if base.nothing_ran:
        return f"{base_name} {FAILS}, so there is nothing to compare {name} with."
    if other.nothing_ran:
        return f"{name} {FAILS}: every request is rejected."
    if not option_differences(base, other):
        return f"{name} resolves to the same options as {base_name} on every instance, so nothing can change."
    judgement = judge(base, other, slo, noise)
    reasons = [
        _slo_words(base_name, base, name, other, slo) if slo else "",
        _rejections(base_name, base, name, other),
        _why_memory(base, other),
        _band_words(base_name, name, judgement, (base, other), bands, slo, noise),
        _why_prefix_cache(base, other),
        _why_kernels(base, other),
    ]
    sentences = [f"{name} {_outcome(base, other, judgement, noise or {})}", *reasons]
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


def _signed(moved: float) -> str:
    if abs(moved) < 0.05:
        return "unchanged"
    return f"{moved:+,.0f} %" if abs(moved) >= 9.95 else f"{moved:+.1f} %"


def _outcome(base: Result, other: Result, judgement: Judgement, noise: Mapping[str, Spread]) -> str:
    """Whether the change pays, with the figures that decide it."""
    words = judgement.conclusion
    if words == ALIKE:
        lost = [
            title
            for key, title, _ in FIGURES
            if abs(change(base, other, key)) > judgement.threshold and not survives(noise.get(key))
        ]
        words += f" (less than the tables' error of {judgement.threshold:.0f} %"
        of_ttft = ttft_error((base, other))
        words += f", {of_ttft:.0f} % for TTFT" if of_ttft > judgement.threshold else ""
        words += f"; lost in the noise: {', '.join(lost)})" if lost else ")"
    if words == TRADES:
        words += f" (better: {', '.join(judgement.better)}; worse: {', '.join(judgement.worse)})"
    moved = {key: _signed(change(base, other, key)) for key, _, _ in FIGURES}
    throughput = f"output throughput {moved['output_throughput']}"
    before, after = num_gpus(base), num_gpus(other)
    if before != after:
        times = f"{after / before:g}" if after % before == 0 else f"{after / before:.2g}"
        each = _signed(change(base, other, "output_throughput_per_gpu"))
        throughput += f" for {times} times the GPUs ({before} to {after}): per GPU {each}"
    return (
        f"{words}: {throughput}; mean latency {moved['mean_e2el_ms']} "
        f"(TTFT {moved['mean_ttft_ms']}, TPOT {moved['mean_tpot_ms']})."
    )


def _slo_words(base_name: str, base: Result, name: str, other: Result, slo: Slo) -> str:
    """Who meets the SLO, by how much it is missed, and what is too close to call."""
    met = [slo.met(result) for result in (base, other)]
    who = {
        (True, True): "Both meet",
        (True, False): f"Only {base_name} meets",
        (False, True): f"Only {name} meets",
        (False, False): "Neither meets",
    }[met[0], met[1]]
    shares = f"{percent(slo.goodput_share(base))} and {percent(slo.goodput_share(other))}"
    words = f"{who} the SLO ({slo.words()}); {shares} of the requests are within it"
    error = worst_error((base, other)).percent
    close: dict[str, float] = {}
    for label, result in ((base_name, base), (name, other)):
        for bound in slo.bounds:
            value = bound.value_ms(result)
            if value > bound.limit_ms:
                words += f"; {label} has {bound.title} {digits(value)} ms"
            allowed = ttft_error((base, other)) if bound.metric == "ttft" else error
            if abs(value / bound.limit_ms - 1) * 100 < allowed:
                close[f"{bound.title} of {label}"] = allowed
    if close:
        words += f"; within the tables' error of {max(close.values()):.0f} %, so it may go either way: "
        words += ", ".join(close)
    return words + "."


def _rejections(base_name: str, base: Result, name: str, other: Result) -> str:
    """Requests that are in no figure."""
    one, two = len(base.rejected), len(other.rejected)
    if one == two:
        return ""
    return f"Rejected requests are in no figure: {one} of {base_name}, {two} of {name}."


def _why_memory(base: Result, other: Result) -> str:
    """What the change did to the KV cache's capacity, and whether capacity was what limited the baseline."""
    before, after = base.summary["kv_cache"]["tokens"], other.summary["kv_cache"]["tokens"]
    was, now = limits(base), limits(other)
    capacity = "The KV cache holds as much as before"
    if abs(after / before - 1) * 100 >= _NOTICEABLE_PERCENT:
        capacity = f"The KV cache holds {after / before:.2f} times the tokens ({before:,} to {after:,})"
    if was.kv_bound:
        batch = f"peak batch {base.summary['peak_batch']} to {other.summary['peak_batch']}"
        return (
            f"{capacity}, and its size was what limited the run: before, {_kv_words(was)}; "
            f"after, {_kv_words(now)}; {batch}."
        )
    peak = f"peak {base.summary['kv_cache']['peak'] * 100:.1f} %, {_kv_words(was)}"
    if now.kv_bound:
        return f"{capacity}; its size was not a limit before ({peak}), but is now: {_kv_words(now)}."
    return f"{capacity}, but its size was no limit ({peak})."


def _kv_words(found: Limits) -> str:
    preemptions = f"{found.preemptions:,} preemption{'' if found.preemptions == 1 else 's'}"
    if not found.preemptions:
        preemptions = "no preemption"
    waiting = "no waiting for KV blocks"
    if found.blocks >= 0.005:
        waiting = f"requests wait for KV blocks {percent(found.blocks)} of the time"
    elif found.other:
        waiting = f"requests wait for {found.other}"
    return f"{preemptions}, {waiting}"


def _band_words(
    base_name: str,
    name: str,
    judgement: Judgement,
    results: tuple[Result, Result],
    bands: tuple[BandRuns | None, BandRuns | None],
    slo: Slo | None,
    noise: Mapping[str, Spread] | None,
) -> str:
    """Whether the conclusion hangs on how well the memory plan is known."""
    if bands == (None, None) or not any(map(capacity_matters, results)):
        return ""
    ends = []
    for end in ("low", "high"):
        base, other = (
            result if band is None else getattr(band, end)
            for result, band in zip(results, bands, strict=True)
        )
        tokens = ", ".join(
            f"{label} {result.summary['kv_cache']['tokens']:,}"
            for label, result in ((base_name, base), (name, other))
        )
        conclusion = COMPARED_WITH_NOTHING if base.nothing_ran else judge(base, other, slo, noise).conclusion
        ends.append((tokens, conclusion, _signed(change(base, other, "output_throughput"))))
    if all(conclusion == judgement.conclusion for _, conclusion, _ in ends):
        (low, _, first), (high, _, last) = ends
        return (
            f"The KV capacity is estimated: at both ends of its band (tokens: {low}; {high}) the conclusion "
            f"is the same (output throughput {first} and {last})."
        )
    told = "; ".join(f"with {tokens} tokens it {conclusion} ({moved})" for tokens, conclusion, moved in ends)
    return f"The conclusion hangs on the KV capacity, which is estimated: {told}."


COMPARED_WITH_NOTHING = "has nothing to be compared with"


def _why_prefix_cache(base: Result, other: Result) -> str:
    """How much less, or more, of the prompts had to be computed."""
    before, after = base.summary["prefix_cache"], other.summary["prefix_cache"]
    if abs(after["hit_rate"] - before["hit_rate"]) * 100 < _NOTICEABLE_PERCENT:
        return ""
    return (
        f"Of the prompt tokens {_hit_words(after)} came from the prefix cache, before {_hit_words(before)}."
    )


def _hit_words(cache: dict[str, Any]) -> str:
    tier = (
        f" ({percent(cache['storage_hit_rate'])} from the {cache['storage']} tier)"
        if cache["storage"]
        else ""
    )
    return f"{percent(cache['hit_rate'])}{tier}"


def _why_kernels(base: Result, other: Result) -> str:
    """Which typical steps of the baseline got faster or slower, on which instance."""
    places: dict[str, list[str]] = {}
    for found in kernel_changes(base, other):
        places.setdefault(found.where, []).append(_kernel_words(found))
    return " ".join(
        f"Typical steps of the baseline{f', {where}' if where else ''}: {'; '.join(words)}."
        for where, words in places.items()
    )


def _kernel_words(found: KernelChange) -> str:
    moved = (found.after_us / found.before_us - 1) * 100
    times = f"{digits(found.before_us / 1000)} to {digits(found.after_us / 1000)} ms"
    speed = f"takes {abs(moved):.0f} % {'less' if moved < 0 else 'more'}"
    if abs(moved) < _NOTICEABLE_PERCENT:
        speed = "takes as long as before"
    kernel = ""
    if found.kernel_before_us and found.kernel_before_us != found.kernel_after_us:
        kernel = f", {found.kernel} {_signed((found.kernel_after_us / found.kernel_before_us - 1) * 100)}"
    return f"{found.step} {speed} ({times}{kernel})"
