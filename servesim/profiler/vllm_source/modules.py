"""Which modules of a running model are which layers of the architecture file.

A module answers to the name of its class, of every class that one is derived from, and to any name the
model's own Python module gives it (vLLM's Qwen3 calls Qwen2's MLP ``Qwen3MLP``). Where several entries of the
catalog fit, the one whose ``within`` encloses the module most closely wins: a norm of an attention's heads is
not one of its block's norms.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from servesim.specs.architecture import Architecture, LayerEntry


def class_names(module: object, aliases: Mapping[str, type]) -> set[str]:
    """All names a module answers to."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return names | {name for name, cls in aliases.items() if isinstance(module, cls)}


def aliases_of(root: object) -> dict[str, type]:
    """The classes that the Python module of the root's class knows, by the names it gives them."""
    home = sys.modules.get(type(root).__module__)
    return {name: value for name, value in vars(home).items() if isinstance(value, type)} if home else {}


def catalog_entries(architecture: Architecture) -> dict[str, LayerEntry]:
    """Every layer of the catalog, whichever its table."""
    catalog = architecture.catalog
    return {**catalog.dense, **catalog.per_sequence, **catalog.attention, **catalog.moe}


def layers_of(
    architecture: Architecture, roots: Iterable[tuple[str, Any]]
) -> dict[str, list[tuple[str, Any]]]:
    """Layer -> its modules as (path, module).

    ``roots`` are (name, module) of every tree to look through: the model, and a sampler beside it. A module
    needs nothing but ``named_modules()``.

    Raises:
        InputError: a layer of the catalog has no module.
    """
    entries = catalog_entries(architecture)
    found: dict[str, list[tuple[str, Any]]] = {layer: [] for layer in entries}
    seen: set[str] = set()
    for root_name, root in roots:
        aliases = aliases_of(root)
        names = {path: class_names(module, aliases) for path, module in root.named_modules()}
        seen |= {type(module).__name__ for _, module in root.named_modules()}
        for path, module in root.named_modules():
            layer = _closest(entries, path, names)
            if layer is not None:
                found[layer].append((f"{root_name}.{path}" if path else root_name, module))
    for layer, modules in found.items():
        if not modules:
            entry = entries[layer]
            within = f" within {entry.within}" if entry.within else ""
            raise InputError(
                f"profiler/models/{architecture.model_type}.yaml: catalog: layer {layer}: the engine's model "
                "has no "
                f"module of class {entry.class_name}{within}; it has {', '.join(sorted(seen))}"
            )
    return found


def _closest(entries: Mapping[str, LayerEntry], path: str, names: Mapping[str, set[str]]) -> str | None:
    best, best_depth = None, -1
    for layer, entry in entries.items():
        if entry.class_name in names[path]:
            depth = 0 if entry.within is None else _depth_of_ancestor(path, entry.within, names)
            if depth > best_depth:
                best, best_depth = layer, depth
    return best


def _depth_of_ancestor(path: str, wanted: str, names: Mapping[str, set[str]]) -> int:
    """How deep the closest enclosing module that answers to ``wanted`` lies, from 1; -1: there is none."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        if wanted in names.get(".".join(parts[:depth]), ()):
            return depth + 1
    return -1


def calls_of(architecture: Architecture, layer: str, blocks: int) -> int:
    """How often one step of a model with ``blocks`` blocks runs a layer, by the architecture's sequence."""
    sequence = architecture.sequence
    inside = [*sequence.pre_attn, *sequence.post_attn, *(sequence.mlp_dense or sequence.mlp_moe)]
    if sequence.mlp_moe and layer in sequence.mlp_moe:
        inside = [*sequence.pre_attn, *sequence.post_attn, *sequence.mlp_moe]
    outside = [*sequence.prologue, *sequence.head]
    if layer == architecture.attention_layer:
        return blocks
    return inside.count(layer) * blocks + outside.count(layer)
