"""The ledgers of a cluster's memories, with everything booked that is known before a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.memory.engine_memory import check_speed, differences, npu_memory
from servesim.memory.ledger import Ledger, Memory, Share
from servesim.memory.placement import (
    CPU,
    NPU,
    PIM,
    check_placement,
    evict_place,
    held_bytes,
    kv_bytes_per_layer,
    placed_stages,
    uses_placement,
)
from servesim.memory.plan import kv_cache_capacity
from servesim.memory.sizing import GIB
from servesim.slotted import dataclass
from servesim.specs.block_layers import architecture_of
from servesim.specs.hardware import load_hardware
from servesim.specs.memories import KINDS, split_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.placement import PlacedLayer
    from servesim.memory.plan import KvCapacity
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.pim import PimSpec

Key = tuple[str, int]
"""A memory: (kind, node) or, of the cluster's, (kind, device)."""


@dataclass(slots=True, frozen=True)
class Resident:
    """One instance that uses placement or offloading."""

    stages: list[list[PlacedLayer]]
    on_npus: list[tuple[int, int]]
    """(weight bytes, KV bytes per token) of a rank of each stage."""
    elsewhere: dict[str, tuple[int, int]]
    """The same of all ranks together, by place."""
    pim: PimSpec | None


class MemoryMap:
    """The memories of a cluster and who keeps what in them.

    A node's memory, PIM included, is its instances'; the devices of the cluster's are all nodes'. The rules
    of sharing are those of :class:`servesim.memory.ledger.Ledger`.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        models: dict[str, ModelSpec],
        options: Sequence[InstanceOptions],
        prefix_storage: str | None = None,
    ) -> None:
        """
        Args:
            cluster: whose memories they are.
            models: of its instances, by name.
            options: of its instances.
            prefix_storage: word of the lower tier of every prefix cache whose instance names no other.

        Raises:
            InputError: a rule, a device or a size is wrong, a memory is not there, or what is booked on it
                does not fit.
        """
        self._cluster = cluster
        self._placed = cluster.instances
        self._models = models
        self._options = options
        self._hardware = {name: load_hardware(name) for name in {spec.hardware for _, spec in self._placed}}
        self.ledgers: dict[Key, Ledger] = {}
        """Of the memories that are in use."""
        self._residents = {
            index: self._resident(index)
            for index, (_, spec) in enumerate(self._placed)
            if uses_placement(spec, options[index])
        }
        for index, resident in self._residents.items():
            for place, held in resident.elsewhere.items():
                self._ledger(self._key(index, place)).book(index, *held)
        self._check_weights()
        self.tier_words = [self._tier_word(index, prefix_storage) for index in range(len(self._placed))]
        """``CPU``, ``CXL`` (all devices), ``CXL:<device>`` or another memory that has the lower tier of an
        instance's prefix cache; None: it has none."""
        for index, word in enumerate(self.tier_words):
            for ledger in self.tier_ledgers(index):
                ledger.tiers[index] = self._placed[index][0], str(word)
        if any(ledger.tiers and ledger.keeps_kv for ledger in self.ledgers.values()):
            raise InputError(
                "a lower tier of the prefix cache (--prefix-storage, kv_evict_loc) and placement or PIM want "
                "the same memory, where whole KV caches leave no room; choose another memory for one of them"
            )

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
            ledger = self._ledger(self._key(index, place))
            outside.append(Share(place, self.seen_by(index, place), *held, ledger.kv_room_bytes))
        return kv_cache_capacity(model, spec, options, where, resident.on_npus, tuple(outside), hardware)

    def notes(self, index: int) -> list[str]:
        """Lines about an instance's memory that its user should see."""
        _, spec = self._placed[index]
        return differences(spec, self._hardware[spec.hardware])

    def ports(self, index: int) -> dict[str, Memory]:
        """The memories that an instance uses as it reads them, by place; its NPUs' own among them."""
        _, spec = self._placed[index]
        own = npu_memory(spec, self._hardware[spec.hardware], f"instance {index}")
        return {NPU: own} | {place: self.seen_by(index, place) for place in self._residents[index].elsewhere}

    def seen_by(self, index: int, place: str) -> Memory:
        """A memory at the speed at which an instance's steps read it."""
        ledger, pim = self._ledger(self._key(index, place)), self._residents[index].pim
        if place == PIM and pim is not None:
            bandwidth_gbs = self.channels(index) * pim.dram.bandwidth_gbs
            return replace(ledger.memory, bandwidth_gbs=bandwidth_gbs, latency_ns=pim.dram.read_latency_ns)
        return replace(ledger.memory, bandwidth_gbs=ledger.placed_gbs)

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

    def tier_ledgers(self, index: int) -> list[Ledger]:
        """The memories over which the chunks of an instance's lower tier are striped; none without one."""
        word = self.tier_words[index]
        if word is None:
            return []
        name, device = split_place(word)
        node = self._placed[index][0]
        kind = KINDS[name]
        if kind.scope == "node":
            return [self._ledger((name, node))]
        memory = kind.spec(self._cluster, node)
        assert memory is not None
        return [self._ledger((name, each)) for each in range(memory.devices) if device in (None, each)]

    def _tier_word(self, index: int, prefix_storage: str | None) -> str | None:
        """What placement says wins over the flag."""
        node, spec = self._placed[index]
        place = evict_place(spec, self._models[spec.model_name], f"instance {index}")
        word = prefix_storage if place == NPU else place.upper()
        if word is None:
            return None
        kind = KINDS[split_place(word)[0]]
        if kind.spec(self._cluster, node) is None:
            owner = self._cluster.source if kind.scope == "cluster" else f"nodes[{node}]"
            raise InputError(
                f"--prefix-storage {word}: {owner} has no {kind.field}; describe it there, or use CPU"
            )
        if not self._options[index].enable_prefix_caching:
            raise InputError(
                f"instance {index}: its prefix cache has a lower tier ({word}) but is off; leave one of "
                "them out"
            )
        return word

    def _resident(self, index: int) -> Resident:
        node, spec = self._placed[index]
        model, options = self._models[spec.model_name], self._options[index]
        architecture = architecture_of(model)
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
                if (places.kv_loc or NPU) not in (NPU, CPU):
                    raise InputError(
                        f"instance {index}: placement.{rule}.kv_loc: '{places.kv_loc}' is not allowed with "
                        "--enable-attn-offloading, which keeps the KV cache in PIM memory; leave it out"
                    )
        stages = placed_stages(spec, model, options, architecture)
        kv_layer_bytes = kv_bytes_per_layer(model, options, spec.tp_size)
        return Resident(stages, *held_bytes(stages, kv_layer_bytes, spec.tp_size), pim)

    def _key(self, index: int, place: str) -> Key:
        name, device = split_place(CPU if place == PIM else place)
        return name, self._placed[index][0] if device is None else device

    def _ledger(self, key: Key) -> Ledger:
        """The one ledger of a memory."""
        if key not in self.ledgers:
            name, number = key
            kind = KINDS[name]
            spec = kind.spec(self._cluster, number if kind.scope == "node" else 0)
            assert spec is not None
            label = name.upper()
            owner = f"{label} memory of node {number}" if kind.scope == "node" else f"{label} device {number}"
            size = int(spec.mem_size * GIB)
            self.ledgers[key] = Ledger(Memory(owner, kind.scope, size, spec.mem_bw, spec.mem_latency))
        return self.ledgers[key]

    def _check_weights(self) -> None:
        for _, ledger in sorted(self.ledgers.items()):
            needed, memory = ledger.weight_bytes, ledger.memory
            if needed > memory.total_bytes:
                parts = ", ".join(f"instance {i} {size} bytes" for i, size in ledger.weights.items() if size)
                raise InputError(
                    f"{self._cluster.source}: placement puts {needed} bytes of weights in the {memory.name}, "
                    f"which has {memory.total_bytes} bytes ({parts}); place some of them elsewhere or "
                    "enlarge mem_size"
                )
