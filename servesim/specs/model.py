"""A model's shape: the fields of a Hugging Face ``config.json`` that decide sizes and kernel times."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from servesim.errors import InputError, MissingFileError, NotSupportedError
from servesim.specs import paths
from servesim.specs.annotated import Field, InstanceOf
from servesim.specs.checked import field_validator, model_validator
from servesim.specs.dtypes import dtype_bytes
from servesim.specs.families import families, model_type_of, read_layers
from servesim.specs.families.generic import refuse_other_layers, standard_block
from servesim.specs.families.reading import MAX_LAYERS, Fields
from servesim.specs.formats import format_of_dtype
from servesim.specs.layers import Attention, Experts, ModelLayers, Recurrent
from servesim.specs.reading import read_json_object
from servesim.specs.validation import Spec, list_as_tuple, nearest, one_slip, validated

if TYPE_CHECKING:
    from collections.abc import Mapping

Size = Annotated[int, Field(ge=1, le=100_000_000)]
OptionalCount = Annotated[int, Field(ge=0, le=1_000_000)]
LayerType = Literal["full_attention", "sliding_attention"]

_ALIASES = {
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_shared_expert": "num_shared_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "experts_per_token": "num_experts_per_tok",
    "top_k_experts": "num_experts_per_tok",
    "dtype": "torch_dtype",
}
"""Other models' names for the same fact."""
_LISTED = 12
"""Most known models that a message names."""
_LABELS = frozenset({"name", "path", "layers"})
"""Fields that no config gives: where a model was found, and what has been read from it."""
_TORCH_DTYPES = ("float16", "bfloat16", "float32", "fp8", "int8")


class ModelSpec(Spec):
    """The shape of one model. Counts are of the whole model, before any sharding."""

    name: Annotated[str, Field(min_length=1)]
    """``<org>/<name>``, or the last part of the path a model was given by: a label for people."""
    path: str = Field(default="", exclude=True, repr=False)
    """What the user gave where that is a path and no name; commands that are printed repeat it."""
    layers: Annotated[ModelLayers, InstanceOf()] = Field(default=None, exclude=True, repr=False)
    """What it is a list of: sizes of weights and KV cache come from here."""
    model_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    """Names the architecture file ``profiler/models/<model_type>.yaml``."""
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    """Format the weights are published in; the default of ``--dtype``."""
    quantization: str | None = None
    """``quant_method`` of a quantised checkpoint."""
    weight_block: tuple[Size, Size] | None = None
    """Rows and columns of a weight that share a scale in a checkpoint quantised in blocks."""

    num_experts: OptionalCount = 0
    """Routed experts of a layer; 0: the model is dense."""
    num_experts_per_tok: OptionalCount = 0
    moe_intermediate_size: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Width of one expert; models that name only ``intermediate_size`` mean this one by it."""
    num_shared_experts: OptionalCount = 0
    first_k_dense_replace: OptionalCount = 0
    """So many first layers have a dense MLP in place of experts."""
    decoder_sparse_step: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    """Every so many layers one has experts."""
    mlp_only_layers: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = ()
    """Layers that have a dense MLP although their neighbours have experts."""

    sliding_window: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Tokens a sliding-window layer looks back; None: every layer sees the whole context."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which layers slide, one entry a layer; None: all of them when there is a window."""

    kv_lora_rank: Size | None = None
    """Width of the compressed KV of multi-head latent attention (MLA); None: ordinary attention."""
    q_lora_rank: Size | None = None
    qk_rope_head_dim: Size | None = None
    qk_nope_head_dim: Size | None = None
    v_head_dim: Size | None = None

    @field_validator("layer_types", "mlp_only_layers", mode="before")
    @classmethod
    def _lists_as_tuples(cls, value: object) -> object:
        return list_as_tuple(value)

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} is not allowed; must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: {len(self.layer_types)} entries are not allowed; must be num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        if self.layer_types and "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window: is missing; layer_types names sliding_attention layers")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is not allowed; must be 1 to num_experts "
                f"({self.num_experts})"
            )
        if self.num_experts and not self.moe_intermediate_size:
            raise ValueError("moe_intermediate_size: is missing; required beside num_experts")
        if self.kv_lora_rank and not self.qk_rope_head_dim:
            raise ValueError("qk_rope_head_dim: is missing; required beside kv_lora_rank")
        return self

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    def kv_word(self, given: str) -> str:
        """``--kv-cache-dtype`` of this model: ``auto`` is what its checkpoint asks for, if it does."""
        return self.layers.kv_format or given if given == "auto" else given

    def has_experts(self, layer: int) -> bool:
        """Whether transformer block ``layer`` (from 0) routes to experts instead of running a dense MLP."""
        return isinstance(self.layers.layers[layer].mlp, Experts)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.has_experts(layer) for layer in range(self.num_hidden_layers))

    @property
    def num_sliding_layers(self) -> int:
        """Blocks whose attention, and KV cache, reach back at most :attr:`sliding_window` tokens."""
        return sum(
            layer.attention is not None and layer.attention.kind == "sliding" for layer in self.layers.layers
        )

    def stored_as(self, dtype: str) -> ModelLayers:
        """The layers with their weights in ``dtype``: as published where that is what ``dtype`` stands for.

        A 16-bit ``dtype`` is the activations' where a checkpoint is quantised to 4 bits.
        """
        own = self.layers.formats
        if dtype == self.torch_dtype or (
            own.method is not None and dtype_bytes(dtype) == 2 and not self.is_8bit
        ):
            return self.layers
        return replace(self.layers, formats=format_of_dtype(dtype))

    @property
    def is_8bit(self) -> bool:
        return self.torch_dtype in ("fp8", "int8")


