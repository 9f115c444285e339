"""What no fleet of a shape can be better than, from kernel times of single steps: whom not to simulate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from servesim.cost.batch_shape import Shape
from servesim.engine.build import build_simulation
from servesim.engine.simulation import why_impossible
from servesim.errors import MissingFileError, ServingError
from servesim.explore.ensemble import silence
from servesim.slotted import dataclass
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.engine.build import Kept
    from servesim.explore.fleet import Fleet
    from servesim.explore.warm_runs import Target
    from servesim.results.records import InstanceLog, Pricing
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions

_MARGIN = 0.8
"""A bound counts if it is missed by a quarter or more: steps are priced by interpolation, which may make a
larger batch look cheaper than a smaller one."""
CANNOT_START = "cannot start"
NO_TIMES = "have no kernel times"
REJECTS = "reject requests of the workload"
SLOW_PREFILL = "miss TTFT even with one prompt at a time"
SLOW_DECODE = "miss TPOT even with one sequence at a time"
TOO_SMALL = "need more time for the workload than the bounds leave, with every step as full as it may be"


@dataclass(slots=True)
class ShapeBounds:
    """Of one instance."""

    problem: str = ""
    """Why no fleet of this shape will do: one of the words above; empty: one may."""
    detail: str = ""
    """The message behind it."""
    prefill_s: float = 0.0
    """Least time for all prompts on one instance; 0: not known."""
    decode_s: float = 0.0
    """Least time for all generated tokens on one instance."""
    window_s: float = math.inf
    """From the first arrival until the bounds want everything to be done."""

    @classmethod
    def of(
        cls,
        cluster: ClusterSpec,
        options: RuntimeOptions,
        kept: Kept,
        workload: Workload,
        target: Target,
    ) -> ShapeBounds:
        """The bounds of the only instance of ``cluster``."""
        try:
            with silence():
                simulation = build_simulation(cluster, Workload([]), options, kept)
        except MissingFileError as error:
            return cls(NO_TIMES, str(error).splitlines()[0])
        except ServingError as error:
            return cls(CANNOT_START, str(error).splitlines()[0])
        instance = simulation.instances[0]
        if target.goodput is None:
            for request in workload:
                if reason := why_impossible(request, instance):
                    return cls(REJECTS, reason)
        found = cls()
        log = instance.log
        if log.pricing is not None:
            found._floors(log, log.pricing, workload, target)
        return found

    def reason(self, fleet: Fleet) -> str:
        """Why ``fleet`` of this shape cannot keep the bounds; empty: it may."""
        if self.problem:
            return self.problem
        prefilling = fleet.prefill or fleet.replicas
        decoding = fleet.replicas - fleet.prefill
        least_s = max(self.prefill_s / prefilling, self.decode_s / max(decoding, 1))
        return TOO_SMALL if least_s * _MARGIN > self.window_s else ""

    def _floors(self, log: InstanceLog, pricing: Pricing, workload: Workload, target: Target) -> None:
        prompts = sorted(request.input_tokens for request in workload)
        # prompts that the prefix cache may make shorter
        shares = any(request.has_ids or request.predecessor >= 0 for request in workload)
        budget = log.options.max_num_batched_tokens
        context = prompts[0]
        for bound in target.slo.bounds:
            share = target.goodput or _quantile(bound.statistic)
            if bound.metric == "ttft" and not shares:
                length = prompts[min(math.floor(share * (len(prompts) - 1)), len(prompts) - 1)]
                floor_ms = _prompt_us(pricing, length, budget) / 1e3
                if floor_ms * _MARGIN > bound.limit_ms:
                    self.problem = SLOW_PREFILL
                    self.detail = f"a prompt of {length:,} tokens takes {floor_ms:,.0f} ms"
            if bound.metric == "tpot" and share:
                floor_ms = pricing.us(_decodes(1, context)) / 1e3
                if floor_ms * _MARGIN > bound.limit_ms:
                    self.problem = SLOW_DECODE
                    self.detail = f"a step of one sequence takes {floor_ms:,.1f} ms"
        self._work(log, pricing, workload, target, shares)

    def _work(
        self, log: InstanceLog, pricing: Pricing, workload: Workload, target: Target, shares: bool
    ) -> None:
        if any(request.predecessor >= 0 for request in workload):
            return  # when a turn arrives depends on the one before
        part = _share_done(target)
        limits_ms = {bound.metric: bound.limit_ms for bound in target.slo.bounds}
        longest = max(request.output_tokens for request in workload)
        patience_ms = limits_ms.get("ttft", math.inf) + longest * limits_ms.get("tpot", math.inf)
        patience_ms = min(patience_ms, limits_ms.get("e2el", math.inf))
        arrivals = [request.arrival_ns for request in workload]
        self.window_s = (max(arrivals) - min(arrivals)) / 1e9 + patience_ms / 1e3
        if not part or math.isinf(self.window_s):
            return
        lengths = sorted(request.input_tokens for request in workload)
        stages = log.spec.pp_size  # batches that are under way at once
        if not shares:
            usual, budget = lengths[len(lengths) // 2], log.options.max_num_batched_tokens
            chunk = max(min(usual, budget), 2)
            count = max(budget // chunk, 1)
            full_us = pricing.us(Shape(chunks=((chunk, 0),) * count))
            self.prefill_s = part * sum(lengths) * full_us / (chunk * count) / stages / 1e6
        fit = log.capacity.usable_blocks * log.capacity.block_size // max(lengths[0], 1)
        most = max(min(log.options.max_num_seqs, fit), 1)
        tokens = sum(request.output_tokens - 1 for request in workload)
        self.decode_s = part * tokens * pricing.us(_decodes(most, lengths[0])) / most / stages / 1e6


def _quantile(statistic: str) -> float:
    """Share of the requests that a statistic's bound speaks for; 0 for a mean, which says little of any."""
    if statistic == "mean":
        return 0.0
    return 0.5 if statistic == "median" else int(statistic[1:]) / 100


def _share_done(target: Target) -> float:
    """Share of the requests that are done when the bounds say, at least."""
    if target.goodput is not None:
        return target.goodput
    shares = [_quantile(bound.statistic) for bound in target.slo.bounds]
    return max(1 - sum(1 - share for share in shares), 0.0)


def _prompt_us(pricing: Pricing, length: int, budget: int) -> float:
    """A prompt alone, in chunks as large as a step may be."""
    total, done = 0.0, 0
    for chunk in _chunks(length, budget):
        total += pricing.us(Shape(chunks=((chunk, done),)) if chunk > 1 else _decodes(1, done))
        done += chunk
    return total


def _chunks(length: int, budget: int) -> Sequence[int]:
    whole, rest = divmod(length, budget)
    return [budget] * whole + ([rest] if rest else [])


def _decodes(count: int, context: int) -> Shape:
    return Shape(num_decodes=count, kv_sum=count * context, kv_min=context, kv_max=context)
