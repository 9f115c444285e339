"""Checks of a cluster that no single field can fail: counts, degrees, groups, and what the models allow."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from servesim.errors import InputError, MissingFileError
from servesim.specs.hardware import load_hardware
from servesim.specs.memories import KINDS, split_place
from servesim.specs.model import load_model
from servesim.specs.validation import joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.validation import Spec


def check_structure(cluster: ClusterSpec) -> None:
    """Everything that follows from the config alone.

    Raises:
        InputError: one message with every disagreement.
    """
    checks = (_counts, _degrees, _memories, _data_parallel, _roles, _power)
    _raise_if(cluster, [problem for check in checks for problem in check(cluster)])


def check_cluster(cluster: ClusterSpec) -> dict[str, ModelSpec]:
    """Everything the models decide: pipeline stages, heads and experts over NPUs, placement.

    Returns:
        model_name -> its model, for every instance.

    Raises:
        InputError: a model is unknown or its config wrong, or it cannot be split as asked.
    """
    models: dict[str, ModelSpec] = {}
    found: list[str] = []
    for (where, instance), (node, _) in zip(located(cluster), cluster.instances, strict=True):
        if instance.model_name not in models:
            models[instance.model_name] = _load(cluster, where, instance.model_name)
        model = models[instance.model_name]
        group = sum(other.dp_group == instance.dp_group for _, other in cluster.instances)
        members = group if instance.dp_group is not None else 1
        found += [f"{where}.{problem}" for problem in _splits(instance, model, members)]
        found += [f"{where}.{problem}" for problem in _places(cluster, node, instance, model)]
    _raise_if(cluster, found)
    return models


def located(cluster: ClusterSpec) -> Iterator[tuple[str, InstanceSpec]]:
    """(field path, instance) of every instance."""
    for n, node in enumerate(cluster.nodes):
        for i, instance in enumerate(node.instances):
            yield f"nodes[{n}].instances[{i}]", instance


def _raise_if(cluster: ClusterSpec, found: list[str]) -> None:
    if found:
        raise InputError(joined(cluster.source, found))


def _load(cluster: ClusterSpec, where: str, name: str) -> ModelSpec:
    try:
        return load_model(name)
    except MissingFileError as error:
        raise MissingFileError(f"{cluster.source}: {where}.model_name: {error}") from None


def _counts(cluster: ClusterSpec) -> Iterator[str]:
    if cluster.num_nodes != (count := len(cluster.nodes)):
        yield f"num_nodes: {cluster.num_nodes} is not allowed; must be {count}, the entries of nodes"
    for n, node in enumerate(cluster.nodes):
        if node.num_instances != (count := len(node.instances)):
            yield (
                f"nodes[{n}].num_instances: {node.num_instances} is not allowed; must be {count}, the "
                "entries of instances"
            )


def _degrees(cluster: ClusterSpec) -> Iterator[str]:
    for where, instance in located(cluster):
        npus, tp, pp = instance.num_npus, instance.tp_size, instance.pp_size
        if npus != tp * pp:
            yield f"{where}.num_npus: {npus} is not allowed; must be {tp * pp} = tp_size {tp} * pp_size {pp}"
        if None not in (instance.npu_memory_utilization, instance.npu_mem.mem_util):
            yield f"{where}.npu_memory_utilization: is the same as npu_mem.mem_util beside it; keep one"


def _memories(cluster: ClusterSpec) -> Iterator[str]:
    """The size of an NPU's memory is given, or the hardware file knows it."""
    sizes: dict[str, float | None] = {}  # each file is read once, and only where it is needed
    for where, instance in located(cluster):
        name = instance.hardware
        if instance.npu_mem.mem_size is None and name not in sizes:
            sizes[name] = load_hardware(name).memory_gib
        if instance.npu_mem.mem_size is None and sizes[name] is None:
            yield (
                f"{where}.npu_mem.mem_size: is missing; required, as configs/hardware/{name}.yaml does not "
                "say memory_gib"
            )


def _data_parallel(cluster: ClusterSpec) -> Iterator[str]:
    """Members of a group must be copies of its first one."""
    first: dict[str, tuple[str, InstanceSpec]] = {}
    for where, instance in located(cluster):
        if instance.dp_group is None:
            continue
        origin, leader = first.setdefault(instance.dp_group, (where, instance))
        for name in ("model_name", "tp_size", "pp_size", "ep_size", "moe_backend", "pd_type"):
            own, wanted = getattr(instance, name), getattr(leader, name)
            if own != wanted:
                yield (
                    f"{where}.{name}: {own!r} is not allowed; must be {wanted!r} as in {origin}, "
                    f"the same dp_group {instance.dp_group!r}"
                )


def _roles(cluster: ClusterSpec) -> Iterator[str]:
    """Prefill and decode instances of a model need each other."""
    roles: dict[str, dict[str | None, str]] = defaultdict(dict)
    for where, instance in located(cluster):
        roles[instance.model_name].setdefault(instance.pd_type, where)
    for model, places in roles.items():
        for role, partner in (("prefill", "decode"), ("decode", "prefill")):
            if role in places and partner not in places:
                yield f"{places[role]}.pd_type: '{role}' needs a '{partner}' instance of {model} beside it"
        if None in places and len(places) > 1:
            yield (
                f"{places[None]}.pd_type: null is not allowed beside prefill and decode instances of {model}"
                "; must be 'prefill' or 'decode'"
            )


