"""The figures of a run at one load: a point of the curve that a search for the largest load draws."""

from __future__ import annotations

import math
from dataclasses import field
from typing import TYPE_CHECKING, Any

from servesim.engine.arrivals import TURNED_AWAY
from servesim.explore.limits import limits, percent
from servesim.results.units import digits
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.explore.warm_runs import Outcome, Target
    from servesim.results.result import Result

_FIGURES = (
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "p99_e2el_ms",
    "request_throughput",
    "output_throughput",
    "peak_batch",
    "preemptions",
)
"""Keys of the summary that a point keeps."""


@dataclass(slots=True)
class LoadPoint:
    """What one load did."""

    load: float
    """Entries per second or requests at once; inf: everything at once."""
    score: float
    """At most 1 where the load keeps the target; see :meth:`Target.score`."""
    goodput: float
    """Share of all requests that keep every bound by themselves."""
    figures: dict[str, float]
    """Figures under the names of the summary."""
    bounds_ms: list[float] = field(default_factory=list)
    """What each bound of the SLO is held against, in its order."""
    waits: dict[str, float] = field(default_factory=dict)
    """Shares of the busy time in which requests waited for ``blocks``, ``slots``, ``budget``; ``link``: share
    of the time to the first token in which KV was on its way from other instances or a lower tier."""
    complete: bool = True
    """False: the run was given up as the target was certain to be missed; figures are those of the requests
    that had finished."""
    growing: bool = False
    """Whether the queue grew while requests arrived: a longer workload would do worse at this load."""

    turned_away: int = 0
    """Requests that found the server full, by ``--max-num-queued-reqs`` or ``--max-num-queued-tokens``."""

    @property
    def meets(self) -> bool:
        """Whether the load keeps the target."""
        return self.score <= 1

    @property
    def good_per_s(self) -> float:
        """Requests per second that keep every bound: vLLM's ``request_goodput``."""
        return self.figures["good_per_s"]

    @property
    def held_back(self) -> str:
        """What requests waited for at this load, in words."""
        if self.turned_away:
            limits = "--max-num-queued-reqs or --max-num-queued-tokens"
            return f"the server is full ({limits}) and turns {self.turned_away} away"
        name, share = max(self.waits.items(), key=lambda each: each[1], default=("", 0.0))
        if share < _NOTABLE:
            return "hardly a request waits: the steps themselves take as long as they do at this load"
        if name == "link":
            return f"KV on its way over links takes {percent(share)} of the time to the first token"
        what = {
            "blocks": "KV blocks",
            "slots": "a place among the running requests (--max-num-seqs)",
            "budget": "the step's token budget (--max-num-batched-tokens)",
        }[name]
        return f"requests wait for {what} {percent(share)} of the busy time"

    def missed_words(self, target: Target, unit: str) -> str:
        """Which bounds this load, a number of ``unit``, misses, and by what."""
        number = f"{self.load:,.0f}" if self.load.is_integer() else digits(self.load)
        at = "with everything at once" if math.isinf(self.load) else f"at {number} {unit}"
        if not self.complete and target.goodput is not None:
            return f"{at}, fewer requests than that keep the bounds"
        if target.goodput is not None:
            return f"{at}, {self.goodput * 100:.1f} % of the requests keep the bounds"
        missed = [
            f"{bound.title} is {digits(value)} ms"
            for bound, value in zip(target.slo.bounds, self.bounds_ms, strict=True)
            if value > bound.limit_ms
        ]
        if not self.complete:
            # the figures so far may still be within the bounds: too many requests are above one of them
            words = " and ".join(missed) or "a bound is certain to be missed"
            return f"{at}, {words} among the requests that finished until that was certain"
        return f"{at}, {' and '.join(missed) or 'requests are rejected'}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "load": "inf" if math.isinf(self.load) else round(self.load, 6),
            "meets": self.meets,
            "goodput": round(self.goodput, 6),
            "bounds_ms": [round(value, 6) for value in self.bounds_ms],
            **{name: round(value, 6) for name, value in self.figures.items()},
            "waits": {name: round(share, 6) for name, share in self.waits.items()},
            "complete": self.complete,
            "queue_grows": self.growing,
            "turned_away": self.turned_away,
        }


_NOTABLE = 0.01
"""Share of the busy time from which on waiting is worth a word."""


def load_point(load: float, outcome: Outcome, target: Target) -> LoadPoint:
    """The point of a run."""
    result = outcome.result
    summary, held = result.summary, limits(result)
    kept: Mapping[str, Any] = summary
    share = target.slo.goodput_share(result)
    if not outcome.complete:  # nothing is known of the others
        share *= (len(result.requests) + len(result.rejected)) / len(result.workload)
    good = share * (len(result.requests) + len(result.rejected))
    duration = summary["duration"]
    return LoadPoint(
        load=load,
        score=outcome.score(target),
        complete=outcome.complete,
        goodput=share,
        figures={
            **{name: float(kept[name]) for name in _FIGURES},
            "good_per_s": good / duration if duration else 0.0,
        },
        bounds_ms=[bound.value_ms(result) for bound in target.slo.bounds],
        waits={"blocks": held.blocks, "slots": held.slots, "budget": held.budget, **_links(result)},
        turned_away=sum(each.reason.startswith(TURNED_AWAY) for each in result.rejected),
        growing=any("queue grew" in reason for reason in _reasons(summary["saturation"])),
    )


def _links(result: Result) -> dict[str, float]:
    """The share of links, where there are transfers to wait for."""
    if not any(log.tier is not None or log.spec.pd_type for log in result.instances):
        return {}
    from servesim.results.blame import blame

    parts, first_ns = blame(result), int(result.requests["TTFT"].sum())
    waited_ns = int(parts["transfer"].sum()) + int(parts["recall"].sum())
    return {"link": min(waited_ns / first_ns, 1.0) if first_ns else 0.0}


def _reasons(saturation: dict[str, Any]) -> list[str]:
    return [reason for each in saturation["instances"] for reason in each["reasons"]]
