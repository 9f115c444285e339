"""Where the keys of a cluster config act that no option names: what is written there and changes nothing.

A config is often written for several runs, so that a key is noted in one line and never refused. Keys that
every config must have (links, CPU memory) say nothing by standing there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.specs.dtypes import EIGHT_BIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.conditions import Scene
    from servesim.specs.instance_options import InstanceOptions


def notes_of_keys(scene: Scene) -> Iterator[str]:
    """One line for every key that was given, with the instances or nodes where it does not act."""
    cluster = scene.cluster
    alone = not any(map(_works_together, scene.instances))
    for name in ("link_topology", "collectives"):
        if name in cluster.model_fields_set and alone:
            yield f"{name} has no effect here: no ranks work together (tp_size is 1, experts are not spread)"
    powered = [node.power for node in cluster.nodes if node.power is not None]
    if cluster.cxl_mem is not None and not _reads_cxl(scene) and not any(each.cxl for each in powered):
        yield (
            "cxl_mem has no effect here: nothing is placed there; --prefix-storage CXL, or a placement with "
            "cxl:0, would"
        )
    idle = [
        str(index)
        for index, node in enumerate(cluster.nodes)
        if node.cpu_mem.pim_config
        and (node.power is None or node.power.pim is None)
        and not any(_uses_pim(scene, each) for each in node.instances)
    ]
    if idle:
        yield (
            f"cpu_mem.pim_config of node {', '.join(idle)} has no effect here: without "
            "--enable-attn-offloading no attention is computed there"
        )
    for name, (holder, reason) in _KEYS.items():
        yield from _of_instances(scene, name, holder, reason)


def _of_instances(
    scene: Scene, name: str, holder: str, reason: Callable[[InstanceSpec, InstanceOptions], str]
) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for index, (instance, options) in enumerate(zip(scene.instances, scene.resolved, strict=True)):
        spec = getattr(instance, holder) if holder else instance
        if spec is None or name not in spec.model_fields_set or getattr(spec, name) is None:
            continue
        if getattr(spec, name) == type(spec).model_fields[name].default:
            continue
        if why := reason(instance, options):
            found.setdefault(why, []).append(str(index))
    label = f"{holder}.{name}" if holder else name
    for why, indices in found.items():
        yield f"{label} of instance {', '.join(indices)} has no effect here: {why}"


def _works_together(instance: InstanceSpec) -> bool:
    return instance.tp_size > 1 or instance.ep_size > 1


def _reads_cxl(scene: Scene) -> bool:
    if scene.options.prefix_storage == "CXL":
        return True
    places = [
        str(place)
        for instance in scene.instances
        if instance.placement is not None
        for _, rule in instance.placement.rules
        for _, place in rule.places
    ]
    return any(place.startswith("cxl") for place in places)


def _uses_pim(scene: Scene, instance: InstanceSpec) -> bool:
    return any(
        options.enable_attn_offloading
        for each, options in zip(scene.instances, scene.resolved, strict=True)
        if each is instance
    )


def _no_exchange(instance: InstanceSpec, _options: InstanceOptions) -> str:
    if instance.ep_size > instance.tp_size:
        return ""
    return "no experts lie on other members of a dp_group (ep_size is not above tp_size)"


def _blocks_given(_instance: InstanceSpec, options: InstanceOptions) -> str:
    return "" if options.num_gpu_blocks is None else "num_gpu_blocks sets the KV cache"


def _blocks_given_too(instance: InstanceSpec, options: InstanceOptions) -> str:
    """A reserve of nothing takes nothing from anybody."""
    return _blocks_given(instance, options) if instance.npu_mem.reserve else ""


def _with_graphs(_instance: InstanceSpec, options: InstanceOptions) -> str:
    return "steps run as CUDA graphs; --enforce-eager turns them off" if options.cudagraph else ""


def _no_8bit_cache(_instance: InstanceSpec, options: InstanceOptions) -> str:
    return "" if options.kv_dtype in EIGHT_BIT else f"the KV cache is in {options.kv_dtype}"


def _weights_of_8bit(instance: InstanceSpec, options: InstanceOptions) -> str:
    return _other_width(instance, options, "8bit") if options.dtype in EIGHT_BIT else ""


def _weights_of_16bit(instance: InstanceSpec, options: InstanceOptions) -> str:
    return "" if options.dtype in EIGHT_BIT else _other_width(instance, options, "16bit")


def _other_width(instance: InstanceSpec, options: InstanceOptions, width: str) -> str:
    """A machine may state both rates."""
    stated = instance.engine is not None and getattr(instance.engine, f"sustained_tflops_{width}") is not None
    return "" if stated else f"the weights are in {options.dtype}; sustained_tflops_{width} acts"


def _beside_skew(instance: InstanceSpec, _options: InstanceOptions) -> str:
    skewed = instance.engine is not None and instance.engine.skew_in_mixed_steps
    return "skew_in_mixed_steps says instead what decodes of unequal length cost" if skewed else ""


_KEYS: dict[str, tuple[str, Callable[[InstanceSpec, InstanceOptions], str]]] = {
    "moe_backend": ("", _no_exchange),
    "mem_util": ("npu_mem", _blocks_given),
    "reserve": ("npu_mem", _blocks_given_too),
    "eager_launch_us": ("engine", _with_graphs),
    "sustained_tflops_8bit": ("engine", _weights_of_16bit),
    "sustained_tflops_16bit": ("engine", _weights_of_8bit),
    "decode_attention_8bit": ("engine", _no_8bit_cache),
    "tail_in_mixed_steps": ("engine", _beside_skew),
}
"""Key -> the object of an instance that it stands in, and why it does not act; an empty text: it does."""