def _power(cluster: ClusterSpec) -> Iterator[str]:
    """A power section speaks of the node's own hardware, and nothing draws less when it works."""
    cxl_left = cluster.cxl_mem.num_devices if cluster.cxl_mem is not None else 0
    for n, node in enumerate(cluster.nodes):
        if node.power is None:
            continue
        wanted = {instance.hardware for instance in node.instances}
        missing = sorted(wanted - set(node.power.npu))
        if node.power.npu and missing:
            yield (
                f"nodes[{n}].power.npu: has no {', '.join(missing)}, which instances of the node run on; "
                f"described: {', '.join(sorted(node.power.npu))}"
            )
        if node.power.pim is not None and node.cpu_mem.pim_config is None:
            yield f"nodes[{n}].power.pim: the node has no PIM; leave it out or set cpu_mem.pim_config"
        if node.power.cxl is not None:
            count = node.power.cxl.num_devices
            if count > cxl_left:
                yield (
                    f"nodes[{n}].power.cxl.num_devices: {count} is not allowed; cxl_mem leaves {cxl_left} "
                    "devices that no node before accounts for"
                )
            cxl_left = max(cxl_left - count, 0)
        for hardware, npu in node.power.npu.items():
            where = f"nodes[{n}].power.npu.{hardware}"
            yield from _rising(where, npu, "idle_power", "standby_power", "active_power")
        if node.power.cpu is not None:
            yield from _rising(f"nodes[{n}].power.cpu", node.power.cpu, "idle_power", "active_power")


def _rising(where: str, device: Spec, *names: str) -> Iterator[str]:
    """The powers ``names`` of a device must not fall from one to the next."""
    for lower, higher in pairwise(names):
        least, value = getattr(device, lower), getattr(device, higher)
        if value < least:
            yield f"{where}.{higher}: {value:g} is not allowed; must be >= {least:g} W, the {lower}"


def _splits(instance: InstanceSpec, model: ModelSpec, group: int) -> Iterator[str]:
    """How the model divides over the instance's NPUs; ``group`` is the number of members of its dp_group."""
    tp, pp, ep = instance.tp_size, instance.pp_size, instance.ep_size
    heads, kv_heads, layers = model.num_attention_heads, model.num_key_value_heads, model.num_hidden_layers
    if pp > layers:
        yield f"pp_size: {pp} is not allowed; must be <= {layers}, the layers of {model.name}"
    if heads % tp:
        yield f"tp_size: {tp} is not allowed; must divide the {heads} attention heads of {model.name}"
    elif not model.is_mla and kv_heads % tp and tp % kv_heads:
        yield f"tp_size: {tp} is not allowed; must divide {model.name}'s {kv_heads} KV heads or be a multiple"
    else:
        width = model.moe_intermediate_size if model.is_moe else model.intermediate_size
        if not (model.is_moe and ep > 1) and width % tp:
            yield f"tp_size: {tp} is not allowed; must divide the MLP width {width} of {model.name}"
    if not model.is_moe:
        if ep > 1:
            yield f"ep_size: {ep} is not allowed; must be 1, as {model.name} has no experts"
        return
    if model.num_experts % ep:
        yield f"ep_size: {ep} is not allowed; must divide the {model.num_experts} experts of {model.name}"
    if ep > tp * group:
        yield (
            f"ep_size: {ep} is not allowed; must be <= {tp * group}, tp_size {tp} times the {group} members "
            "of its dp_group"
        )
    elif tp % ep and (ep % tp or group % (ep // tp)):
        yield (
            f"ep_size: {ep} is not allowed; must divide tp_size {tp}, or be that times a divisor of the "
            f"{group} members of its dp_group"
        )


def _places(cluster: ClusterSpec, node: int, instance: InstanceSpec, model: ModelSpec) -> Iterator[str]:
    """Placement rules name blocks the model has and memories that the cluster has."""
    if instance.placement is None:
        return
    for where, rule in instance.placement.rules:
        for key, place in rule.places:
            name, device = split_place(place)
            if name not in KINDS:
                continue
            kind = KINDS[name]
            memory = kind.spec(cluster, node)
            devices = memory.devices if memory is not None else 0
            if (device or 0) >= devices:
                missing = f"none, as the {kind.scope} has no {kind.field}"
                allowed = f"0 to {devices - 1}" if devices else missing
                yield f"placement.{where}.{key}: '{place}' is not allowed; {name.upper()} devices: {allowed}"
    for index, block in enumerate(instance.placement.blocks):
        if block.block_indices[-1] >= model.num_hidden_layers:
            yield (
                f"placement.blocks[{index}].blocks: '{block.blocks}' is not allowed; {model.name} has blocks "
                f"0 to {model.num_hidden_layers - 1}"
            )
