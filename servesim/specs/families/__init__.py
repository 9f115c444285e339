"""From a Hugging Face config to the list of layers: one file for each group of families.

A file of this package that defines ``FAMILIES`` (``model_type`` -> a function of :class:`Fields` that returns
a :class:`Stack`) is found by itself: a new family is one new file. What a function cannot express, it refuses
by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, NotSupportedError
from servesim.specs.families.reading import Fields
from servesim.specs.formats import read_formats
from servesim.specs.layers import ModelLayers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from servesim.specs.families.stack import Stack

    Family = Callable[[Fields], Stack]

_SECTIONS = ("text_config", "llm_config", "language_config")
"""Where multimodal configs keep the language model."""


@cache
def families() -> dict[str, Family]:
    """Every modelled ``model_type`` and the function that reads it."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", {}))
    return found


def model_type_of(config: Mapping[str, Any]) -> str:
    """The ``model_type`` of the language model: a multimodal config's own section says it."""
    for section in _SECTIONS:
        inner = config.get(section)
        if (
            isinstance(inner, dict)
            and isinstance(inner.get("model_type"), str)
            and inner["model_type"] in families()
        ):
            return str(inner["model_type"])
    return str(config.get("model_type", ""))


@contextmanager
def _of_published_form(where: str) -> Iterator[None]:
    """Tell what goes wrong inside as bad input: readers trust fields to be as in published configs."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a field has another form than in published configs ({type(error).__name__}: {error}); "
            "compare it with the config of the checkpoint"
        ) from error


def read_layers(
    config: Mapping[str, Any],
    source: str,
    sidecar: Mapping[str, Any] | None = None,
    otherwise: Family | None = None,
) -> ModelLayers:
    """The layers of a model, from its ``config.json`` and the ``hf_quant_config.json`` beside it.

    ``otherwise`` reads a family that is not modelled.

    Raises:
        NotSupportedError: the family, a kind of layer or a weight format is not modelled.
        InputError: a field is missing or wrong; ``source`` names the file.
    """
    model_type = model_type_of(config)
    family = families().get(model_type, otherwise)
    if family is None:
        raise NotSupportedError(
            f"{source}: model_type: {model_type!r} is not modelled; its layers are not known. Known: "
            f"{', '.join(sorted(families()))}. A family is one file in servesim/specs/families"
        )
    text: dict[str, Any] = dict(config)
    for section in _SECTIONS:
        inner = config.get(section)
        if isinstance(inner, dict):
            outer = {key: value for key, value in config.items() if key not in inner or inner[key] is None}
            text = {**outer, **inner}
            # Which of the two is tied is said outside by some, inside by others.
            if "tie_word_embeddings" in config and "tie_word_embeddings" not in inner:
                text["tie_word_embeddings"] = config["tie_word_embeddings"]
            break
    quantization = text.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise InputError(
            f"{source}: quantization_config: {quantization!r} is not allowed; must be an object {{...}}"
        )
    fields = Fields(text, source)
    plain = fields.text("torch_dtype") or fields.text("dtype") or "bfloat16"
    with _of_published_form(f"{source}: quantization_config"):
        formats, kv_format = read_formats(quantization, sidecar, plain.removeprefix("torch."), source)
    with _of_published_form(f"{source}: {model_type}"):
        stack = family(fields)
    return ModelLayers(
        model_type=model_type,
        hidden_size=stack.hidden,
        vocab_size=stack.vocab,
        max_position_embeddings=stack.context,
        layers=tuple(stack.layers),
        formats=stack.formats(formats) if stack.formats else formats,
        embedding=stack.embedding,
        head=stack.head,
        tied=stack.tied,
        vision=tuple(stack.vision),
        mtp=tuple(stack.mtp),
        kv_format=stack.kv_format or kv_format,
    )