def load_model(name_or_path: str | Path) -> ModelSpec:
    """The model of a name (``configs/model/<org>/<name>.json``), of a ``config.json`` or its folder.

    Raises:
        InputError: no such model (the nearest known one is suggested), or a field is missing or wrong.
    """
    given = str(name_or_path)
    file, name, is_path = _locate(given)
    # Python writes Infinity where a published config means "no limit"; a field that counts is checked below.
    config = read_json_object(file, finite=False)
    beside = file.parent / "hf_quant_config.json"
    sidecar = read_json_object(beside) if is_path and beside.is_file() else None
    return model_from_config(config, name, str(file), given if is_path else "", sidecar)


def model_from_config(
    config: Mapping[str, Any],
    name: str,
    source: str,
    path: str = "",
    sidecar: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """The model that the fields of a Hugging Face config describe; fields without influence are passed over.

    ``path`` is what the user gave in place of a name, if he did; ``sidecar``: ``hf_quant_config.json``.

    Raises:
        InputError: a field is missing or wrong; ``source`` names the file in the message.
    """
    whole = config
    if "hidden_size" not in config and isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}  # multimodal: the language model's own section
    fields = {"name": name, "path": path}
    for key, value in config.items():
        field = _ALIASES.get(key, key)
        if key in _LABELS:  # a file does not say what it is called here
            continue
        # null is how a config says "not used"; a field's own name wins over its alias.
        if value is not None and field in ModelSpec.model_fields and (field == key or field not in config):
            fields[field] = value
    _refuse_misspelt(config, source)
    known, layers = model_type_of(whole) in families(), None
    if not known:
        refuse_other_layers(Fields(config, source))
    elif any(name not in fields for name in _REQUIRED):
        layers = read_layers(whole, source, sidecar)  # the library's defaults stand in for what is left out
        for name, value in _as_fields(layers).items():
            fields.setdefault(name, value)
    _fill_defaults(config, fields, source)
    model = validated(ModelSpec, fields, source)
    layers = layers or read_layers(whole, source, sidecar, standard_block)
    return validated(ModelSpec, {**fields, **_seen_in(layers, model), "layers": layers}, source)


