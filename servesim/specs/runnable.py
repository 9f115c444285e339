"""Which models can be simulated: those whose every kind of layer has a cache that the engine keeps and steps
that have kernel times.

The others are refused by name before anything runs; `servesim kv` tells what their caches hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import MissingFileError, NotSupportedError, ServingError
from servesim.specs.block_layers import architecture_of, experts_of
from servesim.specs.layers import CompressedAttention

if TYPE_CHECKING:
    from servesim.specs.layers import ModelLayers
    from servesim.specs.model import ModelSpec


def why_not_simulated(model: ModelSpec) -> str | None:
    """What keeps a model from being simulated, in a few words; None: nothing."""
    if missing := missing_kinds(model.layers):
        return f"not modelled in the engine: {', '.join(missing)}"
    return why_not_priced(model)


def why_not_priced(model: ModelSpec) -> str | None:
    """What keeps a model's steps from having a time, in a few words; None: nothing."""
    try:
        architecture_of(model)
        experts_of(model.layers)
    except MissingFileError:
        return f"no file profiler/models/{model.model_type}.yaml describes its steps"
    except ServingError as error:
        return str(error).splitlines()[0]
    return None


def refuse_not_simulated(model: ModelSpec) -> None:
    """Refuse a model whose steps cannot be simulated, with what is possible.

    Raises:
        NotSupportedError: some of its layers are not modelled in the engine.
    """
    if missing := missing_kinds(model.layers):
        raise NotSupportedError(not_simulated(model, missing))


def not_simulated(model: ModelSpec, missing: list[str]) -> str:
    """That a model cannot be simulated for the layers ``missing``, with what is possible."""
    return (
        f"{model.name} ({model.model_type}) cannot be simulated yet; not modelled in the engine: "
        f"{', '.join(missing)}; the sizes of its weights: servesim kv --matrix"
    )


def missing_kinds(model: ModelLayers) -> list[str]:
    """Kinds of layers whose cache is not modelled, each with how many layers have it; empty: none."""
    count = sum(isinstance(layer.attention, CompressedAttention) for layer in model.layers)
    kind = "attention over a window and compressed tokens, with pages of several sizes"
    return [f"{kind} ({count} of {len(model.layers)} layers)"] if count else []
