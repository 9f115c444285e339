"""A cluster: nodes with CPU memory, and on them instances, each one model replica on some NPUs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from servesim.specs import memories, paths
from servesim.specs.annotated import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from servesim.specs.checked import model_validator
from servesim.specs.engine_options import EngineOptions, OwnOptions
from servesim.specs.flags import renamed
from servesim.specs.hardware import EngineSpec
from servesim.specs.memories import Word
from servesim.specs.placement import PlacementSpec
from servesim.specs.power import PowerSpec
from servesim.specs.reading import read_json_object
from servesim.specs.validation import (
    BandwidthGbs,
    Count,
    Degree,
    LatencyNs,
    SizeGb,
    Spec,
    Unit,
    list_as_tuple,
    nearest,
    validated,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


_OTHER_NAMES = {
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "all2all_backend": "moe_backend",
}
"""vLLM's names of an instance's degrees and exchange."""


def _check_one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{json.dumps(value)} is not allowed; must be one line of plain text")
    return value


def _number_or_list(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


def _word_or_list(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "word"


LinkBandwidth = Annotated[
    Annotated[BandwidthGbs, Tag("number")]
    | Annotated[
        tuple[BandwidthGbs, ...],
        BeforeValidator(list_as_tuple),
        Field(min_length=1, max_length=4),
        Tag("list"),
    ],
    Discriminator(_number_or_list),
]
LinkLatency = Annotated[
    Annotated[LatencyNs, Tag("number")]
    | Annotated[
        tuple[LatencyNs, ...], BeforeValidator(list_as_tuple), Field(min_length=1, max_length=4), Tag("list")
    ],
    Discriminator(_number_or_list),
]

Wiring = Literal["ring", "fully_connected", "switch"]
LinkTopology = Annotated[
    Annotated[Wiring, Tag("word")]
    | Annotated[
        tuple[Wiring, ...], BeforeValidator(list_as_tuple), Field(min_length=1, max_length=4), Tag("list")
    ],
    Discriminator(_word_or_list),
]


class NpuMemory(Spec):
    """Memory of one NPU. What is left out is the hardware file's."""

    mem_size: Annotated[SizeGb, Field(description="GB (2**30 bytes) of one NPU")] | None = None
    mem_bw: Annotated[BandwidthGbs, Field(description="GB/s (1e9 bytes per second)")] | None = None
    mem_latency: Annotated[LatencyNs, Field(description="ns")] = 0
    mem_util: Annotated[float, Field(ge=1e-6, le=1, description="share for weights and KV cache")] | None = (
        None
    )
    """Wins over ``--npu-memory-utilization``."""
    reserve: (
        Annotated[float, Field(ge=0, le=1e6, description="GB kept from the KV cache"), Unit("GB")] | None
    ) = None
    """In place of the estimate of what activations and the runtime take; 0: nothing."""


class ReplicaSpec(Spec):
    """What an instance is, without the options it sets for itself."""

    model_name: Annotated[
        str,
        AfterValidator(_check_one_line),
        Field(min_length=1, max_length=1000, description="<org>/<name>, or a config.json"),
    ]
    hardware: Annotated[Word, Field(description="first folder of the profile bundles, such as RTXPRO6000")]
    npu_mem: NpuMemory = NpuMemory()
    num_npus: Degree
    """tp_size * pp_size; one of ``num_npus`` and ``tp_size`` may be left out."""
    tp_size: Degree
    pp_size: Degree = 1
    ep_size: Degree = 1
    dp_group: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    pd_type: Literal["prefill", "decode"] | None
    placement: PlacementSpec | None = None
    engine: EngineSpec | None = None
    """What it states wins over the hardware file."""
    moe_backend: Annotated[
        Literal["allgather_reducescatter", "all_to_all", "deepep_high_throughput", "deepep_low_latency"],
        Field(description="how tokens reach experts on other members of the dp_group"),
    ] = "allgather_reducescatter"
    """Every member sees the tokens of all (vLLM's default), or each token only travels to its experts: as
    collectives, or by DeepEP's kernels where they were measured."""


