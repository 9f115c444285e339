"""Which models can be simulated: those whose steps have kernel times.

The others are refused by name before anything runs; `servesim kv` tells what their caches hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import MissingFileError, ServingError
from servesim.specs.block_layers import architecture_of, experts_of

if TYPE_CHECKING:
    from servesim.specs.model import ModelSpec


def why_not_simulated(model: ModelSpec) -> str | None:
    """What keeps a model's steps from having a time, in a few words; None: nothing."""
    try:
        architecture_of(model)
        experts_of(model.layers)
    except MissingFileError:
        return f"no file profiler/models/{model.model_type}.yaml describes its steps"
    except ServingError as error:
        return str(error).splitlines()[0]
    return None
