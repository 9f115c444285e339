"""Which formula a layer of an architecture file takes: by its usual name, else by its class in the engine.

So a new architecture needs no code as long as its layers are of the standard kinds, whatever it calls them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import numpy as np

from servesim.errors import NotSupportedError
from servesim.profiler.roofline.formulas import ACTIVATION_BYTES, gemm_us, moved_us

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.roofline.formulas import Accelerator
    from servesim.profiler.shapes import RankShapes
    from servesim.specs.architecture import LayerEntry

Kind = Literal[
    "embedding",
    "norm",
    "head_norm",
    "rotary",
    "activation",
    "plain_activation",
    "qkv_proj",
    "o_proj",
    "gate_up_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "sampler",
]
BY_NAME: dict[str, Kind] = {
    "embedding": "embedding",
    "layernorm": "norm",
    "final_layernorm": "norm",
    "qk_norm": "head_norm",
    "rotary_emb": "rotary",
    "act_fn": "activation",
    "qkv_proj": "qkv_proj",
    "o_proj": "o_proj",
    "gate_up_proj": "gate_up_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "lm_head": "lm_head",
    "sampler": "sampler",
}
BY_CLASS: tuple[tuple[str, Kind], ...] = (
    (r"Rotary", "rotary"),
    (r"Embedding$", "embedding"),
    (r"Norm", "norm"),
    (r"AndMul$", "activation"),
    (r"(GELU|Gelu|SiLU|ReLU)", "plain_activation"),
    (r"^QKV.*Linear$", "qkv_proj"),
    (r"^MergedColumn.*Linear$", "gate_up_proj"),
    (r"^Column.*Linear$", "up_proj"),
    (r"^(LogitsProcessor|ParallelLMHead)$", "lm_head"),
    (r"Sampler$", "sampler"),
)
SAMPLER_START_US = 24.0
"""A dozen small kernels: arg-max over the vocabulary and bookkeeping."""
HEAD_NORM_US = 0.058
"""One unit's time to normalise one head of one token: so short a row is bound by issue, not by bytes."""


def layer_kind(name: str, entry: LayerEntry, where: str) -> Kind:
    """What a catalog entry computes.

    Raises:
        NotSupportedError: neither its name nor its class is of a standard kind; ``where`` names the file.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if re.search(r"^RowParallel.*Linear$", entry.class_name):
        return "o_proj" if "Attention" in (entry.within or "") else "down_proj"
    for pattern, kind in BY_CLASS:
        if re.search(pattern, entry.class_name):
            return kind
    raise NotSupportedError(
        f"{where}: catalog: layer {name!r} of class {entry.class_name} is of no kind that the roofline "
        f"source knows; known layers: {', '.join(BY_NAME)}, and vLLM's norm, linear, activation and "
        "embedding classes"
    )


def layer_us(
    kind: Kind, acc: Accelerator, shapes: RankShapes, count: NDArray[np.int64], dtype: str
) -> NDArray[np.float64]:
    """Time of one layer over so many tokens or sequences; activations are 16 bit."""
    wide = count.astype(np.float64)
    if kind == "up_proj":
        return gemm_us(acc, wide, shapes.intermediate, shapes.hidden, dtype)
    if kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        return gemm_us(acc, wide, *shapes.gemm(kind), dtype)
    if kind == "lm_head":  # a quantised checkpoint keeps its head in 16 bit
        return gemm_us(acc, wide, *shapes.gemm(kind), "float32" if dtype == "float32" else "bfloat16")
    heads = shapes.heads + shapes.kv_heads
    if kind == "head_norm":
        start_us = acc.efficiency.moved_start_us
        return np.asarray(start_us + wide * heads * HEAD_NORM_US / acc.units)
    elements = {  # read and written per token
        "embedding": 2 * shapes.hidden,
        "norm": 4 * shapes.hidden,  # with the residual
        "rotary": 2 * heads * shapes.head_dim,
        "activation": 3 * shapes.intermediate,
        "plain_activation": 2 * shapes.intermediate,
        "sampler": 3 * shapes.full_vocab,
    }[kind]
    start = SAMPLER_START_US if kind == "sampler" else None
    return moved_us(acc, wide * elements * ACTIVATION_BYTES, start)
