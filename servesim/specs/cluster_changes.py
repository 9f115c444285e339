"""A cluster as the flags change it: other hardware, another model, other degrees, copies side by side."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_structure
from servesim.specs.hardware import load_hardware
from servesim.specs.model import load_model
from servesim.specs.validation import hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.options import RuntimeOptions


def cluster_of(options: RuntimeOptions) -> ClusterSpec:
    """The cluster that the options name, on the hardware, model and degree they name.

    Raises:
        InputError: as :func:`load_cluster` and :func:`with_hardware`.
    """
    return with_options(load_cluster(options.cluster_config), options)


def with_options(cluster: ClusterSpec, options: RuntimeOptions) -> ClusterSpec:
    """The cluster as ``--hardware``, ``--model``, ``--tp``, ``--pp``, ``--dp`` and
    ``--enable-expert-parallel`` change it."""
    changed = with_hardware(cluster, options.hardware, options.model, options.tp, options.pp)
    spread = options.enable_expert_parallel
    if options.dp is not None:
        changed = in_copies(changed, options.dp, shared_experts=spread)
    return with_spread_experts(changed) if spread else changed


def with_spread_experts(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with the experts of every instance on all its NPUs and those of its ``dp_group``.

    Raises:
        InputError: a model has no experts; vLLM does not start so.
    """
    for name in dict.fromkeys(instance.model_name for _, instance in cluster.instances):
        if not load_model(name).is_moe:
            raise InputError(f"--enable-expert-parallel: is not allowed; {name} has no experts; leave it out")
    members = Counter(instance.dp_group for _, instance in cluster.instances)

    def spread(instance: InstanceSpec) -> InstanceSpec:
        group = 1 if instance.dp_group is None else members[instance.dp_group]
        return instance.model_copy(update={"ep_size": instance.tp_size * group})

    nodes = [
        node.model_copy(update={"instances": tuple(map(spread, node.instances))}) for node in cluster.nodes
    ]
    return cluster.model_copy(update={"nodes": tuple(nodes)})


