"""Which instances share which lower tier of the prefix cache, and over what it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.engine.transfers import Route
from servesim.errors import InputError
from servesim.memory.ledger import striped_bytes
from servesim.memory.sizing import kv_bytes_per_token
from servesim.memory.tier import LowerTier, TierPool
from servesim.network.links import Port
from servesim.results.records import TierMemory
from servesim.specs.memories import KINDS, TIER_WORDS, split_place

if TYPE_CHECKING:
    from servesim.memory.memory_map import MemoryMap
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions, RuntimeOptions


@dataclass(frozen=True, slots=True)
class PlacedTier:
    """The lower tier of one instance's prefix cache."""

    view: LowerTier
    """What the instance sees of its pool."""
    route: Route
    """The way from it to the instance's NPUs."""
    memory: TierMemory
    """What is written down about it."""


class LowerTiers:
    """The pools of a cluster.

    A pool is an instance's own share of its node's memory, or with prefix sharing one for the whole node. A
    memory of the cluster is split evenly over the nodes, with chunks striped over its devices. Whoever reads
    shares the memory's bandwidth.
    """

    def __init__(self, cluster: ClusterSpec, options: RuntimeOptions, memories: MemoryMap) -> None:
        """
        Args:
            cluster: whose memories they are.
            options: whether pools are shared.
            memories: the ledgers, on which tiers are booked.

        Raises:
            InputError: sharing is asked for without a tier.
        """
        self._cluster = cluster
        self._memories = memories
        self._sharing = options.enable_prefix_sharing
        self._pools: dict[tuple[str, int, int], TierPool] = {}
        self._namespaces: dict[tuple[str, str, int], int] = {}
        if self._sharing and options.prefix_storage is None:
            raise InputError(
                "--enable-prefix-sharing: there is no lower tier to share; give --prefix-storage "
                f"{' or '.join(TIER_WORDS)}"
            )

    def tier(
        self, index: int, node: int, spec: InstanceSpec, model: ModelSpec, options: InstanceOptions
    ) -> PlacedTier | None:
        """The lower tier of an instance's prefix cache, None without one."""
        word = self._memories.tier_words[index]
        if word is None:
            return None
        key = (word, node, -1 if self._sharing else index)
        if key not in self._pools:
            self._pools[key] = TierPool(self._pool_bytes(index, node, word))
        kind = (spec.model_name, options.kv_dtype, options.block_size)
        namespace = self._namespaces.setdefault(kind, len(self._namespaces))
        per_npu = kv_bytes_per_token(model, options.kv_dtype, spec.tp_size, spec.pp_size)
        pool = self._pools[key]
        tier = LowerTier(pool, namespace, options.block_size, per_npu * spec.num_npus)
        route = self._route(index, node, word)
        memory = TierMemory(
            storage=word,
            pool=list(self._pools).index(key),
            shared=self._sharing,
            capacity_bytes=pool.capacity_bytes,
            chunk_tokens=tier.chunk_tokens,
            chunk_bytes=tier.chunk_bytes,
            bandwidth_gbs=route.bandwidth_gbs,
            latency_ns=route.latency_ns,
        )
        return PlacedTier(tier, route, memory)

    def _pool_bytes(self, index: int, node: int, word: str) -> int:
        owners = self._cluster.num_nodes if KINDS[split_place(word)[0]].scope == "cluster" else 1
        if not self._sharing:
            owners *= self._cluster.nodes[node].num_instances
        ledgers = self._memories.tier_ledgers(index)
        return striped_bytes(each.tier_room_bytes(node, owners, shared=self._sharing) for each in ledgers)

    def _route(self, index: int, node: int, word: str) -> Route:
        """The way from a tier: through every memory that it is striped over, a part of the bytes each.

        A device of D moves one byte of D that are striped over all. So with the bandwidth of D such devices
        it moves all of them, and what lies in it alone D-fold. Devices that are booked alike move alike: one
        of them stands for them all.
        """
        ledgers = self._memories.tier_ledgers(index)
        memory = KINDS[split_place(word)[0]].spec(self._cluster, node)
        assert memory is not None
        devices = memory.devices
        kept = {(frozenset(each.tiers.values()), each.tier_gbs): each for each in reversed(ledgers)}.values()
        ports = [Port(each.memory.name, each.tier_gbs * devices, devices // len(ledgers)) for each in kept]
        bandwidth_gbs = min(each.tier_gbs for each in kept) * len(ledgers)
        return Route(tuple(ports), round(ledgers[0].memory.latency_ns), bandwidth_gbs)
