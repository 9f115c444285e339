"""Which models can be simulated: those whose every kind of layer the engine and its kernel times know.

Weights and caches of the other kinds are known (:mod:`servesim.specs.layers`), but not yet how the engine
frees their caches or what their steps cost. They are refused by name: a state is
not counted as a cache that grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import MissingFileError, NotSupportedError, ServingError
from servesim.specs.block_layers import architecture_of, experts_of
from servesim.specs.layers import (
    Attention,
    CompressedAttention,
    Experts,
    LatentAttention,
    Mlp,
    Recurrent,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.layers import AnyAttention, AnyMlp, ModelLayers
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
        f"{', '.join(missing)}; what fits in its KV cache: servesim kv {model.path or model.name} "
        "--hardware NAME"
    )


def missing_kinds(model: ModelLayers) -> list[str]:
    """What cannot be simulated yet, each with how many layers have it; empty: nothing."""
    counts: dict[str, int] = {}
    for layer in model.layers:
        for kind in (*_of_attention(layer.attention), *_of_mlp(layer.mlp)):
            counts[kind] = counts.get(kind, 0) + 1
    shapes = {
        (a.heads, a.kv_heads, a.head_dim)
        for layer in model.layers
        if isinstance(a := layer.attention, Attention)
    }
    if len(shapes) > 1:
        counts["attention of another shape than in other layers"] = len(model.layers)
    return [f"{kind} ({count} of {len(model.layers)} layers)" for kind, count in counts.items()]


def _of_attention(a: AnyAttention | None) -> Iterator[str]:
    if a is None:
        yield "no attention"
    elif isinstance(a, Recurrent):
        yield f"a state in place of a KV cache ({a.kind})"
    elif isinstance(a, LatentAttention):
        yield "latent attention with an indexer (sparse MLA)" if a.index_top_k else "latent attention (MLA)"
    elif isinstance(a, CompressedAttention):
        yield "attention over a window and compressed tokens"
    else:
        if a.kind == "chunked":
            yield f"attention in chunks of {a.reach} tokens"
        if a.shared:
            yield "attention that reads another layer's KV cache"
        if a.index_dim:
            yield "attention with an indexer"


def _of_mlp(m: AnyMlp | None) -> Iterator[str]:
    if m is None:
        yield "no MLP"
    elif isinstance(m, Experts):
        if m.shared_width:
            yield "a shared expert"
        if m.latent:
            yield "experts on a latent vector"
        if m.dense_width:
            yield "a dense network beside the experts"
    if isinstance(m, Mlp | Experts) and not m.gated:
        yield "an MLP without a gate"
