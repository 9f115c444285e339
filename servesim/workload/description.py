"""What a workload looks like: counts, lengths, rate, and how much of its prompts prefix caching saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.workload.hashes import block_ids

if TYPE_CHECKING:
    from servesim.workload.request import Workload

PERCENTILES = (50, 90, 99)


def describe(workload: Workload, block_size: int = 16) -> dict[str, Any]:
    """Figures about `workload`, JSON-ready: counts, token statistics, arrivals (s), reusable tokens."""
    requests = workload.requests
    heads = [request for request in requests if request.predecessor < 0]
    arrivals = [request.arrival_ns for request in heads]
    span_s = (max(arrivals) - min(arrivals)) / 1e9
    return {
        "source": workload.source,
        "requests": len(requests),
        "sessions": len({request.session_id for request in requests if request.session_id is not None}),
        "entries": len(heads),
        "skipped": workload.skipped,
        "with_token_ids": sum(request.has_ids for request in requests),
        "input_tokens": _statistics([request.input_tokens for request in requests]),
        "output_tokens": _statistics([request.output_tokens for request in requests]),
        "first_arrival_s": min(arrivals) / 1e9,
        "last_arrival_s": max(arrivals) / 1e9,
        "rate_per_s": (len(heads) - 1) / span_s if span_s else None,
        "block_size": block_size,
        "reusable_prompt_tokens": reusable_prompt_tokens(workload, block_size),
    }


def _statistics(values: list[int]) -> dict[str, float]:
    """Sum, mean, extremes and percentiles (values that occur, none in between) of token counts."""
    ranked = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "total": sum(values),
        "mean": sum(values) / len(values),
        "min": min(values),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, ranked, strict=True)},
        "max": max(values),
    }


def reusable_prompt_tokens(workload: Workload, block_size: int) -> int:
    """Prompt tokens that a prefix cache without limits would save.

    Requests are taken by arrival, a session's turns in their order, each after all before it have ended. At
    least one token of a prompt is always computed.
    """
    known = block_ids(workload, block_size)
    seen = bytearray(known.num_ids)
    total = 0
    for request in sorted(workload.requests, key=lambda request: (request.arrival_ns, request.index)):
        ids = known.of(request.index)
        hits = 0
        for block in ids[: (request.input_tokens - 1) // block_size]:
            if not seen[block]:
                break
            hits += 1
        total += hits * block_size
        for block in ids:
            seen[block] = 1
    return total


def description_text(figures: dict[str, Any]) -> str:
    """The figures of `describe` for people."""
    rate = figures["rate_per_s"]
    prompt_total = figures["input_tokens"]["total"]
    reusable = figures["reusable_prompt_tokens"]
    lines = [
        figures["source"],
        f"  requests          {figures['requests']:,}, of which {figures['with_token_ids']:,} with token ids",
        f"  sessions          {figures['sessions']:,}",
        f"  arrivals          {figures['first_arrival_s']:.3f} s to {figures['last_arrival_s']:.3f} s"
        + (f", {rate:.3f} a second" if rate else ""),
    ]
    if figures["skipped"]:
        lines.append(f"  skipped           {figures['skipped']:,} entries left out")
    for key, name in (("input_tokens", "input tokens"), ("output_tokens", "output tokens")):
        found = figures[key]
        spread = "  ".join(f"{label} {found[label]:,}" for label in ("min", "p50", "p90", "p99", "max"))
        lines.append(f"  {name:<17} {found['total']:,} in all, mean {found['mean']:,.1f}, {spread}")
    lines.append(
        f"  shareable prefix  {reusable:,} prompt tokens ({100 * reusable / prompt_total:.1f} %) "
        f"with blocks of {figures['block_size']} and a cache without limits"
    )
    return "\n".join(lines)
