"""Where an instance keeps its weights and KV cache: NPU, CPU, or a CXL device."""

from __future__ import annotations

import re
from typing import Annotated

from servesim.specs.annotated import AfterValidator, BeforeValidator, Field
from servesim.specs.memories import PLACES, is_place
from servesim.specs.validation import Spec, list_as_tuple


def _check_place(value: str) -> str:
    if not is_place(value):
        allowed = f"{', '.join(PLACES[:-1])} or {PLACES[-1]}"
        raise ValueError(f'"{value}" is not allowed; must be {allowed}')
    return value


def _check_range(value: str) -> str:
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?){0,9999}", value.replace(" ", "")):
        raise ValueError(f'"{value}" is not allowed; must be block numbers such as "0-3" or "8,9,10"')
    for part in value.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise ValueError(f'"{value}" is not allowed; {part} runs backwards')
    return value


Place = Annotated[str, AfterValidator(_check_place)]


class PlacementRule(Spec):
    """Places of one rule; a key left out keeps what a more general rule says."""

    weights: Place | None = None
    kv_loc: Place | None = None
    kv_evict_loc: Place | None = None

    @property
    def places(self) -> list[tuple[str, str]]:
        """(key, place) of the keys this rule sets."""
        keys = ("weights", "kv_loc", "kv_evict_loc")
        return [(key, place) for key in keys if (place := getattr(self, key)) is not None]


class BlockPlacement(PlacementRule):
    """A rule for some transformer blocks."""

    blocks: Annotated[str, AfterValidator(_check_range)]
    """``"0-3"`` or ``"8,9,10"``, counted from 0."""

    @property
    def block_indices(self) -> list[int]:
        """The blocks the rule is for, in ascending order."""
        indices: set[int] = set()
        for part in self.blocks.replace(" ", "").split(","):
            first, _, last = part.partition("-")
            indices.update(range(int(first), int(last or first) + 1))
        return sorted(indices)


class PlacementSpec(Spec):
    """Rules from general to particular: ``default``, then ``blocks``, then ``layers`` (by layer name)."""

    default: PlacementRule = PlacementRule()
    blocks: Annotated[
        tuple[BlockPlacement, ...],
        BeforeValidator(list_as_tuple),
    ] = ()
    layers: dict[Annotated[str, Field(min_length=1)], PlacementRule] = Field(default_factory=dict)

    @property
    def rules(self) -> list[tuple[str, PlacementRule]]:
        """(field path, rule) of every rule."""
        found: list[tuple[str, PlacementRule]] = [("default", self.default)]
        found += [(f"blocks[{index}]", rule) for index, rule in enumerate(self.blocks)]
        found += [(f"layers.{name}", rule) for name, rule in self.layers.items()]
        return found