_REQUIRED = (
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields that some published configs leave to the library."""


def _as_fields(layers: ModelLayers) -> dict[str, Any]:
    """The fields of a config that a list of layers stands for."""
    kept = [layer.attention for layer in layers.layers if not isinstance(layer.attention, Recurrent | None)]
    first = kept[0] if kept else None
    found = {
        "num_hidden_layers": len(layers.layers),
        "vocab_size": layers.vocab_size,
        "max_position_embeddings": layers.max_position_embeddings,
    }
    if first is not None:
        found["num_attention_heads"] = first.heads
    if isinstance(first, Attention):
        found |= {"num_key_value_heads": first.kv_heads, "head_dim": first.head_dim}
    widths = [layer.mlp.width for layer in layers.layers if layer.mlp is not None]
    return found | {"intermediate_size": widths[0]} if widths else found


def _seen_in(layers: ModelLayers, model: ModelSpec) -> dict[str, Any]:
    """What the layers say where fields alone say it in many ways: format, windows, experts, tied matrices."""
    found: dict[str, Any] = {"tie_word_embeddings": layers.tied, "quantization": layers.formats.method}
    elements = {rule.format.element for rule in layers.formats.rules}
    if elements and elements <= {"fp8", "mxfp8"}:
        found["torch_dtype"] = "fp8"
    elif elements == {"int8"}:
        found["torch_dtype"] = "int8"
    if not any(isinstance(layer.mlp, Experts) for layer in layers.layers):
        found["num_experts"] = 0  # a flag may say that the experts of the fields are not there
    kinds = [getattr(layer.attention, "kind", None) for layer in layers.layers]
    reaches = {layer.attention.reach for layer in layers.layers if isinstance(layer.attention, Attention)} - {
        None
    }
    if "sliding" in kinds and set(kinds) <= {"full", "sliding"} and len(reaches) == 1:
        found["sliding_window"] = reaches.pop()
        found["layer_types"] = tuple(f"{kind}_attention" for kind in kinds)
    elif "sliding" not in kinds:
        found |= {"sliding_window": None, "layer_types": None}
    return {name: value for name, value in found.items() if value != getattr(model, name)}


def _fill_defaults(config: Mapping[str, Any], fields: dict[str, Any], source: str) -> None:
    """What Hugging Face leaves out of a config because it follows from the rest."""
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads is not None:
        fields.setdefault("num_key_value_heads", heads)
    if type(heads) is int and type(hidden) is int and heads > 0 and "head_dim" not in fields:
        if hidden % heads:
            raise InputError(
                f"{source}: head_dim: is missing; required, as hidden_size {hidden} is not a multiple of "
                f"num_attention_heads {heads}"
            )
        fields["head_dim"] = hidden // heads
    if fields.get("num_experts") and "moe_intermediate_size" not in fields and "intermediate_size" in fields:
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    if config.get("use_sliding_window") is False:
        fields.pop("sliding_window", None)
    elif (
        "sliding_window" in fields
        and "layer_types" not in fields
        and config.get("use_sliding_window") is True
    ):
        _slide_upper_layers(config, fields)
    _read_dtype(config, fields, source)
    _refuse_unknown_layers(fields, config, source)


def _slide_upper_layers(config: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Qwen2's way to say which layers slide: those from ``max_window_layers`` on."""
    layers, first = fields.get("num_hidden_layers"), config.get("max_window_layers")
    if type(layers) is int and type(first) is int and 0 < first <= layers <= 10_000:
        fields["layer_types"] = ["full_attention"] * first + ["sliding_attention"] * (layers - first)


def _read_dtype(config: Mapping[str, Any], fields: dict[str, Any], source: str) -> None:
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is not None:
        fields["weight_block"] = list_as_tuple(block)
    dtype = fields.get("torch_dtype")
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
        fields["torch_dtype"] = "bfloat16" if dtype == "auto" else dtype
        if fields["torch_dtype"] not in _TORCH_DTYPES:
            raise InputError(
                f"{source}: torch_dtype: {dtype!r} is not allowed; must be one of {', '.join(_TORCH_DTYPES)}"
            )


def _refuse_unknown_layers(fields: dict[str, Any], config: Mapping[str, Any], source: str) -> None:
    kinds = fields.get("layer_types")
    if str(config.get("model_type")) in families() and isinstance(kinds, list):
        # The family knows its words; which layers can be simulated is asked of the list that it makes.
        if not set(map(str, kinds or ())) <= {"full_attention", "sliding_attention"}:
            del fields["layer_types"]
        return
    for index, kind in enumerate(kinds if isinstance(kinds, list) else ()):
        if isinstance(kind, str) and kind not in ("full_attention", "sliding_attention"):
            raise NotSupportedError(
                f"{source}: layer_types[{index}]: {kind!r} is not supported yet; supported: full_attention, "
                "sliding_attention"
            )


def _refuse_misspelt(config: Mapping[str, Any], source: str) -> None:
    """A config may hold any number of fields we do not read, but not a slip of the pen for one we do.

    Published configs have fields whose names come near ours (``qk_head_dim`` beside ``head_dim``), so only a
    single wrong, missing, added or exchanged letter counts.
    """
    wanted = [field for field in ModelSpec.model_fields if field not in config and field not in _LABELS]
    for key in config:
        if not isinstance(key, str) or key in ModelSpec.model_fields or key in _ALIASES:
            continue
        for near in wanted:
            if one_slip(key, near):
                raise InputError(f"{source}: {key}: unknown key; did you mean {near!r}?")


def _locate(name: str) -> tuple[Path, str, bool]:
    """The config file of a model, its name, and whether it was given by a path."""
    direct = Path(name).expanduser()
    try:
        if direct.is_file():
            named = direct.parent if direct.name == "config.json" else direct.with_suffix("")
            return direct, _name_of(named), True
        if (direct / "config.json").is_file():
            return direct / "config.json", _name_of(direct), True
        return paths.find(f"configs/model/{name}.json"), name, False
    except (OSError, ValueError):  # not found, or a name no file system takes
        twin = shape_twin(name)
        if twin is None:
            raise _unknown_model(name) from None
        return paths.find(f"configs/model/{twin}.json"), twin, False


def shape_twin(name: str) -> str | None:
    """The known model that differs from ``name`` only in how it was tuned: one shape, other weights.

    ``Llama-3.1-8B-Instruct`` -> ``meta-llama/Llama-3.1-8B``. None: there is none, or more than one. Dated
    releases (``-2507``) are models of their own: their contexts differ.
    """
    twins = [known for known in known_models() if _untuned(known) == _untuned(name)]
    twins = twins or [known for known in known_models() if _untuned(known).split("/")[-1] == _untuned(name)]
    return twins[0] if len(twins) == 1 else None


def _untuned(name: str) -> str:
    """A model's name in lower case without the word for how it was tuned, such as ``-Instruct``."""
    org, slash, last = name.lower().rpartition("/")
    return org + slash + re.sub(r"-(instruct|base|it|chat|hf)$", "", last.removeprefix("meta-"))


def _name_of(path: Path) -> str:
    """The model's name as its path tells it.

    ``.../models--Qwen--Qwen3-32B/snapshots/<hash>`` -> ``Qwen/Qwen3-32B``; else the known model the path
    ends in; else the last part of the path.
    """
    parts = path.resolve().parts
    for part in parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{match[1]}/{match[2]}"
    ending = "/".join(parts[-2:])
    return ending if ending in known_models() else parts[-1]


def known_models() -> list[str]:
    """Names of every model with a file under ``configs/model``."""
    found = paths.find_all("configs/model/*/*.json")
    return sorted({f"{path.parent.name}/{path.stem}" for path in found})


def _unknown_model(name: str) -> MissingFileError:
    known = known_models()
    near = nearest(name, known)
    ask = f"did you mean {near!r}? " if near else ""
    listed = ", ".join(known) or "none"
    if len(known) > _LISTED:
        listed = f"{len(known)}, those published in `servesim kv --matrix`"
    return MissingFileError(
        f"configs/model/{name}.json: no such model config; {ask}known models: {listed}. "
        "For another model put its config.json there, or give the folder that holds one as model_name"
    )
