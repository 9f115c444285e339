"""What held a run back: KV blocks, ``max_num_seqs``, the token budget, or nothing but its arrivals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.results.stats import exact_sum
from servesim.results.units import MS
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.results.records import InstanceLog
    from servesim.results.result import Result

_BOUND_SHARE = 0.05
"""From this share of the busy time on, something counts as a limit of the run."""


@dataclass(slots=True, frozen=True)
class Limits:
    """Shares of the busy time of all instances in which requests waited, by what they lacked."""

    blocks: float
    """``max_num_seqs`` and token budget were not reached: only KV blocks were short."""
    slots: float
    """``max_num_seqs`` requests were running."""
    budget: float
    """The step was full: ``max_num_batched_tokens`` were scheduled."""
    preemptions: int
    preempted_share: float = 0.0
    """Preemptions per finished request."""

    @property
    def kv_bound(self) -> bool:
        """Whether the KV cache's capacity limited the run: not by a preemption now and then."""
        return max(self.preempted_share, self.blocks) >= _BOUND_SHARE

    @property
    def other(self) -> str:
        """The greatest limit other than KV blocks in words; empty when there is none."""
        if max(self.slots, self.budget) < _BOUND_SHARE:
            return ""
        if self.slots >= self.budget:
            return f"--max-num-seqs {percent(self.slots)} of the time"
        return f"the token budget {percent(self.budget)} of the time"


@dataclass(slots=True, frozen=True)
class TypicalSteps:
    """Time-weighted means of a run's steps, by kind."""

    decodes: int
    """Sequences of a step that only decodes; 0 without such steps."""
    mixed_decodes: int
    """Sequences that decode in a step with prefill."""
    mixed_share: float
    """Share of the busy time in steps with prefill."""
    prefill_tokens: int
    """Prefill tokens of a step with prefill; 0 without such steps."""
    history: int
    """Tokens of its prompt that a typical chunk finds computed already: half of what the chunk is not."""
    kv_length: int
    """Tokens in the cache of a decode, mean over all generated tokens."""


def limits(result: Result) -> Limits:
    """See :class:`Limits`."""
    blocks_ns = slots_ns = budget_ns = busy_ns = 0
    for instance in result.instances:
        steps, options = instance.steps, instance.options
        duration = steps.column("end_ns") - steps.column("start_ns")
        scheduled = steps.column("prefill_tokens") + steps.column("decode_tokens")
        waiting = steps.column("waiting") > 0
        no_slot = steps.column("running") >= options.max_num_seqs
        full = scheduled >= options.max_num_batched_tokens
        slots_ns += exact_sum(duration[waiting & no_slot])
        budget_ns += exact_sum(duration[waiting & ~no_slot & full])
        blocks_ns += exact_sum(duration[waiting & ~no_slot & ~full])
        busy_ns += exact_sum(duration)
    busy = max(busy_ns, 1)
    preemptions = int(result.table["preemptions"].sum())
    share = preemptions / len(result.table) if preemptions else 0.0
    return Limits(blocks_ns / busy, slots_ns / busy, budget_ns / busy, preemptions, share)


def percent(share: float) -> str:
    """``0.173`` -> ``17 %``."""
    return f"{share * 100:.0f} %"


def typical_steps(result: Result, instances: Sequence[InstanceLog] | None = None) -> TypicalSteps:
    """See :class:`TypicalSteps`; all zero without finished requests.

    Args:
        result: the run.
        instances: those whose steps count, and whose requests; None: all.
    """
    rows = result.requests
    chosen = result.instances if instances is None else instances
    if instances is not None:
        numbers = [instance.index for instance in instances]
        mine = np.isin(rows["instance_id"], numbers) | np.isin(rows["decode_instance"], numbers)
        rows = rows[mine]
    tokens = int(rows["output"].sum())
    if not tokens:
        return TypicalSteps(0, 0, 0.0, 0, 0, 0)
    alone_ns = mixed_ns = 0
    decodes = mixed_decodes = prefill = 0.0
    for instance in chosen:
        steps = instance.steps
        # in ms: products with token counts stay far from the limits of 64 bits
        duration = (steps.column("end_ns") - steps.column("start_ns")) / MS
        mixed = steps.column("prefill_tokens") > 0
        alone_ns += duration[~mixed].sum()
        mixed_ns += duration[mixed].sum()
        decodes += (duration * steps.column("decode_tokens"))[~mixed].sum()
        mixed_decodes += (duration * steps.column("decode_tokens"))[mixed].sum()
        prefill += (duration * steps.column("prefill_tokens"))[mixed].sum()
    chunk = round(prefill / mixed_ns) if mixed_ns else 0
    cached = exact_sum(rows["output"], 2 * rows["input"] + rows["output"] - 1) // 2
    # of the request a prompt token is in
    prompt = exact_sum(rows["input"], rows["input"]) // exact_sum(rows["input"])
    return TypicalSteps(
        decodes=max(round(decodes / alone_ns), 1) if alone_ns else 0,
        mixed_decodes=round(mixed_decodes / mixed_ns) if mixed_ns else 0,
        mixed_share=float(mixed_ns / (alone_ns + mixed_ns)) if mixed_ns else 0.0,
        prefill_tokens=chunk,
        history=max(prompt - chunk, 0) // 2,
        kv_length=cached // tokens,
    )