class InstanceSpec(OwnOptions, ReplicaSpec):
    """One model replica: a scheduler and the NPUs it drives.

    What it sets of the runtime options wins over the flag of the same name.
    """

    @model_validator(mode="before")
    @classmethod
    def _complete_degrees(cls, data: Any) -> Any:
        """Other engines' names by ours, and whichever of num_npus and tp_size is left out filled in."""
        if not isinstance(data, dict):
            return data
        data = renamed(EngineOptions.model_fields, data)
        for other, name in _OTHER_NAMES.items():
            if other in data and name in data:
                raise ValueError(f"{other}: is the same as {name}, which stands there too; keep one")
            if other in data:
                data[name] = data.pop(other)
        npus, tp, pp = data.get("num_npus"), data.get("tp_size"), data.get("pp_size", 1)
        if npus is None and tp is None:
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if any(nearest(key, ("num_npus", "tp_size")) for key in unknown):
                return data  # misspelt: told as an unknown key
            raise ValueError("num_npus or tp_size is missing; one of them is required")
        if type(pp) is not int or pp < 1:
            return data  # told by the field's own check
        # A degree that is wrong by itself is told by its own check, so the one derived from it is kept legal.
        if npus is None and type(tp) is int:
            return {**data, "num_npus": min(max(tp * pp, 1), 65536)}
        if tp is None and type(npus) is int:
            return {**data, "tp_size": min(max(npus // pp, 1), 65536)}
        return data


class NodeSpec(Spec):
    """One host."""

    num_instances: Count
    cpu_mem: memories.CpuMemory
    instances: Annotated[tuple[InstanceSpec, ...], BeforeValidator(list_as_tuple), Field(min_length=1)]
    power: PowerSpec | None = None


class ClusterSpec(Spec):
    """Everything that serves: nodes and the links between NPUs."""

    num_nodes: Count
    link_bw: Annotated[LinkBandwidth, Field(description="GB/s; a number, or one per topology dimension")]
    link_latency: Annotated[LinkLatency, Field(description="ns; a number, or one per topology dimension")]
    link_topology: Annotated[
        LinkTopology, Field(description="how ranks are wired; a word, or one per topology dimension")
    ] = "ring"
    collectives: Annotated[
        Literal["auto", "measured", "links"],
        Field(description="what collectives take: measured tables of the bundles, or the links given here"),
    ] = "auto"
    """auto: measured, but over PCIe, where machines differ, the links."""
    nodes: Annotated[tuple[NodeSpec, ...], BeforeValidator(list_as_tuple), Field(min_length=1)]
    cxl_mem: memories.CxlMemory | None = None

    @property
    def source(self) -> str:
        """The file the cluster was read from, for messages."""
        source: str = vars(self).get("_source", "cluster")
        return source

    def named(self, source: str) -> Self:
        """The same cluster, read from ``source``; copies of it keep the name."""
        made = self.model_copy()
        vars(made)["_source"] = source
        return made

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped on the way from the file to this cluster, one line each."""
        notes: tuple[str, ...] = vars(self).get("_notes", ())
        return notes

    @property
    def instances(self) -> list[tuple[int, InstanceSpec]]:
        """(node index, instance) in the order that numbers the instances."""
        return [(index, instance) for index, node in enumerate(self.nodes) for instance in node.instances]

    @property
    def link_bandwidths_gbs(self) -> tuple[float, ...]:
        """Link bandwidth per topology dimension; a single one holds for all."""
        return self.link_bw if isinstance(self.link_bw, tuple) else (self.link_bw,)

    @property
    def link_wirings(self) -> tuple[Wiring, ...]:
        """Wiring per topology dimension; a single one holds for all."""
        return self.link_topology if isinstance(self.link_topology, tuple) else (self.link_topology,)

    @property
    def link_latencies_ns(self) -> tuple[float, ...]:
        """Link latency per topology dimension; a single one holds for all."""
        return self.link_latency if isinstance(self.link_latency, tuple) else (self.link_latency,)


def load_cluster(source: str | os.PathLike[str] | Mapping[str, Any]) -> ClusterSpec:
    """The cluster of a JSON file (looked up as :func:`servesim.specs.paths.find` does) or of a parsed object.

    Everything that can be said without the models' configs is checked; the rest is
    :func:`servesim.specs.cluster_checks.check_cluster`'s.

    Raises:
        InputError: one message with the file, the field path, what was found and what is allowed.
    """
    from servesim.specs.cluster_checks import check_structure

    if isinstance(source, str | os.PathLike):
        path = paths.find(os.fspath(source), "cluster config")
        data: Mapping[str, Any] = read_json_object(path)
        name = str(path)
    else:
        data, name = source, "cluster"
    data = {key: value for key, value in data.items() if key != "$schema"}  # editors' own key
    cluster = validated(ClusterSpec, data, name).named(name)
    check_structure(cluster)
    return cluster