def in_copies(cluster: ClusterSpec, copies: int, *, shared_experts: bool = False) -> ClusterSpec:
    """The cluster with ``copies`` of every instance side by side on its node, as data parallelism has them.

    Without expert layers nothing ties the copies together but the router. Doing it twice is doing it once.
    ``shared_experts``: copies of models with experts share them.

    Raises:
        InputError: a model has expert layers, whose exchange needs more said, or an instance is in a group.
    """
    groups = [instance.dp_group for _, instance in cluster.instances]
    if any(groups):
        done = {f"dp{index}" for index in range(len(groups) // copies)}
        if set(groups) == done and all(groups.count(group) == copies for group in done):
            return cluster
        raise InputError(f"--dp {copies}: {cluster.source} has a dp_group already; name its members there")
    for _, instance in cluster.instances:
        if load_model(instance.model_name).is_moe and not shared_experts:
            raise InputError(
                f"--dp {copies}: {instance.model_name} has expert layers, and whether copies share them is "
                "not said; add --enable-expert-parallel if they do, or write the members with dp_group and "
                "ep_size into the cluster config, as in "
                "configs/cluster/data_expert_parallel.json"
            )
    nodes, first = [], 0
    for node in cluster.nodes:
        members = tuple(
            instance.model_copy(update={"dp_group": f"dp{first + index}"} if copies > 1 else {})
            for index, instance in enumerate(node.instances)
            for _ in range(copies)
        )
        first += len(node.instances)
        nodes.append(node.model_copy(update={"instances": members, "num_instances": len(members)}))
    return cluster.model_copy(update={"nodes": tuple(nodes)})


def with_hardware(
    cluster: ClusterSpec,
    hardware: str | None = None,
    model: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
) -> ClusterSpec:
    """The cluster with all its instances on other hardware, with another model or degrees; None: as it is.

    Memory and links are those of ``configs/hardware/<hardware>.yaml``. What an instance says of its former
    hardware goes, with a note: a number of KV blocks, a reserve, engine constants. Doing it twice is doing it
    once.

    Raises:
        InputError: there is no such hardware, its file says nothing of its memory, or the result is no valid
            cluster.
    """
    spec = None if hardware is None else _known_hardware(hardware)
    moved = {instance.hardware for _, instance in cluster.instances} - {hardware} if spec else set()
    nodes = [
        node.model_copy(
            update={"instances": tuple(_moved(instance, spec, model, tp, pp) for instance in node.instances)}
        )
        for node in cluster.nodes
    ]
    changes: dict[str, Any] = {"nodes": tuple(nodes)}
    if spec is not None and moved and spec.link is not None:
        # latency_us is what two ranks' all-reduce of next to nothing takes: two passes of one hop.
        changes |= {"link_bw": spec.link.bandwidth_gbs, "link_latency": spec.link.latency_us * 1e3 / 2}
    changed = cluster.model_copy(update=changes)
    check_structure(changed)
    pairs = zip(cluster.instances, changed.instances, strict=True)
    lost = [note for index, ((_, old), (_, new)) in enumerate(pairs) for note in _lost(index, old, new)]
    vars(changed)["_notes"] = (*cluster.notes, *lost)
    return changed


def _lost(index: int, before: InstanceSpec, after: InstanceSpec) -> Iterator[str]:
    """A note for the keys of an instance that do not hold for what a flag made of it."""
    keys = {
        "engine": before.engine and not after.engine,
        "num_gpu_blocks": before.num_gpu_blocks and not after.num_gpu_blocks,
        "npu_mem.reserve": before.npu_mem.reserve is not None and after.npu_mem.reserve is None,
    }
    names = [name for name, is_lost in keys.items() if is_lost]
    if names:
        flags = {
            "--hardware": before.hardware != after.hardware,
            "--model": before.model_name != after.model_name,
            "--tp": before.tp_size != after.tp_size,
            "--pp": before.pp_size != after.pp_size,
        }
        changed = " and ".join(flag for flag, acts in flags.items() if acts)
        yield f"{changed} drops {', '.join(names)} of instance {index}, stated for what it was before"


def _known_hardware(name: str) -> HardwareSpec:
    spec = load_hardware(name)
    if spec.memory_gib is None or spec.memory_bandwidth_gbs is None:
        known = [path.stem for path in paths.find_all("configs/hardware/*.yaml")]
        if name not in known:
            raise InputError(f"--hardware: {name} is not known; {hint(name, known)}")
        missing = "memory_gib" if spec.memory_gib is None else "memory_bandwidth_gbs"
        raise InputError(f"configs/hardware/{name}.yaml: {missing}: is missing; --hardware goes by it")
    return spec


def _moved(
    instance: InstanceSpec, spec: HardwareSpec | None, model: str | None, tp: int | None, pp: int | None
) -> InstanceSpec:
    changes: dict[str, Any] = {}
    if spec is not None and spec.name != instance.hardware:
        memory = {"mem_size": spec.memory_gib, "mem_bw": spec.memory_bandwidth_gbs, "mem_latency": 0}
        npu_mem = instance.npu_mem.model_copy(update={**memory, "reserve": None})
        changes |= {"hardware": spec.name, "npu_mem": npu_mem, "num_gpu_blocks": None, "engine": None}
    if model is not None and model != instance.model_name:
        changes |= {"model_name": model, "num_gpu_blocks": None}
    degrees = tp or instance.tp_size, pp or instance.pp_size
    if degrees != (instance.tp_size, instance.pp_size):
        changes |= {"tp_size": degrees[0], "pp_size": degrees[1], "num_npus": degrees[0] * degrees[1]}
        changes |= {"num_gpu_blocks": None}
    return instance.model_copy(update=changes)
