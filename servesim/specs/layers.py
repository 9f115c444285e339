"""A model as the list of layers that it is: what each of them computes, keeps and weighs.

Read from a Hugging Face config by :func:`servesim.specs.families.read_layers`. Everything that asks how large
a model is, or what its cache holds, reads this list: parameters and bytes (:mod:`servesim.specs.weights`),
pages of the KV cache (:mod:`servesim.memory.kv_layers`).
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Literal

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.formats import WeightFormats

Split = Literal["whole", "rows", "columns", "kv_heads", "vocabulary"]
"""How tensor-parallel ranks share a parameter: not at all, by output rows, by input columns, by rows of whole
KV heads (one at least on every rank), by rows of the vocabulary (padded to a multiple of 64 first)."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter, or ``copies`` alike: one per expert."""

    name: str
    """As in the checkpoint, below its layer: ``self_attn.q_proj``; a bias and a norm have names of their own.
    """
    rows: int
    columns: int = 1
    split: Split = "whole"
    unit: int = 1
    """``kv_heads``: rows of one head."""
    copies: int = 1
    """Experts; expert parallelism gives each rank its share of them, whole."""
    matrix: bool = False
    """A linear layer's weight, which a quantised checkpoint may hold in another format."""
    itemsize: int | None = None
    """Bytes of an element, where that is not the checkpoint's 16-bit format."""
    upcast: bool = False
    """The engine holds it in 16 bit whatever the checkpoint's format."""
    stored: bool = True
    """In the checkpoint; False: a copy that the engine makes for itself."""

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.copies


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over keys and values per head: grouped-query, in full or over a window."""

    kind: Literal["full", "sliding", "chunked"]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    """Of one head's values; the keys' ``head_dim`` as a rule."""
    reach: int | None = None
    """Tokens that a ``sliding`` layer sees back, or the length of a ``chunked`` layer's chunk."""
    shared: bool = False
    """It reads the cache of an earlier layer and keeps none of its own."""
    index_dim: int = 0
    """Width of one key that a sparse layer's indexer keeps per token beside its own; 0: not sparse."""
    is_causal: bool = True
    kv_format: str | None = None
    """Of its cache, where that is not the one of the instance (:mod:`servesim.specs.kv_skip`)."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA): one compressed vector a token, the same for all heads."""

    heads: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int | None
    index_heads: int = 0
    """Of a sparse layer's indexer; 0: every token is attended."""
    index_dim: int = 0
    """Width of the key that the indexer keeps per token; 0: none, another layer's choice is used."""
    index_top_k: int = 0
    kv_format: str | None = None
    """As in :class:`Attention`; of the vectors, not of an indexer's keys."""

    @property
    def kind(self) -> Literal["mla", "sparse_mla"]:
        return "sparse_mla" if self.index_top_k else "mla"


@dataclass(frozen=True, slots=True)
class CompressedAttention:
    """Latent attention over a window of recent tokens and, beyond it, over tokens compressed ``ratio`` to one
    (DeepSeek V4)."""

    heads: int
    head_dim: int
    rope_dim: int
    window: int
    ratio: int
    """Tokens of one compressed vector: 0 (none, the window alone), 4 (with an indexer) or 128."""
    index_dim: int = 0
    index_heads: int = 0
    index_top_k: int = 0
    kind: Literal["compressed"] = "compressed"


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Linear attention: a state of fixed size per sequence in place of a cache that grows.

    The state is ``channels x (kernel - 1)`` inputs of a short convolution and ``heads x state_rows x
    state_columns`` of memory; ranks share channels and heads.
    """

    kind: Literal["gated_delta_net", "kimi_delta", "mamba2", "mamba1", "short_conv"]
    channels: int
    kernel: int
    heads: int = 0
    state_rows: int = 0
    state_columns: int = 0
    groups: int = 0
    """``mamba2``: groups of B and C, replicated where ranks outnumber them."""
    memory_itemsize: int = 4
    """Bytes of an element of the memory, as the engine keeps it unless told otherwise."""
    beside: Attention | None = None
    """Attention that runs beside it in the same layer (Falcon-H1)."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """A dense feed-forward network."""

    width: int
    gated: bool = True
    kind: Literal["dense"] = "dense"


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts."""

    count: int
    top_k: int
    width: int
    """Of one routed expert."""
    gated: bool = True
    shared_width: int = 0
    """Of all shared experts together, which every token passes; 0: none."""
    shared_gate: bool = False
    """A learned factor scales the shared experts' output."""
    latent: int = 0
    """Width that tokens are projected to before the routed experts; 0: the hidden size itself."""
    dense_width: int = 0
    """A dense network that runs beside the experts in the same layer (Gemma 4); 0: none."""
    kind: Literal["experts"] = "experts"


AnyAttention = Attention | LatentAttention | CompressedAttention | Recurrent
AnyMlp = Mlp | Experts


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the stack; a hybrid model's may hold attention alone or an MLP alone."""

    attention: AnyAttention | None
    mlp: AnyMlp | None
    tensors: tuple[Tensor, ...]
    prefix: str
    """Of the names of its tensors in the checkpoint: ``layers.7.``"""


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """A whole model. Counts are before any sharding."""

    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    formats: WeightFormats
    embedding: tuple[Tensor, ...]
    """Before the first layer."""
    head: tuple[Tensor, ...]
    """After the last layer; without the output matrix where that is the embedding."""
    tied: bool
    """Whether the output matrix is the embedding."""
    vision: tuple[Tensor, ...] = ()
    """Tower and projector of images (and audio) beside the text model: weights alone, no step runs them."""
    vision_is_split: bool = True
    mtp: tuple[Layer, ...] = ()
    """Layers that draft further tokens; the engine loads them for speculative decoding only."""
    kv_format: str | None = None
    """Format of the KV cache that the checkpoint asks for (``fp8``); None: that of the activations."""
    encoder: tuple[Tensor, ...] = field(default=())

    def parameters(self, *, mtp: bool = False, vision: bool = True) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(tensor.parameters for _, tensor in self.tensors(mtp=mtp, vision=vision) if tensor.stored)

    def tensors(self, *, mtp: bool = False, vision: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(full name, parameter) of the whole model in running order."""
        for tensor in self.embedding:
            yield tensor.name, tensor
        for layer in (*self.layers, *(self.mtp if mtp else ())):
            for tensor in layer.tensors:
                yield layer.prefix + tensor.name, tensor
        for tensor in (*self.head, *(self.vision if vision else ())):
            yield tensor.name, tensor
