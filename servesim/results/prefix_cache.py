"""What the prefix cache had of the prompts: on the NPUs, and in the lower tier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from servesim.results.units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog, TierMemory
    from servesim.results.request_table import RequestTable

    Columns: TypeAlias = RequestTable | NDArray[np.void] | Mapping[str, NDArray[np.int64]]


PROMPT_FIELDS = ("input", "prefix_hit", "storage_hit")


def prefix_cache_entry(instances: Sequence[InstanceLog], rows: Columns) -> dict[str, Any]:
    """``prefix_cache`` of the summary.

    Tokens count once for every request, as in vLLM's hit rate: those that a preempted request looks up again
    do not. Bytes are all that were moved.

    Args:
        instances: whose tiers and bytes count.
        rows: :data:`PROMPT_FIELDS` of the requests that they took, as in
            :attr:`servesim.results.result.Result.requests`.
    """

    def moved(name: str) -> int:
        return sum(getattr(instance.steps, name).total() for instance in instances)

    looked_up, found, recalled = (int(rows[name].sum()) for name in PROMPT_FIELDS)
    read = moved("recalled_bytes")

    def rate(tokens: int) -> float:
        return round(tokens / looked_up, 6) if looked_up else 0.0

    return {
        "lookup_tokens": looked_up,
        "hit_tokens": found,
        "hit_rate": rate(found),
        "npu_hit_tokens": found - recalled,
        "npu_hit_rate": rate(found - recalled),
        "storage": " and ".join(sorted({each.tier.storage for each in instances if each.tier})) or None,
        "storage_pools": [
            {"bytes": tier.capacity_bytes, "tokens": tier.tokens} for tier in _pools(instances)
        ],
        "storage_hit_tokens": recalled,
        "storage_hit_rate": rate(recalled),
        "storage_read_bytes": read,
        "storage_written_bytes": moved("tier_bytes") - read,
    }


def prefix_cache_lines(entry: dict[str, Any]) -> list[str]:
    """:func:`prefix_cache_entry` for people: one line, and one for every tier where there are several."""
    lines = [
        f"prefix cache   {entry['hit_tokens']} of {entry['lookup_tokens']} prompt tokens found "
        f"({entry['hit_rate']:.1%})"
    ]
    if entry["storage"]:
        read, written = (entry[f"storage_{done}_bytes"] / GIB for done in ("read", "written"))
        name = f"{entry['storage']} tier"
        lines += [
            f"  {'on the NPU':<13}{entry['npu_hit_tokens']} ({entry['npu_hit_rate']:.1%})",
            f"  {name:<13}{entry['storage_hit_tokens']} ({entry['storage_hit_rate']:.1%}), "
            f"{read:.1f} GiB read, {written:.1f} GiB written",
        ]
    return lines


def tier_line(tier: TierMemory) -> str:
    """The banner's line about the lower tier of one instance."""
    shared = ", shared by the node" if tier.shared else ""
    return (
        f"{tier.storage} tier: {tier.tokens} tokens / {tier.capacity_bytes // tier.chunk_bytes} chunks of "
        f"{tier.chunk_tokens} ({tier.capacity_bytes / GIB:.2f} GiB{shared}), "
        f"read at {tier.bandwidth_gbs:g} GB/s after {tier.latency_ns} ns"
    )


def _pools(instances: Sequence[InstanceLog]) -> list[TierMemory]:
    """Every pool once, as the first instance that uses it sees it."""
    pools: dict[int, TierMemory] = {}
    for instance in instances:
        if instance.tier is not None:
            pools.setdefault(instance.tier.pool, instance.tier)
    return list(pools.values())
