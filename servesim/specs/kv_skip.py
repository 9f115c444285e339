"""Layers whose cache stays in 16 bit while that of the others has a smaller format
(``--kv-cache-dtype-skip-layers``).

As in vLLM 0.33.0: a number names a layer of the stack, ``sliding_window`` every layer with a window. The
TurboQuant formats leave out the first and the last two layers by themselves, unless the model keeps states
(``vllm/model_executor/layers/quantization/turboquant/config.py``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.specs.dtypes import resolve_kv_dtype
from servesim.specs.layers import Attention, LatentAttention, Recurrent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim.specs.layers import AnyAttention, Layer, ModelLayers
    from servesim.specs.model import ModelSpec

WINDOWS = "sliding_window"
"""The word for all layers with a window."""
OPTION = "--kv-cache-dtype-skip-layers"
_TURBO = "turboquant_"
_BOUNDARY = 2
"""Layers at either end that TurboQuant leaves out."""
_MARK = "-skip"
"""Between the formats of a variant's name and the layers left out."""


def skip_words(value: object) -> object:
    """``0 1 sliding_window``, with blanks or commas, or a list of words -> ``0,1,sliding_window``.

    Raises:
        ValueError: a word is neither a number of a layer nor ``sliding_window``.
    """
    if value is None:
        return None
    words = value if isinstance(value, list | tuple) else [value]
    found = [word for each in words for word in str(each).replace(",", " ").split()]
    for word in found:
        if word != WINDOWS and not (word.isdecimal() and len(word) <= 5):
            raise ValueError(
                f"{word!r} is not allowed; must be numbers of layers, from 0, and {WINDOWS}, such as "
                f"0,1,{WINDOWS}"
            )
    numbers = sorted({int(word) for word in found if word != WINDOWS})
    return ",".join([*map(str, numbers), *([WINDOWS] if WINDOWS in found else [])]) or None


def skipped_layers(model: ModelLayers, words: str | None, kv_format: str) -> tuple[int, ...]:
    """The layers whose cache is left in 16 bit: numbers in the stack, rising.

    Args:
        model: whose layers they are.
        words: as :func:`skip_words` returns them.
        kv_format: of the other layers; where that is as wide, nothing is left out.

    Raises:
        InputError: the model has no such layer.
    """
    if resolve_kv_dtype("bfloat16", kv_format) in ("bfloat16", "float16", "float32"):
        return ()
    asked = [word for word in (words or "").split(",") if word]
    count = len(model.layers)
    numbers = {int(word) for word in asked if word != WINDOWS}
    if beyond := sorted(number for number in numbers if number >= count):
        raise InputError(
            f"{OPTION}: {beyond[0]} is not allowed for this model; must be 0 to {count - 1}, a layer of its "
            f"{count}, or {WINDOWS}"
        )
    if kv_format.startswith(_TURBO) and not _has_states(model):
        ends = min(_BOUNDARY, count // 2)
        numbers |= {*range(ends), *range(count - ends, count)}
    windows = WINDOWS in asked
    return tuple(
        index
        for index, layer in enumerate(model.layers)
        if (index in numbers and _keeps(layer.attention)) or (windows and _slides(layer.attention))
    )


def _has_states(model: ModelLayers) -> bool:
    return any(isinstance(layer.attention, Recurrent) for layer in model.layers)


def _keeps(a: AnyAttention | None) -> bool:
    """Whether the format of a layer's cache is one that can be left out."""
    if isinstance(a, Recurrent):
        a = a.beside
    return isinstance(a, Attention | LatentAttention)


def _slides(a: AnyAttention | None) -> bool:
    return isinstance(a, Attention) and a.kind == "sliding"


@lru_cache(maxsize=32)
def as_kept(model: ModelSpec, skipped: tuple[int, ...], wide: str) -> ModelSpec:
    """The model with ``wide`` as the format of the caches of its layers ``skipped``; itself without any."""
    if not skipped:
        return model
    return model.model_copy(update={"layers": with_wide_layers(model.layers, skipped, wide)})


def with_wide_layers(model: ModelLayers, skipped: tuple[int, ...], wide: str) -> ModelLayers:
    """The layers, those ``skipped`` with a cache of format ``wide``."""
    chosen = frozenset(skipped)
    layers = tuple(
        _wide(layer, wide) if index in chosen else layer for index, layer in enumerate(model.layers)
    )
    return replace(model, layers=layers)


def _wide(layer: Layer, wide: str) -> Layer:
    a = layer.attention
    if isinstance(a, Attention | LatentAttention):
        return replace(layer, attention=replace(a, kv_format=wide))
    if isinstance(a, Recurrent) and a.beside is not None:
        return replace(layer, attention=replace(a, beside=replace(a.beside, kv_format=wide)))
    return layer


def wide_layers(model: ModelLayers) -> tuple[int, ...]:
    """The layers that have a format of their own."""
    return tuple(
        index
        for index, layer in enumerate(model.layers)
        if getattr(getattr(layer.attention, "beside", None) or layer.attention, "kv_format", None)
    )


def variant_with(variant: str, model: ModelLayers, skipped: tuple[int, ...]) -> str:
    """The variant's name with the layers left out: ``bf16-kvfp8-skip0-1_30-31``, ``...-skipwindows``."""
    if not skipped:
        return variant
    windows = tuple(index for index, layer in enumerate(model.layers) if _slides(layer.attention))
    return f"{variant}{_MARK}{'windows' if skipped == windows else '_'.join(_ranges(skipped))}"


def without_skipped(variant: str) -> tuple[str, str | None]:
    """A variant's name -> (the one without layers left out, these as words of the option or None)."""
    plain, mark, told = variant.partition(_MARK)
    if not mark:
        return variant, None
    if told == "windows":
        return plain, WINDOWS
    numbers: list[str] = []
    for part in told.split("_"):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return variant, None
        numbers += map(str, range(int(first), int(last or first) + 1))
    return plain, ",".join(numbers)


def _ranges(numbers: Iterable[int]) -> list[str]:
    """0, 1, 2, 5 -> ``0-2``, ``5``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found]
