"""Which instances share which lower tier of the prefix cache, and over what it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.engine.transfers import Route
from servesim.errors import InputError
from servesim.memory.placement import NPU, evict_place
from servesim.memory.sizing import GIB, kv_bytes_per_token
from servesim.memory.tier import LowerTier, TierPool
from servesim.network.links import Port
from servesim.results.records import TierMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.memory_map import MemoryMap
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions, RuntimeOptions


class LowerTiers:
    """The pools of a cluster.

    A pool is an instance's own share of its node's memory, or with prefix sharing one for the whole node. CPU
    memory is the node's; CXL memory is the cluster's, split evenly over the nodes, with chunks striped over
    its devices. Whoever reads shares the memory's bandwidth.
    """

    def __init__(
        self, cluster: ClusterSpec, options: RuntimeOptions, memories: MemoryMap | None = None
    ) -> None:
        """
        Args:
            cluster: whose memories they are.
            options: which memory, and whether it is shared.
            memories: weights that lie in the same memories; None: none do.

        Raises:
            InputError: CXL is asked for and the cluster has none, sharing is asked for without a tier, or the
                prefix cache is off.
        """
        self._cluster = cluster
        self._memories = memories
        self._storage = options.prefix_storage
        self._sharing = options.enable_prefix_sharing
        self._pools: dict[tuple[str, int, int], TierPool] = {}
        self._routes: dict[int, Route] = {}
        self._memories_of: dict[int, TierMemory] = {}
        """Instance -> what is written down about its tier."""
        self._namespaces: dict[tuple[str, str, int], int] = {}
        if self._storage == "CXL" and cluster.cxl_mem is None:
            raise InputError(
                f"--prefix-storage CXL: {cluster.source} has no cxl_mem; describe it there, or use CPU"
            )
        if self._sharing and self._storage is None:
            raise InputError(
                "--enable-prefix-sharing: there is no lower tier to share; give --prefix-storage CPU or CXL"
            )

    def tier(
        self, index: int, node: int, spec: InstanceSpec, model: ModelSpec, options: InstanceOptions
    ) -> LowerTier | None:
        """The lower tier of an instance's prefix cache, None without one."""
        storage = self._storage_of(index, spec, model)
        if storage is None:
            return None
        if not options.enable_prefix_caching:
            raise InputError(
                f"instance {index}: its prefix cache has a lower tier ({storage}) but is off; leave one of "
                "them out"
            )
        instances = self._cluster.nodes[node].num_instances
        key = (storage, node, -1 if self._sharing else index)
        if key not in self._pools:
            size = self._node_bytes(storage, node)
            self._pools[key] = TierPool(size if self._sharing else size // instances)
        kind = (spec.model_name, options.kv_dtype, options.block_size)
        namespace = self._namespaces.setdefault(kind, len(self._namespaces))
        per_npu = kv_bytes_per_token(model, options.kv_dtype, spec.tp_size, spec.pp_size)
        pool = self._pools[key]
        tier = LowerTier(pool, namespace, options.block_size, per_npu * spec.num_npus)
        self._routes[index] = route = self._route(storage, node)
        self._memories_of[index] = TierMemory(
            storage=storage,
            pool=list(self._pools).index(key),
            shared=self._sharing,
            capacity_bytes=pool.capacity_bytes,
            chunk_tokens=tier.chunk_tokens,
            chunk_bytes=tier.chunk_bytes,
            bandwidth_gbs=route.bandwidth_gbs,
            latency_ns=route.latency_ns,
        )
        return tier

    def memory(self, index: int) -> TierMemory | None:
        """What to write down about the tier of an instance that :meth:`tier` was asked for."""
        return self._memories_of.get(index)

    def route(self, index: int) -> Route | None:
        """The way from the lower tier of an instance that :meth:`tier` was asked for, None without one."""
        return self._routes.get(index)

    def _storage_of(self, index: int, spec: InstanceSpec, model: ModelSpec) -> str | None:
        """``CPU``, ``CXL`` (all devices) or ``CXL:<device>``; what placement says wins over the flag."""
        place = evict_place(spec, model, f"instance {index}")
        return self._storage if place == NPU else place.upper()

    def _route(self, storage: str, node: int) -> Route:
        cxl = self._cluster.cxl_mem
        if storage != "CPU" and cxl is not None:
            devices = self._devices(storage)
            port = Port("CXL memory" if storage == "CXL" else storage, cxl.mem_bw * len(devices))
            latency = cxl.mem_latency
        else:
            memory = self._cluster.nodes[node].cpu_mem
            port = Port(f"CPU memory of node {node}", memory.mem_bw)
            latency = memory.mem_latency
        return Route((port,), round(latency), port.bandwidth_gbs)

    def _devices(self, storage: str) -> Sequence[int]:
        """The CXL devices that hold the chunks."""
        assert self._cluster.cxl_mem is not None
        _, _, device = storage.partition(":")
        return [int(device)] if device else range(self._cluster.cxl_mem.num_devices)

    def _node_bytes(self, storage: str, node: int) -> int:
        """What weights leave of the memory that a node keeps its chunks in."""
        cxl = self._cluster.cxl_mem
        if storage != "CPU" and cxl is not None:
            size = int(cxl.mem_size * GIB)
            total = sum(size - self._taken("cxl", device) for device in self._devices(storage))
            return total // self._cluster.num_nodes
        return int(self._cluster.nodes[node].cpu_mem.mem_size * GIB) - self._taken("cpu", node)

    def _taken(self, kind: str, number: int) -> int:
        if self._memories is None:
            return 0
        if self._memories.keeps_kv((kind, number)):
            raise InputError(
                "a lower tier of the prefix cache (--prefix-storage, kv_evict_loc) and placement or PIM want "
                "the same memory, where whole KV caches leave no room; choose another memory for one of them"
            )
        return self._memories.weight_bytes((kind, number))
