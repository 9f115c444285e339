"""What a rank runs layer by layer, read from a model's list of layers: matrix products, what only moves
bytes, and groups of attention that share their kernel times.

A family without a file in ``profiler/models`` gets its architecture from here (:func:`derived_architecture`).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from servesim.errors import InputError, MissingFileError, NotSupportedError
from servesim.slotted import dataclass
from servesim.specs.architecture import Architecture, Catalog, LayerEntry, Sequence, load_architecture
from servesim.specs.layers import Attention, CompressedAttention, Experts, LatentAttention, Recurrent
from servesim.specs.weights import rank_shape

if TYPE_CHECKING:
    from servesim.specs.formats import WeightFormat, WeightFormats
    from servesim.specs.layers import AnyAttention, Layer, ModelLayers, Tensor
    from servesim.specs.model import ModelSpec

Kind = Literal["norm", "head_norm", "gated_norm", "rotary", "activation", "plain_activation", "hyper", "gemm"]
ATTENTION, MOE = "attention", "moe"
ATTENTION_KINDS = "attention_kinds"
"""Key of a bundle's meta.yaml: the tables of attention where there are several, each with the share of blocks
that it is of."""
_TOGETHER = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""Parameters that the engine multiplies with in one product -> its name."""
_ONCE = ("embedding", "final_layernorm")
_HEADS = ("lm_head", "sampler")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A layer of a block whose time depends on the tokens of the step alone."""

    name: str
    kind: Kind
    tensors: tuple[Tensor, ...] = ()
    """Of a product: the matrices that it multiplies with at once."""
    module: str = ""
    """Full name of the first of them, which tells its format."""
    width: int = 0
    """Elements of one token before they are split over ranks, of what is no product; of a norm of heads the
    heads; of hyper-connections those of all streams, which every rank has."""

    def gemm(self, tp: int) -> tuple[int, int]:
        """Output and inner size (n, k) on one of ``tp`` ranks."""
        shapes = [rank_shape(tensor, tp) for tensor in self.tensors]
        return sum(rows for _, rows, _ in shapes), shapes[0][2]

    def format(self, formats: WeightFormats) -> WeightFormat:
        """How its matrices are stored."""
        return formats.of(self.module)


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Layers whose attention costs the same."""

    label: str
    """Stem of their table: ``attention``, or ``attention_sliding`` beside another."""
    attention: AnyAttention
    blocks: tuple[int, ...]
    prefix: str
    """Of the first one's tensors in the checkpoint."""
    tensors: tuple[Tensor, ...]
    """Of the attention of the first one."""

    def share(self, of: int) -> Fraction:
        """Of so many blocks."""
        return Fraction(len(self.blocks), of)


@dataclass(frozen=True, slots=True)
class BlockLayers:
    """The layers of every block in running order, attention and experts among them."""

    blocks: tuple[tuple[str, ...], ...]
    dense: dict[str, DenseLayer]


def attentions_of(layer: Layer) -> list[AnyAttention]:
    """What a layer attends with: nothing, one, or a state and attention side by side."""
    a = layer.attention
    if a is None:
        return []
    if isinstance(a, Recurrent) and a.beside is not None:
        return [replace(a, beside=None), replace(a.beside, shared=False)]
    return [replace(a, shared=False) if isinstance(a, Attention) else a]


def attention_tensors(layer: Layer) -> tuple[Tensor, ...]:
    """The parameters of its attention."""
    return tuple(tensor for tensor in layer.tensors if not _is_mlp(tensor, layer) and "." in tensor.name)


_FIRST = ("full", "mla", "sparse_mla", "compressed", "chunked", "sliding")


@lru_cache(maxsize=64)
def attention_groups(model: ModelLayers) -> tuple[AttentionGroup, ...]:
    """The groups of a model; the first one, whose table is ``attention.csv``, keeps most of the context."""
    found: dict[AnyAttention, list[int]] = {}
    for index, layer in enumerate(model.layers):
        for attention in attentions_of(layer):
            found.setdefault(attention, []).append(index)
    order = sorted(found, key=lambda a: (*_rank(a), found[a]))
    groups: list[AttentionGroup] = []
    for attention in order:
        label = ATTENTION
        if groups:
            name = label = f"{ATTENTION}_{attention.kind}"
            number = 1
            while label in {group.label for group in groups}:
                number += 1
                label = f"{name}_{number}"
        first = model.layers[found[attention][0]]
        blocks = tuple(found[attention])
        groups.append(AttentionGroup(label, attention, blocks, first.prefix, attention_tensors(first)))
    return tuple(groups)


def _rank(attention: AnyAttention) -> tuple[int, str, bool]:
    """What keeps most of the context comes first, and of it what has the instance's own KV format."""
    kind = _FIRST.index(attention.kind) if attention.kind in _FIRST else len(_FIRST)
    window_alone = isinstance(attention, CompressedAttention) and not attention.ratio
    return kind, getattr(attention, "kv_format", None) or "", window_alone


