"""What tells the kernel times of one model from another's: its shape. A name is a label.

Two models of one shape run the same kernels whatever they are called, and two that share a name need not.
How many blocks a model has is no part of it: tables hold the time of one block.
"""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from math import gcd
from typing import TYPE_CHECKING, Any

from servesim.specs.block_layers import beyond_files
from servesim.specs.kv_skip import wide_layers

if TYPE_CHECKING:
    from servesim.specs.layers import ModelLayers
    from servesim.specs.model import ModelSpec

SHAPE_FIELDS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)
"""Fields of :class:`~servesim.specs.model.ModelSpec` that kernel times depend on."""


def shape_of(model: ModelSpec) -> dict[str, Any]:
    """Field -> value of everything that kernel times depend on; what a model has not is left out.

    ``sliding_share`` is the share of blocks with a window as a fraction in lowest terms, since the attention
    table holds the average block.
    """
    shape = {name: value for name in SHAPE_FIELDS if (value := getattr(model, name))}
    if sliding := model.num_sliding_layers:
        common = gcd(sliding, model.num_hidden_layers)
        shape["sliding_window"] = model.sliding_window
        shape["sliding_share"] = f"{sliding // common}/{model.num_hidden_layers // common}"
    if wide := wide_layers(model.layers):
        shape["kv_16_bit"] = ",".join(map(str, wide))
    if beyond_files(model.layers):
        shape["layers"] = digest(_layer_kinds(model.layers))
    if model.layers.formats.method is not None:
        shape["weights"] = model.layers.formats.label or model.layers.formats.method
    return shape


def _layer_kinds(layers: ModelLayers) -> list[list[str]]:
    """Every different layer with the share of layers that it is, for what no single field says."""
    counts: dict[str, int] = {}
    for layer in layers.layers:
        matrices = [(t.name, t.rows, t.columns, t.split, t.unit, t.copies) for t in layer.tensors if t.matrix]
        # a field that is not set is not told, as shapes of before know none
        text = repr((layer.attention, layer.mlp, matrices)).replace(", kv_format=None", "")
        counts[text] = counts.get(text, 0) + 1
    return [[text, str(Fraction(count, len(layers.layers)))] for text, count in sorted(counts.items())]


def digest(content: object, length: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of ``content`` as JSON, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def bundle_label(model: ModelSpec) -> str:
    """The folder that a model's bundles are filed under.

    ``<org>/<name>`` for a model given by name, and for a path to the shape that is known by that name; any
    other path has the digest of its shape behind its name, as two folders called ``base`` may hold different
    models.
    """
    if not model.path or _is_known(model):
        return model.name
    return f"{model.name}@{digest(shape_of(model), 8)}"


def _is_known(model: ModelSpec) -> bool:
    """Whether a model given by a path is the one that its name stands for."""
    from servesim.errors import ServingError
    from servesim.specs import paths
    from servesim.specs.model import model_from_config
    from servesim.specs.reading import read_json_object

    try:
        file = paths.find(f"configs/model/{model.name}.json")
        known = model_from_config(read_json_object(file), model.name, str(file))
    except (ServingError, OSError, ValueError):
        return False
    return shape_of(known) == shape_of(model)
