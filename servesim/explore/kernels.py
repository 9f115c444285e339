"""The same steps priced with the kernel times of two runs: which kernels got faster or slower."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.explore.limits import typical_steps
from servesim.results.units import si

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.step_timer import StepTimer
    from servesim.results.records import InstanceLog
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec

_MIXED_SHARE = 0.3
"""Steps with both prefill and decodes are worth a figure from this share of the busy time on."""


@dataclass(slots=True, frozen=True)
class KernelChange:
    """What one step costs with the kernels of either run."""

    step: str
    """The step in words."""
    before_us: float
    after_us: float
    kernel: str
    """The kernel whose time changed most."""
    kernel_before_us: float
    kernel_after_us: float


def kernel_changes(base: Result, other: Result) -> list[KernelChange]:
    """The baseline's typical steps under the kernel times of both runs.

    Decodes alone, a prefill chunk alone, and both together when much time goes there. Of the first instance;
    empty when both runs read the same kernel times, or they cannot be read again.
    """
    if base.cluster is None or other.cluster is None or not len(base.requests):
        return []
    one, two = base.instances[0], other.instances[0]
    if (one.spec, one.options.variant) == (two.spec, two.options.variant):
        return []
    try:
        timers = _timer(one, base.cluster), _timer(two, other.cluster)
    except InputError:
        return []
    typical = typical_steps(base)
    found = []
    if typical.decodes:
        step = f"decoding {_sequences(typical.decodes, typical.kv_length)}"
        found.append(_priced(step, timers, [], typical.decodes, typical.kv_length))
    if typical.prefill_tokens > 1:
        chunk = [(typical.prefill_tokens, typical.history)]
        after = f" after {si(typical.history)}" if 4 * typical.history >= typical.prefill_tokens else ""
        step = f"prefilling {typical.prefill_tokens} tokens{after}"
        found.append(_priced(step, timers, chunk, 0, 0))
        if typical.mixed_decodes and typical.mixed_share >= _MIXED_SHARE:
            beside = _sequences(typical.mixed_decodes, typical.kv_length)
            step = f"the same beside {beside} ({typical.mixed_share:.0%} of the time)"
            found.append(_priced(step, timers, chunk, typical.mixed_decodes, typical.kv_length))
    return found


def _sequences(number: int, kv_length: int) -> str:
    return f"{number} sequence{'' if number == 1 else 's'} of {si(kv_length)} tokens"


def _timer(instance: InstanceLog, cluster: ClusterSpec) -> StepTimer:
    from servesim.cost.step_timer import build_step_timer
    from servesim.specs.model import load_model

    return build_step_timer(instance.spec, load_model(instance.spec.model_name), instance.options, cluster)


def _priced(
    step: str, timers: tuple[StepTimer, StepTimer], chunks: Sequence[tuple[int, int]], n: int, kv_length: int
) -> KernelChange:
    before, after = (_kernel_times(timer, chunks, n, kv_length) for timer in timers)
    kernel = max(before, key=lambda name: abs(after[name] - before[name]))
    return KernelChange(
        step, sum(before.values()), sum(after.values()), kernel, before[kernel], after[kernel]
    )


def _kernel_times(
    timer: StepTimer, chunks: Sequence[tuple[int, int]], n: int, kv_length: int
) -> Counter[str]:
    """µs of each kernel in a step; the parts that attention is listed in are added up."""
    times: Counter[str] = Counter()
    for cost in timer.explain(chunks, n, n * kv_length, kv_length, kv_length):
        times[cost.layer.partition(":")[0]] += cost.total_us  # type: ignore[assignment]
    return times