def is_module(attention: AnyAttention | None) -> bool:
    """Whether a kind's times hold its matrix products too: latent attention and what is built like it."""
    return isinstance(attention, LatentAttention | CompressedAttention) or (
        isinstance(attention, Attention) and attention.index_dim > 0
    )


@lru_cache(maxsize=64)
def block_layers(model: ModelLayers) -> BlockLayers:
    """The layers of every block; one that occurs in several sizes or formats has a number behind its name."""
    names: dict[str, list[object]] = {}
    dense: dict[str, DenseLayer] = {}
    blocks = []
    seen: dict[Layer, tuple[str, ...]] = {}
    for layer in model.layers:
        like = replace(layer, prefix="")
        if like in seen and not model.formats.rules:
            blocks.append(seen[like])
            continue
        listed = []
        for each in _layers_of(layer, model.hidden_size):
            if isinstance(each, str):
                listed.append(each)
                continue
            key = _key(each, model.formats)
            known = names.setdefault(each.name, [])
            if key not in known:
                known.append(key)
            number = known.index(key)
            name = each.name if not number else f"{each.name}_{number + 1}"
            dense.setdefault(name, replace(each, name=name))
            listed.append(name)
        seen[like] = tuple(listed)
        blocks.append(seen[like])
    return BlockLayers(tuple(blocks), dense)


def _key(layer: DenseLayer, formats: WeightFormats) -> object:
    shapes = tuple((t.rows, t.columns, t.split, t.unit) for t in layer.tensors)
    return shapes, layer.format(formats) if layer.tensors else None, layer.kind, layer.width


def _is_mlp(tensor: Tensor, layer: Layer) -> bool:
    """Whether a parameter is of the layer's MLP or experts."""
    words = tensor.name.removesuffix(".bias").split(".")
    if layer.attention is None:
        return True
    inside = ("mlp", "feed_forward", "ffn", "experts", "shared_experts", "shared_expert", "router")
    return any(word in inside for word in words) or words[-1] in ("gate_proj", "up_proj", "down_proj")


def _layers_of(layer: Layer, hidden: int) -> list[DenseLayer | str]:
    """One block in running order; norms first, since their place costs nothing."""
    found: list[DenseLayer | str] = []
    for tensor in layer.tensors:
        if "." not in tensor.name and not tensor.matrix and tensor.rows == hidden and tensor.columns == 1:
            found.append(DenseLayer("layernorm", "norm", width=hidden))
    if streams := [tensor.columns for tensor in layer.tensors if tensor.name == "hc_attn_fn"]:
        found.append(DenseLayer("hyper_connections", "hyper", width=streams[0]))
    attention = [tensor for tensor in layer.tensors if tensor.matrix and not _is_mlp(tensor, layer)]
    kinds = attentions_of(layer)
    if kinds and is_module(kinds[0]):
        found.append(ATTENTION)
    elif kinds:
        products = _products(layer, attention, "")
        last = [each for each in products if each.name.startswith(("o_proj", "out_proj"))]
        found += [each for each in products if each not in last]
        found += _beside_attention(layer, kinds)
        found += [ATTENTION, *last]
    mlp = layer.mlp
    if mlp is None:
        return found
    inner = [t for t in layer.tensors if t.matrix and t.copies == 1 and _is_mlp(t, layer)]
    if isinstance(mlp, Experts):
        shared = [tensor for tensor in inner if "shared" in tensor.name]
        found += _mlp(layer, [tensor for tensor in inner if tensor not in shared], mlp.gated, "")
        found += [MOE, *_mlp(layer, shared, mlp.gated, "shared_")]
    else:
        found += _mlp(layer, inner, mlp.gated, "")
    return found


def _beside_attention(layer: Layer, kinds: list[AnyAttention]) -> list[DenseLayer]:
    """What moves bytes around attention: norms of heads, rotary embedding, the gated norm of a state."""
    found = []
    for attention in kinds:
        if isinstance(attention, Attention):
            names = {tensor.name.rsplit(".", 1)[-1] for tensor in layer.tensors}
            heads = attention.heads + attention.kv_heads
            if names & {"q_norm", "k_norm"}:
                found.append(DenseLayer("qk_norm", "head_norm", width=heads))
            found.append(DenseLayer("rotary_emb", "rotary", width=heads * attention.head_dim))
        elif isinstance(attention, Recurrent) and attention.heads:
            width = attention.heads * attention.state_columns
            if attention.kind == "mamba2":
                width = attention.heads * attention.state_rows
            found.append(DenseLayer("gated_norm", "gated_norm", width=width))
    return found


def _products(layer: Layer, tensors: list[Tensor], prefix: str) -> list[DenseLayer]:
    parts: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        leaf = tensor.name.rsplit(".", 1)[-1]
        parts.setdefault(prefix + _TOGETHER.get(leaf, leaf), []).append(tensor)
    return [
        DenseLayer(name, "gemm", tuple(some), layer.prefix + some[0].name) for name, some in parts.items()
    ]


