"""What one step of a model runs, layer by layer: ``profiler/models/<model_type>.yaml``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.annotated import Field
from servesim.specs.checked import field_validator, model_validator
from servesim.specs.reading import read_yaml_object
from servesim.specs.validation import Spec, joined, list_as_tuple, nearest, validated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Kind = Literal["dense", "per_sequence", "attention", "moe"]
KINDS: tuple[Kind, ...] = ("dense", "per_sequence", "attention", "moe")
"""The tables of a profile bundle, in the order they are looked through."""


class LayerEntry(Spec):
    """Where a profiler finds a layer inside the engine."""

    class_name: Annotated[str, Field(min_length=1)] = Field(alias="class")
    """The engine's module class."""
    within: Annotated[str, Field(min_length=1)] | None = None
    """The enclosing class, where the class alone is ambiguous."""
    tp_stable: bool = False
    """Its time does not depend on the tensor-parallel degree."""
    kind: LayerName = "full"
    """Of attention: what its steps cost; one of :data:`servesim.cost.attention.KINDS`."""

    @model_validator(mode="before")
    @classmethod
    def _class_by_its_engine(cls, entry: object) -> object:
        """``vllm: RMSNorm`` names the class too, as the files of LLMServingSim do."""
        if isinstance(entry, dict) and "vllm" in entry and "class" not in entry:
            return {"class" if key == "vllm" else key: value for key, value in entry.items()}
        return entry


class Sequence(Spec):
    """The order in which layers run; attention itself runs between ``pre_attn`` and ``post_attn``."""

    prologue: tuple[LayerName, ...] = ()
    """Once a step, before the first block."""
    pre_attn: tuple[LayerName, ...]
    post_attn: tuple[LayerName, ...]
    mlp_dense: tuple[LayerName, ...] = ()
    mlp_moe: tuple[LayerName, ...] = ()
    head: tuple[LayerName, ...]
    """Once a step, after the last block."""

    @field_validator("*", mode="before")
    @classmethod
    def _lists_as_tuples(cls, value: object) -> object:
        return list_as_tuple(value)


class Catalog(Spec):
    """Which table of a bundle holds a layer's time."""

    dense: dict[LayerName, LayerEntry]
    """Time grows with the step's tokens."""
    per_sequence: dict[LayerName, LayerEntry] = Field(default_factory=dict)
    """Time grows with the step's sequences."""
    attention: dict[LayerName, LayerEntry]
    moe: dict[LayerName, LayerEntry] = Field(default_factory=dict)


class Architecture(Spec):
    """The layers of one model family."""

    model_type: str
    sequence: Sequence
    catalog: Catalog
    blocks: tuple[tuple[str, ...], ...] = Field(default=(), exclude=True, repr=False)
    """Layers of every block of one model, where its config tells them; empty: a file does, for all alike."""

    def kind(self, layer: str) -> Kind:
        """The table that holds the layer's time."""
        for kind in KINDS:
            if layer in getattr(self.catalog, kind):
                return kind
        raise InputError(
            f"profiler/models/{self.model_type}.yaml: catalog: layer {layer!r} is in none of its tables"
        )

    def is_gemm(self, layer: str) -> bool:
        """Whether a dense layer is a GEMM: the engine's linear layers are."""
        entry = self.catalog.dense.get(layer)
        return entry is not None and entry.class_name.endswith("Linear")

    @property
    def attention_kind(self) -> str:
        """What prices the attention layer."""
        return self.catalog.attention[self.attention_layer].kind

    @property
    def attention_layer(self) -> str:
        """Name of the attention layer in the catalog."""
        return next(iter(self.catalog.attention))

    def block_layers(self, moe: bool) -> list[str]:
        """The layers of one transformer block in running order, attention among them; a name may come twice.

        Raises:
            InputError: the architecture has no block of this kind.
        """
        mlp = self.sequence.mlp_moe if moe else self.sequence.mlp_dense
        if not mlp:
            name = "mlp_moe" if moe else "mlp_dense"
            raise InputError(
                f"profiler/models/{self.model_type}.yaml: sequence.{name}: is missing; the model has "
                f"{'expert' if moe else 'dense'} layers"
            )
        return [*self.sequence.pre_attn, self.attention_layer, *self.sequence.post_attn, *mlp]

    def layers_of(self, block: int, moe: bool) -> list[str]:
        """The layers of one block of the model in running order; ``moe``: whether it has experts.

        Raises:
            InputError: the architecture has no block of this kind.
        """
        return list(self.blocks[block]) if self.blocks else self.block_layers(moe)

    def layers_outside_blocks(self) -> list[str]:
        """The layers that run once a step and whose time grows with its tokens: embedding, final norm."""
        once = [*self.sequence.prologue, *self.sequence.head]
        return [layer for layer in once if self.kind(layer) != "per_sequence"]

    def head_layers(self) -> list[str]:
        """The layers that run once a step and whose time grows with its sequences: lm_head, sampler."""
        once = [*self.sequence.prologue, *self.sequence.head]
        return [layer for layer in once if self.kind(layer) == "per_sequence"]


def load_architecture(model_type: str) -> Architecture:
    """The architecture of ``model_type``.

    Raises:
        InputError: no such architecture, or its file is wrong.
    """
    way_out = (
        "This file is missing: it names the layers of a step and the table of each "
        "(docs/new-architecture.md). It can describe blocks of full or grouped-query attention with a gated "
        "MLP or routed experts, where every layer keeps its whole context; linear attention, state-space "
        "layers and shared experts it cannot"
    )
    return read_architecture(paths.find_named("profiler/models/*.yaml", model_type, "architecture", way_out))


def read_architecture(path: Path) -> Architecture:
    """The architecture described in one file; every layer of its sequence must be in its catalog."""
    architecture = validated(Architecture, read_yaml_object(path), str(path))
    found = list(_disagreements(architecture))
    if found:
        raise InputError(joined(str(path), found))
    return architecture


def _disagreements(architecture: Architecture) -> Iterator[str]:
    catalog = {name: kind for kind in KINDS for name in getattr(architecture.catalog, kind)}
    if (count := len(architecture.catalog.attention)) != 1:
        yield f"catalog.attention: {count} layers are not allowed; must be exactly one"
    if sum(len(getattr(architecture.catalog, kind)) for kind in KINDS) != len(catalog):
        yield "catalog: a layer stands in two of its tables; keep one"
    for part in Sequence.model_fields:
        for index, layer in enumerate(getattr(architecture.sequence, part)):
            where = f"sequence.{part}[{index}]"
            if layer not in catalog:
                near = nearest(layer, catalog)
                yield f"{where}: layer {layer!r} is not in the catalog" + (
                    f"; did you mean {near!r}?" if near else ""
                )
            elif catalog[layer] == "attention":
                yield f"{where}: {layer!r} is not allowed; attention follows pre_attn by itself"
            elif catalog[layer] == "moe" and part != "mlp_moe":
                yield f"{where}: {layer!r} is not allowed; an expert layer belongs to mlp_moe"
            elif catalog[layer] == "per_sequence" and part not in ("prologue", "head"):
                yield f"{where}: {layer!r} is not allowed; a per-sequence layer belongs to head"
    if not architecture.sequence.mlp_dense and not architecture.sequence.mlp_moe:
        yield "sequence: mlp_dense or mlp_moe is missing; at least one is required"
