"""What all instances of a cluster keep in memories that they share, and what that leaves to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.memory.npu_memory import check_speed, differences, npu_speed
from servesim.memory.placement import (
    CPU,
    NPU,
    PIM,
    Holding,
    check_placement,
    holdings,
    placed_stages,
    uses_placement,
)
from servesim.memory.plan import Outside, kv_cache_capacity
from servesim.memory.sizing import GIB
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import load_hardware

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.placement import PlacedLayer
    from servesim.memory.plan import KvCapacity
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions
    from servesim.specs.pim import PimSpec


@dataclass(slots=True, frozen=True)
class MemoryPort:
    """How fast one instance reads a memory."""

    bandwidth_gbs: float
    latency_ns: float


@dataclass(slots=True, frozen=True)
class Resident:
    """One instance that uses placement or offloading."""

    stages: list[list[PlacedLayer]]
    on_npus: list[Holding]
    elsewhere: dict[str, Holding]
    """By place."""
    pim: PimSpec | None


class MemoryMap:
    """The memories of a cluster and who keeps what in them.

    CPU memory, PIM included, is its node's; CXL devices are the cluster's. Weights take what they need; what
    they leave is split evenly among the instances that keep KV there. Instances that read from the same
    memory have equal shares of its bandwidth, whether the others read at that moment or not.
    """

    def __init__(
        self, cluster: ClusterSpec, models: dict[str, ModelSpec], options: Sequence[InstanceOptions]
    ) -> None:
        """
        Raises:
            InputError: a rule, a device or a size is wrong, or the weights in a memory do not fit.
        """
        self._cluster = cluster
        self._placed = cluster.instances
        self._models = models
        self._options = options
        self._hardware = {name: load_hardware(name) for name in {spec.hardware for _, spec in self._placed}}
        self._residents = {
            index: self._resident(index)
            for index, (_, spec) in enumerate(self._placed)
            if uses_placement(spec, options[index])
        }
        self._check_weights()

    def resident(self, index: int) -> Resident | None:
        """An instance with placement or offloading; None: everything is as usual."""
        return self._residents.get(index)

    def capacity(self, index: int) -> KvCapacity:
        """The memory plan of an instance.

        Raises:
            InputError: its weights do not fit its NPUs, or no KV block fits.
        """
        _, spec = self._placed[index]
        model, options, where = self._models[spec.model_name], self._options[index], f"instance {index}"
        resident = self.resident(index)
        hardware = self._hardware[spec.hardware]
        if resident is None:
            check_speed(spec, hardware, where)
            return kv_cache_capacity(model, spec, options, where, hardware=hardware)
        outside = []
        for place, held in resident.elsewhere.items():
            key = self._key(index, place)
            total = self._bytes(key)
            tenants = max(sum(kv > 0 for _, _, kv in self._tenants(key)), 1)
            room = (total - self.weight_bytes(key)) // tenants
            outside.append(Outside(place, held.weight_bytes, held.kv_bytes_per_token, room, total))
        own = [(stage.weight_bytes, stage.kv_bytes_per_token) for stage in resident.on_npus]
        return kv_cache_capacity(model, spec, options, where, own, tuple(outside), hardware)

    def notes(self, index: int) -> list[str]:
        """Lines about an instance's memory that its user should see."""
        _, spec = self._placed[index]
        return differences(spec, self._hardware[spec.hardware])

    def ports(self, index: int) -> dict[str, MemoryPort]:
        """How an instance reads the memories that it uses, by place; its NPUs' own among them."""
        _, spec = self._placed[index]
        found = {NPU: MemoryPort(*npu_speed(spec, self._hardware[spec.hardware], f"instance {index}"))}
        resident = self._residents[index]
        for place in resident.elsewhere:
            key = self._key(index, place)
            bandwidth, latency = self._speed(key)
            if place == PIM and resident.pim is not None:
                dram = resident.pim.dram
                bandwidth, latency = self.channels(index) * dram.bandwidth_gbs, dram.read_latency_ns
                found[place] = MemoryPort(bandwidth, latency)
            else:
                found[place] = MemoryPort(bandwidth / len(self._tenants(key)), latency)
        return found

    def channels(self, index: int) -> int:
        """PIM channels that an instance has for itself: those of its node, split among all that offload.

        Raises:
            InputError: there are fewer channels than ranks.
        """
        node, spec = self._placed[index]
        resident = self._residents[index]
        assert resident.pim is not None
        memory = self._cluster.nodes[node].cpu_mem
        count = int(memory.mem_size / resident.pim.dram.capacity_gb)
        sharers = sum(
            self._placed[other][0] == node and PIM in found.elsewhere
            for other, found in self._residents.items()
        )
        ranks = spec.num_npus
        if count // sharers < ranks:
            raise InputError(
                f"nodes[{node}].cpu_mem: {memory.mem_size:g} GB of {memory.pim_config} are {count} channels "
                f"of {resident.pim.dram.capacity_gb:g} GB, too few for {sharers} instances of {ranks} NPUs; "
                "enlarge mem_size"
            )
        return count // sharers

    def weight_bytes(self, key: tuple[str, int]) -> int:
        """Weights of all instances in one memory: ``(cpu, node)`` or ``(cxl, device)``."""
        return sum(weights for _, weights, _ in self._tenants(key))

    def keeps_kv(self, key: tuple[str, int]) -> bool:
        """Whether an instance has its KV cache, or that of some blocks, in a memory."""
        return any(kv for _, _, kv in self._tenants(key))

    def _resident(self, index: int) -> Resident:
        node, spec = self._placed[index]
        model, options = self._models[spec.model_name], self._options[index]
        architecture = load_architecture(model.model_type)
        check_placement(spec, architecture, f"instance {index}")
        pim = None
        if options.enable_attn_offloading:
            name = self._cluster.nodes[node].cpu_mem.pim_config
            if name is None:
                raise InputError(
                    f"instance {index}: --enable-attn-offloading needs memory that computes; set "
                    f"nodes[{node}].cpu_mem.pim_config to a device of configs/pim"
                )
            from servesim.specs.pim import load_pim

            pim = load_pim(name)
            for rule, places in spec.placement.rules if spec.placement else ():
                if (places.kv_loc or NPU).startswith("cxl"):
                    raise InputError(
                        f"instance {index}: placement.{rule}.kv_loc: '{places.kv_loc}' is not allowed with "
                        "--enable-attn-offloading, which keeps the KV cache in PIM memory; leave it out"
                    )
        stages = placed_stages(spec, model, options, architecture)
        return Resident(stages, *holdings(stages, spec, model, options), pim)

    def _key(self, index: int, place: str) -> tuple[str, int]:
        if place in (CPU, PIM):
            return CPU, self._placed[index][0]
        return "cxl", int(place.removeprefix("cxl:"))

    def _tenants(self, key: tuple[str, int]) -> list[tuple[int, int, int]]:
        """(instance, weight bytes, KV bytes per token) of everybody with something in a memory."""
        found = []
        for index, resident in self._residents.items():
            held = [one for place, one in resident.elsewhere.items() if self._key(index, place) == key]
            if held:
                weights = sum(one.weight_bytes for one in held)
                found.append((index, weights, sum(one.kv_bytes_per_token for one in held)))
        return found

    def _bytes(self, key: tuple[str, int]) -> int:
        kind, number = key
        if kind == CPU:
            return int(self._cluster.nodes[number].cpu_mem.mem_size * GIB)
        assert self._cluster.cxl_mem is not None
        return int(self._cluster.cxl_mem.mem_size * GIB)

    def _speed(self, key: tuple[str, int]) -> tuple[float, float]:
        kind, number = key
        memory = self._cluster.nodes[number].cpu_mem if kind == CPU else self._cluster.cxl_mem
        assert memory is not None
        return memory.mem_bw, memory.mem_latency

    def _check_weights(self) -> None:
        keys = {self._key(index, place) for index, one in self._residents.items() for place in one.elsewhere}
        for key in sorted(keys):
            needed, total = self.weight_bytes(key), self._bytes(key)
            if needed > total:
                name = f"CPU memory of node {key[1]}" if key[0] == CPU else f"CXL device {key[1]}"
                parts = ", ".join(
                    f"instance {index} {weights} bytes" for index, weights, _ in self._tenants(key) if weights
                )
                raise InputError(
                    f"{self._cluster.source}: placement puts {needed} bytes of weights in the {name}, which "
                    f"has {total} bytes ({parts}); place some of them elsewhere or enlarge mem_size"
                )