def _mlp(layer: Layer, tensors: list[Tensor], gated: bool, prefix: str) -> list[DenseLayer]:
    """The products of a feed-forward network with its activation between them."""
    together = []
    for tensor in tensors:
        if gated and tensor.name.rsplit(".", 1)[-1] == "up_proj":
            continue
        together.append(tensor)
    products = _products(layer, together, prefix)
    found = []
    for each in products:
        if gated and each.name == f"{prefix}gate_up_proj":
            ups = [t for t in tensors if t.name.rsplit(".", 1)[-1] == "up_proj"]
            each = replace(each, tensors=(*each.tensors, *ups))
        found.append(each)
        if each.name in (f"{prefix}gate_up_proj", f"{prefix}up_proj"):
            width = each.tensors[0].rows
            kind: Kind = "activation" if gated else "plain_activation"
            found.append(DenseLayer(f"{prefix}act_fn", kind, width=width))
    return found


def derived_architecture(model: ModelLayers) -> Architecture:
    """The layers of a model's steps where no file describes them.

    Raises:
        NotSupportedError: a block has nothing to run.
    """
    layers = block_layers(model)
    if not all(layers.blocks):
        raise NotSupportedError(f"{model.model_type}: a layer has neither attention nor an MLP")
    classes = {"gemm": "Linear", "norm": "RMSNorm", "head_norm": "RMSNorm", "gated_norm": "RMSNormGated"}
    dense = {name: _entry(classes.get(layer.kind, layer.kind)) for name, layer in layers.dense.items()}
    dense |= {"embedding": _entry("VocabParallelEmbedding"), "final_layernorm": _entry("RMSNorm")}
    names = {name for block in layers.blocks for name in block}
    return Architecture(
        model_type=model.model_type,
        sequence=Sequence(
            prologue=("embedding",), pre_attn=(), post_attn=(), head=("final_layernorm", *_HEADS)
        ),
        catalog=Catalog(
            dense=dense,
            per_sequence={"lm_head": _entry("LogitsProcessor"), "sampler": _entry("Sampler")},
            attention={ATTENTION: _entry("Attention")},
            moe={MOE: _entry("FusedMoE")} if MOE in names else {},
        ),
        blocks=layers.blocks,
    )


def _entry(name: str) -> LayerEntry:
    return LayerEntry.model_validate({"class": name})


def all_reduces(layer: Layer) -> int:
    """Of the hidden states over tensor-parallel ranks, in one block."""
    return (layer.attention is not None) + (layer.mlp is not None)


def experts_of(model: ModelLayers) -> Experts | None:
    """The experts of its layers; None: it has none.

    Raises:
        NotSupportedError: layers differ in them.
    """
    found = {layer.mlp for layer in model.layers if isinstance(layer.mlp, Experts)}
    if len(found) > 1:
        raise NotSupportedError(f"{model.model_type}: layers with different experts are not modelled")
    return next(iter(found), None)


def expert_format(model: ModelLayers, formats: WeightFormats) -> WeightFormat | None:
    """How the experts are stored, by the first layer that has any."""
    for layer in model.layers:
        for tensor in layer.tensors:
            if tensor.matrix and tensor.copies > 1:
                return formats.of(layer.prefix + tensor.name)
    return None


def beyond_files(model: ModelLayers) -> list[str]:
    """What of a model no file of ``profiler/models`` can describe, each once; empty: nothing."""
    found = []
    for layer in model.layers:
        for a in attentions_of(layer):
            if not isinstance(a, Attention) or a.kind == "chunked" or a.index_dim:
                found.append(f"{a.kind.replace('_', ' ')} attention")
        if layer.attention is None or layer.mlp is None:
            found.append("blocks without attention or MLP")
        m = layer.mlp
        if isinstance(m, Experts) and (m.shared_width or m.latent or m.dense_width):
            found.append("shared experts, or others beside the routed ones")
        if m is not None and not m.gated:
            found.append("an MLP without a gate")
    shapes = {
        (a.heads, a.kv_heads, a.head_dim)
        for layer in model.layers
        for a in attentions_of(layer)
        if isinstance(a, Attention)
    }
    if len(shapes) > 1:
        found.append("layers with different heads")
    return list(dict.fromkeys(found))


def architecture_of(model: ModelSpec) -> Architecture:
    """The layers of a model's steps: as a file of ``profiler/models`` has them, else as its config does.

    Raises:
        InputError: a file describes the family that leaves out what this model has, or is wrong.
        MissingFileError: the family is neither described by a file nor read from configs.
    """
    from servesim.specs.families import families

    beyond = beyond_files(model.layers)
    try:
        described = load_architecture(model.model_type)
    except MissingFileError:
        if model.layers.model_type not in families():
            raise
        return derived_architecture(model.layers)
    if beyond:
        raise InputError(
            f"profiler/models/{model.model_type}.yaml: cannot describe {model.name}, which has "
            f"{', '.join(beyond)}; remove the file, its layers are then read from its config.json"
        )
    return described
