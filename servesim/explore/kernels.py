"""The same steps, priced by what priced two runs: which kernels got faster or slower, and where."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from servesim.engine.batch import Batch
from servesim.explore.limits import percent, typical_steps
from servesim.results.units import si
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.results.records import InstanceLog, Pricing
    from servesim.results.result import Result

_MIXED_SHARE = 0.3
"""Steps with both prefill and decodes are worth a figure from this share of the busy time on."""
_GROUPS = 2
"""Kinds of instances that are spoken of, those with most work first."""


@dataclass(slots=True, frozen=True)
class KernelChange:
    """What one step costs on one instance of either run."""

    where: str
    """``instance 1 (L40S, decode)`` in words; empty where all instances are alike."""
    step: str
    """The step in words."""
    before_us: float
    after_us: float
    kernel: str
    """The kernel whose time changed most; empty where the step is not told kernel by kernel."""
    kernel_before_us: float = 0.0
    kernel_after_us: float = 0.0


def kernel_changes(base: Result, other: Result) -> list[KernelChange]:
    """The baseline's typical steps, priced by the instances of both runs that have the same number.

    Decodes alone, a prefill chunk alone, and both together when much time goes there; of every kind of
    instance. Empty where nothing takes another time, or what priced the runs is not at hand.
    """
    groups = _alike(base)
    found = []
    for group in groups[:_GROUPS]:
        index = group[0].index
        if index >= len(other.instances):
            continue
        pricings = group[0].pricing, other.instances[index].pricing
        if pricings[0] is None or pricings[1] is None:
            continue
        where = _where(group, other.instances[index]) if len(groups) > 1 else ""
        for step, batch in _typical(base, group):
            found.append(_priced(where, step, (pricings[0], pricings[1]), batch))
    moved = any(abs(change.after_us - change.before_us) > 1e-6 for change in found)
    return found if moved else []


def _alike(result: Result) -> list[list[InstanceLog]]:
    """Instances that cannot differ, together; those that were busy longest first."""
    groups: list[list[InstanceLog]] = []
    for log in result.instances:
        for group in groups:
            if (group[0].spec, group[0].options) == (log.spec, log.options):
                group.append(log)
                break
        else:
            groups.append([log])
    return sorted(groups, key=lambda group: -sum(_busy_ns(log) for log in group))


def _busy_ns(log: InstanceLog) -> int:
    return sum(log.steps.end_ns) - log.steps.start_ns.total()


def _where(group: Sequence[InstanceLog], other: InstanceLog) -> str:
    spec = group[0].spec
    hardware = (
        spec.hardware if other.spec.hardware == spec.hardware else f"{spec.hardware} to {other.spec.hardware}"
    )
    role = f", {spec.pd_type}" if spec.pd_type else ""
    return f"instance {group[0].index} ({hardware}{role})"


def _typical(base: Result, group: Sequence[InstanceLog]) -> list[tuple[str, Batch]]:
    typical = typical_steps(base, group)
    steps = []
    if typical.decodes:
        step = f"decoding {_sequences(typical.decodes, typical.kv_length)}"
        steps.append((step, _batch((), typical.decodes, typical.kv_length)))
    if typical.prefill_tokens > 1:
        chunks = ((typical.prefill_tokens, typical.history),)
        after = f" after {si(typical.history)}" if 4 * typical.history >= typical.prefill_tokens else ""
        steps.append((f"prefilling {typical.prefill_tokens} tokens{after}", _batch(chunks, 0, 0)))
        if typical.mixed_decodes and typical.mixed_share >= _MIXED_SHARE:
            beside = _sequences(typical.mixed_decodes, typical.kv_length)
            step = f"the same beside {beside} ({percent(typical.mixed_share)} of the time)"
            steps.append((step, _batch(chunks, typical.mixed_decodes, typical.kv_length)))
    return steps


def _batch(chunks: Sequence[tuple[int, int]], decodes: int, kv_length: int) -> Batch:
    """A step of equal decodes beside chunks."""
    length = kv_length if decodes else 0
    batch = Batch(0, kv_lengths=[length] * decodes)
    for tokens, history in chunks:
        batch.add_request(tokens, history)
    batch.add_decodes(decodes, decodes * length, length, length)
    return batch


def _sequences(number: int, kv_length: int) -> str:
    return f"{number} sequence{'' if number == 1 else 's'} of {si(kv_length)} tokens"


def _priced(where: str, step: str, pricings: tuple[Pricing, Pricing], batch: Batch) -> KernelChange:
    before_us, after_us = (pricing.us(batch) for pricing in pricings)
    one, two = (_kernel_times(pricing, batch) for pricing in pricings)
    shared = [name for name in one if name in two]
    if not shared:
        return KernelChange(where, step, before_us, after_us, "")
    kernel = max(shared, key=lambda name: abs(two[name] - one[name]))
    return KernelChange(where, step, before_us, after_us, kernel, one[kernel], two[kernel])


def _kernel_times(pricing: Pricing, batch: Batch) -> Counter[str]:
    """µs of each kernel in a step, all stages together; the parts that attention is listed in are added
    up."""
    times: Counter[str] = Counter()
    for cost in pricing.layers(batch):
        times[cost.layer.partition(":")[0]] += cost.total_us
    return times


_MOST_SEQUENCES = 1024
"""Batches up to which a break-even is looked for."""


def speculation_text(base: Result, other: Result, names: tuple[str, str]) -> str:
    """From which batch size on speculative decoding pays no more; empty unless one of two runs speculates.

    Both price steps that only decode, at the mean KV length of the plain run's decodes: a plain step gives
    every sequence a token, one with drafts as many as the acceptance says. So this is about the throughput of
    decoding, and not about prefill or the KV cache that a drafter takes.
    """
    logs = base.instances[0], other.instances[0]
    drafts = [log.options.speculative for log in logs]
    if (drafts[0] is None) == (drafts[1] is None) or None in (logs[0].pricing, logs[1].pricing):
        return ""
    at = 0 if drafts[1] is None else 1  # the one that speculates
    spec, plain, drafted = drafts[at], logs[1 - at].pricing, logs[at].pricing
    assert spec is not None
    assert plain is not None
    assert drafted is not None
    result = (base, other)[1 - at]
    length = max(typical_steps(result, [logs[1 - at]]).kv_length, 1)

    def gain(n: int) -> float:
        """Tokens a second with drafts over those without."""
        verifying = _batch((), n, length)
        verifying.add_drafts(n * spec.num_tokens)
        return spec.acceptance_length * plain.us(_batch((), n, length)) / drafted.us(verifying)

    most = min(logs[0].options.max_num_seqs, logs[1].options.max_num_seqs, _MOST_SEQUENCES)
    gains = {n: gain(n) for n in range(1, most + 1)}
    pays = [n for n, more in gains.items() if more > 1]
    told = f"speculative decoding ({names[at]}), steps that only decode at {si(length)} tokens of KV each: "
    alone = f"{gains[1]:.2f} times the tokens a second at a batch of 1"
    if not pays:
        return told + f"it never pays: {alone}"
    last = max(pays)
    if last == most:
        return told + f"it pays at every batch up to {most}: {alone}, {gains[most]:.2f} times at {most}"
    return told + (
        f"{alone}, {gains[last]:.2f} times at {last}; it stops paying at a batch of {last + 1} "
        f"({gains[most]:.2f} times at {most}); acceptance: {spec.source}"
    )
