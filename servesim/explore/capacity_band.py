"""The same comparison where the KV cache is as small, and as large, as the memory plan may be wrong by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.api import simulate_loaded, without
from servesim.explore.ensemble import silence
from servesim.explore.limits import limits
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec

_WAITING = 0.01
"""From this share of the busy time spent waiting for KV blocks on, the capacity has a part in the result."""


@dataclass(slots=True, frozen=True)
class BandRuns:
    """One option set at both ends of its capacity band."""

    low: Result
    high: Result

    @property
    def tokens(self) -> tuple[int, int]:
        """KV tokens of all instances at both ends."""
        return self.low.summary["kv_cache"]["tokens"], self.high.summary["kv_cache"]["tokens"]


def capacity_matters(result: Result) -> bool:
    """Whether requests waited for KV blocks, or lost theirs."""
    found = limits(result)
    return found.preemptions > 0 or found.blocks >= _WAITING


def band(result: Result) -> list[tuple[int, int]] | None:
    """(fewest, most) KV blocks of every instance; None where the plan has no band, or the blocks are set."""
    bands = [entry["kv_cache"].get("blocks_band") for entry in result.summary["instances"]]
    if not bands or any(each is None for each in bands) or all(low == high for low, high in bands):
        return None
    return [(int(low), int(high)) for low, high in bands]


def band_runs(result: Result) -> BandRuns | None:
    """The run again at both ends of its capacity band; None where it has none."""
    bands = band(result)
    if bands is None or result.cluster is None or result.options is None:
        return None
    # what sizes the cache otherwise has no effect, and would be refused
    options = without(result.options, "npu_memory_utilization")
    with silence():  # the run itself has said what there is to say
        low, high = (
            simulate_loaded(with_blocks(result.cluster, blocks), result.workload, options)
            for blocks in zip(*bands, strict=True)
        )
    return BandRuns(low, high)


def with_blocks(cluster: ClusterSpec, blocks: tuple[int, ...]) -> ClusterSpec:
    """The cluster with the number of KV blocks of every instance set, in the order of the instances."""
    numbers = iter(blocks)
    nodes = [
        node.model_copy(
            update={
                "instances": tuple(
                    instance.model_copy(update={"num_gpu_blocks": max(next(numbers), 2)})
                    for instance in node.instances
                )
            }
        )
        for node in cluster.nodes
    ]
    return cluster.model_copy(update={"nodes": tuple(nodes)})
