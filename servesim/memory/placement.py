"""Which layer's weights and which block's KV cache lie in which memory, and how many bytes that is.

A place is ``npu`` (each rank's own memory), ``cpu`` (memory of the node), ``cxl:<device>`` or ``pim`` (memory
of the node that computes attention; it is there when attention is offloaded). Bytes are of one rank unless
said otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.memory.sizing import kv_bytes_per_token
from servesim.slotted import dataclass
from servesim.specs.block_layers import architecture_of
from servesim.specs.layers import Experts
from servesim.specs.validation import hint
from servesim.specs.weights import stage_layers, tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim.specs.architecture import Architecture
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.formats import WeightFormats
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.layers import Layer, ModelLayers, Tensor
    from servesim.specs.model import ModelSpec
    from servesim.specs.placement import PlacementRule

NPU, CPU, PIM = "npu", "cpu", "pim"


@dataclass(slots=True, frozen=True)
class PlacedLayer:
    """One layer in the running order of a pipeline stage."""

    name: str
    place: str
    """Where its weights are."""
    stored_bytes: int = 0
    read_bytes: int = 0
    """Of its weights, read by every step."""
    expert_bytes: int = 0
    """Of all experts together; a step reads those that its tokens choose."""
    bytes_per_token: int = 0
    """Of its weights, read for every token of a step: rows of the embedding."""
    block: int | None = None
    """The transformer block it belongs to."""
    kv_place: str | None = None
    """Where the KV cache of its block is, for attention layers."""


def uses_placement(instance: InstanceSpec, options: InstanceOptions) -> bool:
    """Whether an instance keeps or reads anything but in the ordinary way."""
    return instance.placement is not None or options.enable_local_offloading or options.enable_attn_offloading


def rule_for(instance: InstanceSpec, layer: str, block: int | None) -> tuple[str, str]:
    """(place of the weights, place of the KV cache) of a layer; ``block`` is None outside the blocks.

    The general rule first, then those for the block in the order they are listed, then the layer's; each
    changes only what it names.
    """
    places = _places(instance, layer, block)
    return places["weights"], places["kv_loc"]


def _places(instance: InstanceSpec, layer: str, block: int | None) -> dict[str, str]:
    """Key of a rule -> place, for one layer."""
    places = {"weights": NPU, "kv_loc": NPU, "kv_evict_loc": NPU}
    spec = instance.placement
    if spec is None:
        return places
    rules: list[PlacementRule] = [spec.default]
    rules += [rule for rule in spec.blocks if block is not None and block in rule.block_indices]
    if layer in spec.layers:
        rules.append(spec.layers[layer])
    for rule in rules:
        places.update(rule.places)
    return places


def evict_place(instance: InstanceSpec, model: ModelSpec, where: str) -> str:
    """Where an instance's placement sends KV that its NPUs evict; ``npu`` means that it is dropped.

    Raises:
        InputError: it differs by block; a chunk of KV is of use only with all blocks, and kept in one memory.
    """
    if instance.placement is None:
        return NPU
    layer = architecture_of(model).attention_layer
    blocks = range(model.num_hidden_layers)
    first, *others = (_places(instance, layer, block)["kv_evict_loc"] for block in blocks)
    for block, place in enumerate(others, 1):
        if place != first:
            raise InputError(
                f"{where}.placement: kv_evict_loc: is {first!r} for block 0 and {place!r} for block {block}; "
                "evicted KV is kept whole, all blocks in one memory, so name it once, in default"
            )
    return first


def check_placement(instance: InstanceSpec, architecture: Architecture, where: str) -> None:
    """Raise InputError for rules about layers that the model does not have."""
    if instance.placement is None:
        return
    kinds = architecture.catalog
    known = [*kinds.dense, *kinds.per_sequence, *kinds.attention, *kinds.moe]
    for layer in instance.placement.layers:
        if layer not in known:
            raise InputError(
                f"{where}.placement.layers.{layer}: {architecture.model_type} has no such layer; "
                f"{hint(layer, known)}"
            )


def placed_stages(
    instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, architecture: Architecture
) -> list[list[PlacedLayer]]:
    """The layers of every pipeline stage in running order, with bytes and places."""
    stages, first = [], 0
    for count in stage_layers(model.num_hidden_layers, instance.pp_size):
        stages.append(_stage(instance, model, options, architecture, range(first, first + count)))
        first += count
    return stages


def _stage(
    instance: InstanceSpec,
    model: ModelSpec,
    options: InstanceOptions,
    architecture: Architecture,
    blocks: range,
) -> list[PlacedLayer]:
    stored, tp = model.stored_as(options.dtype), instance.tp_size

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor_bytes(tensor, "", stored.formats, tp) for tensor in tensors)

    layers = []
    if blocks.start == 0:
        row = model.hidden_size * stored.formats.plain_bytes // tp
        for name in architecture.sequence.prologue:
            place, _ = rule_for(instance, name, None)
            if name == "embedding":
                layers.append(
                    PlacedLayer(name, place, size((*stored.embedding, *stored.vision)), bytes_per_token=row)
                )
            else:
                layers.append(PlacedLayer(name, place))
    for block in blocks:
        layers += _block(instance, stored, options, architecture, block)
    if blocks.stop == len(stored.layers):
        norm = size(tensor for tensor in stored.head if tensor.name.startswith("norm"))
        output = size(stored.head) - norm
        tied = size(stored.embedding[:1]) if stored.tied else 0
        copied = tied if instance.pp_size > 1 else 0
        for name in architecture.sequence.head:
            place, _ = rule_for(instance, name, None)
            if name == "lm_head":
                if tied and not copied:  # it is the embedding, and lies where that lies
                    place, _ = rule_for(instance, "embedding", None)
                layers.append(PlacedLayer(name, place, output + copied, output + tied))
            else:
                own = norm if name == "final_layernorm" else 0
                layers.append(PlacedLayer(name, place, own, own))
    return layers


def _block(
    instance: InstanceSpec,
    stored: ModelLayers,
    options: InstanceOptions,
    architecture: Architecture,
    block: int,
) -> list[PlacedLayer]:
    layer = stored.layers[block]
    names = architecture.layers_of(block, isinstance(layer.mlp, Experts))
    weights, experts = block_weights(layer, stored.formats, instance.tp_size, instance.ep_size, names)
    layers = []
    for name, size in zip(names, weights, strict=True):
        place, kv_place = rule_for(instance, name, block)
        if options.enable_attn_offloading:
            kv_place = PIM
        if name == architecture.attention_layer:
            layers.append(PlacedLayer(name, place, size, size, block=block, kv_place=kv_place))
        elif name in architecture.catalog.moe:
            layers.append(PlacedLayer(name, place, size + experts, size, experts, block=block))
        else:
            layers.append(PlacedLayer(name, place, size, size, block=block))
    return layers


_PARTS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
    "o_proj": "o_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
"""Part of a parameter's name -> the layer of an architecture file that reads it."""


def _part_of(tensor: Tensor) -> str:
    """The layer of an architecture file that a parameter belongs to; ``layernorm`` for norms of the block."""
    words = tensor.name.removesuffix(".bias").split(".")
    if words[0] in ("self_attn", "attn") or words[-1] in ("gate_proj", "up_proj", "down_proj"):
        return _PARTS.get(words[-1], "qkv_proj")
    return "layernorm" if len(words) == 1 else "moe"


def block_weights(
    layer: Layer, formats: WeightFormats, tp: int, ep: int, names: list[str]
) -> tuple[list[int], int]:
    """Bytes of each of the kernels ``names`` of one layer of the model's list on one rank, and apart from
    them of all its experts.

    The sum is that of the memory plan (:func:`servesim.specs.weights.layer_bytes`). Weights of a kernel that
    the architecture file does not name on its own count to the largest that it names.
    """
    parts: dict[str, int] = {}
    experts, norms = 0, []
    for tensor in layer.tensors:
        size = tensor_bytes(tensor, layer.prefix, formats, tp, ep)
        part = _part_of(tensor)
        if tensor.copies > 1:
            experts += size
        elif part == "layernorm":
            norms.append(size)
        else:
            parts[part] = parts.get(part, 0) + size
    weights = []
    for name in names:  # a name that stands twice has its weights once, norms one each
        own = norms.pop() if name == "layernorm" and norms else parts.pop(name, 0)
        weights.append(own)
    weights[weights.index(max(weights))] += sum(parts.values()) + sum(norms)
    return weights, experts


def held_bytes(
    stages: list[list[PlacedLayer]], kv_layer_bytes: int, ranks: int
) -> tuple[list[tuple[int, int]], dict[str, tuple[int, int]]]:
    """(weight bytes, KV bytes per token) that an instance keeps: of a rank of every stage in its own memory,
    and of all ranks together in other memories by place.

    ``kv_layer_bytes``: KV of one token in one block on one rank; ``ranks``: of a stage.
    """
    own: list[tuple[int, int]] = []
    elsewhere: dict[str, tuple[int, int]] = {}
    for layers in stages:
        weights = kv = 0
        for layer in layers:
            if layer.place == NPU:
                weights += layer.stored_bytes
            elif layer.stored_bytes:
                before = elsewhere.get(layer.place, (0, 0))
                elsewhere[layer.place] = before[0] + layer.stored_bytes * ranks, before[1]
            if layer.kv_place == NPU:
                kv += kv_layer_bytes
            elif layer.kv_place is not None:
                before = elsewhere.get(layer.kv_place, (0, 0))
                elsewhere[layer.kv_place] = before[0], before[1] + kv_layer_bytes * ranks
        own.append((weights, kv))
    return own, dict(sorted(elsewhere.items()))


def kv_bytes_per_layer(model: ModelSpec, options: InstanceOptions, tp: int) -> int:
    """KV-cache bytes of one token in one block on one rank."""
    return kv_bytes_per_token(model, options.kv_dtype, tp) // model.num_hidden_layers
