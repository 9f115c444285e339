"""In which number format a checkpoint holds its weights, module by module, and what that costs in bytes.

Read from ``quantization_config`` of a config and from ``hf_quant_config.json`` beside it. Bytes count what
the checkpoint and the engine's parameters hold: packed values, scales and zero points; not a kernel's scratch
space.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from servesim.errors import InputError, NotSupportedError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Element = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4", "mxfp4", "mxfp8", "nvfp4"]
_BITS: dict[str, int] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "fp8": 8,
    "mxfp8": 8,
    "int8": 8,
    "int4": 4,
    "mxfp4": 4,
    "nvfp4": 4,
}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one matrix is stored."""

    element: Element
    group: tuple[int, int] | None = None
    """Rows and columns of a block that shares a scale; (1, n): n inputs of one output. None: one scale for
    the whole matrix, or none at all for 16-bit formats."""
    scale_bytes: int = 0
    """Of one scale."""
    zero_bits: int = 0
    """Of one group's zero point."""
    extra_bytes: int = 0
    """Of scales that are there once for a matrix: of its own, and of its static inputs."""
    order_bytes: int = 0
    """Of one input's place in a reordered matrix (GPTQ's ``g_idx``)."""

    @property
    def bits(self) -> int:
        return _BITS[self.element]

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a rows x columns matrix, scales and zero points included."""
        size = -(-rows * columns * self.bits // 8) + self.extra_bytes + columns * self.order_bytes
        if self.group is not None:
            groups = -(-rows // (self.group[0] or rows)) * -(-columns // (self.group[1] or columns))
            size += groups * self.scale_bytes + -(-groups * self.zero_bits // 8)
        return size


@dataclass(frozen=True, slots=True)
class Rule:
    """The format of the modules that a list of patterns names."""

    patterns: tuple[str, ...]
    """Shell patterns with ``*``; ``re:`` before a regular expression; ``Linear``: every linear layer."""
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Formats of a checkpoint's matrices. What no rule names, and what is no matrix, has the plain format."""

    plain: Element = "bfloat16"
    rules: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    """Patterns of matrices that stay in the plain format although a rule names them."""
    method: str | None = None
    """``quant_method`` of the config; None: not quantised."""
    label: str = ""
    """In a few words: ``fp8, blocks of 128 x 128``."""
    _cache: dict[str, WeightFormat] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plain_bytes(self) -> int:
        return _BITS[self.plain] // 8

    def of(self, module: str) -> WeightFormat:
        """The format of a matrix; ``module`` is its name in the checkpoint without ``.weight``."""
        if not self.rules:
            return _plain(self.plain)
        known = self._cache.get(module)
        if known is None:
            known = self._cache[module] = self._find(module)
        return known

    def _find(self, module: str) -> WeightFormat:
        if not _matches(self.ignored, module):
            for rule in self.rules:
                if _matches(rule.patterns, module):
                    return rule.format
        return _plain(self.plain)


@lru_cache
def _plain(element: Element) -> WeightFormat:
    return WeightFormat(element)


_PREFIXES = re.compile(r"^((model|language_model|text_model|backbone)\.)+")
"""Models nested in others carry more of these in their checkpoints than lists of modules say."""


_ONE_EXPERT = re.compile(r"\.experts\.\d+\..*$")
"""Lists name every expert; all of a layer's have one format, that of their stack."""


def _stem(name: str) -> str:
    return _ONE_EXPERT.sub(".experts", _PREFIXES.sub("", name))


@lru_cache(maxsize=64)
def _matcher(
    patterns: tuple[str, ...],
) -> tuple[frozenset[str], tuple[re.Pattern[str], ...], re.Pattern[str] | None]:
    """Exact names without prefixes, regular expressions of full names, shell patterns as one expression."""
    exact = set()
    shells, regexes = [], []
    for pattern in patterns:
        if pattern.startswith("re:"):
            regexes.append(re.compile(pattern[3:]))
        elif "*" in pattern or "?" in pattern:
            shells.append(fnmatch.translate(_stem(pattern)))
        else:
            exact.add(_stem(pattern))
    return frozenset(exact), tuple(regexes), re.compile("|".join(shells)) if shells else None


def _matches(patterns: tuple[str, ...], module: str) -> bool:
    """Whether a list of patterns names a module, or a module around it."""
    if not patterns:
        return False
    exact, regexes, shells = _matcher(patterns)
    stem = _stem(module)
    if "Linear" in exact:
        return True
    parts = stem.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    if any(name in exact for name in around) or parts[-1] in exact:
        return True
    if shells is not None and any(shells.match(name) for name in around):
        return True
    return any(regex.match(name) for regex in regexes for name in (f"model.{stem}", stem, module))


# Reading


def read_formats(
    quantization: Mapping[str, Any] | None, sidecar: Mapping[str, Any] | None, plain: str, source: str
) -> tuple[WeightFormats, str | None]:
    """(formats of the weights, format of the KV cache that the checkpoint asks for).

    ``quantization``: the config's ``quantization_config``; ``sidecar``: ``hf_quant_config.json``, where older
    ModelOpt checkpoints say it.

    Raises:
        NotSupportedError: a method, or a format inside one, that is not modelled.
    """
    if quantization is None and sidecar is not None:
        body = sidecar.get("quantization")
        quantization = {"quant_method": "modelopt", **(body if isinstance(body, dict) else sidecar)}
        source = f"{source} (hf_quant_config.json beside it)"
    if not quantization:
        return WeightFormats(_element(plain)), None
    method = str(quantization.get("quant_method", "")).lower()
    reader = _READERS.get(method)
    if reader is None:
        raise NotSupportedError(
            f"{source}: quantization_config.quant_method: {method!r} is not modelled; known: "
            f"{', '.join(_READERS)}"
        )
    return reader(quantization, _element(plain), source), _kv_format(quantization)


def _element(plain: str) -> Element:
    known: dict[str, Element] = {
        "bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "fp8": "fp8", "int8": "int8",
    }  # fmt: skip
    return known.get(plain, "bfloat16")


def _kv_format(section: Mapping[str, Any]) -> str | None:
    scheme = section.get("kv_cache_scheme")
    if isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
        return "fp8"
    algorithm = section.get("kv_cache_quant_algo")
    return "fp8" if isinstance(algorithm, str) and algorithm.upper() == "FP8" else None


def _names(value: object) -> tuple[str, ...]:
    return tuple(str(name) for name in value) if isinstance(value, list | tuple) else ()


FP8_BLOCK = WeightFormat("fp8", (128, 128), 4)


def _fp8(section: Mapping[str, Any], plain: Element, source: str) -> WeightFormats:
    """fp8 by vLLM's own method: blocks with a scale, or one scale a matrix."""
    ignored = _names(section.get("modules_to_not_convert")) or _names(section.get("ignored_layers"))
    ignored += _names(section.get("ignore"))
    block = section.get("weight_block_size")
    static = 4 if section.get("activation_scheme") == "static" else 0
    if block:
        rows, columns = int(block[0]), int(block[1])
        fmt = WeightFormat("fp8", (rows, columns), 4)
        label = f"fp8 in blocks of {rows} x {columns}"
    else:
        fmt, label = WeightFormat("fp8", None, extra_bytes=4 + static), "fp8, one scale a matrix"
    rules = (*_layer_rules(section, source), Rule(("Linear",), fmt))
    return WeightFormats(plain, rules, (*ignored, "lm_head"), "fp8", label)


def _int4_group(size: int, *, zero: bool, order: bool = False, scale_bytes: int = 2) -> WeightFormat:
    columns = size if size > 0 else 0
    return WeightFormat("int4", (1, columns), scale_bytes, 4 if zero else 0, 0, 4 if order else 0)


def _awq(section: Mapping[str, Any], plain: Element, source: str) -> WeightFormats:
    bits, size = section.get("bits", section.get("w_bit", 4)), section.get("group_size", 128)
    if bits != 4:
        raise NotSupportedError(
            f"{source}: quantization_config.bits: AWQ with {bits} bits is not modelled; known: 4"
        )
    zero = bool(section.get("zero_point", True))
    ignored = (*_names(section.get("modules_to_not_convert")), "lm_head")
    fmt = _int4_group(int(size), zero=zero)
    return WeightFormats(plain, (Rule(("Linear",), fmt),), ignored, "awq", f"AWQ, 4 bits in groups of {size}")


def _gptq(section: Mapping[str, Any], plain: Element, source: str) -> WeightFormats:
    bits, size = section.get("bits", 4), int(section.get("group_size", 128))
    if bits not in (4, 8):
        raise NotSupportedError(
            f"{source}: quantization_config.bits: GPTQ with {bits} bits is not modelled; known: 4, 8"
        )
    fmt = WeightFormat("int4" if bits == 4 else "int8", (1, max(size, 0)), 2, int(bits), 0, 4)
    ignored = _names(section.get("modules_to_not_convert"))
    ignored += () if section.get("lm_head") else ("lm_head",)
    return WeightFormats(plain, (Rule(("Linear",), fmt),), (*ignored, "re:.*mlp\\.gate$"), "gptq",
                         f"GPTQ, {bits} bits in groups of {size}")  # fmt: skip


MXFP4 = WeightFormat("mxfp4", (1, 32), 1)
MXFP8 = WeightFormat("mxfp8", (1, 32), 1)
NVFP4 = WeightFormat("nvfp4", (1, 16), 1, extra_bytes=8)


def _mxfp4(_section: Mapping[str, Any], plain: Element, _source: str) -> WeightFormats:
    """OpenAI's: the experts alone; vLLM leaves every other linear layer as it is."""
    return WeightFormats(
        plain, (Rule(("re:.*\\.experts\\..*",), MXFP4),), (), "mxfp4", "MXFP4 experts, the rest in 16 bit"
    )


def _compressed(section: Mapping[str, Any], plain: Element, source: str) -> WeightFormats:
    """Compressed-tensors: groups of targets, each with a scheme."""
    rules, labels = [], []
    groups = section.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        scheme = group.get("weights") or {}
        fmt, label = _scheme(scheme, f"{source}: quantization_config.config_groups.{name}", group, section)
        targets = _names(group.get("targets")) or ("Linear",)
        rules.append(Rule(targets, fmt))
        labels.append(label)
    if not rules:
        raise InputError(
            f"{source}: quantization_config.config_groups: is missing; required beside compressed-tensors"
        )
    ignored = _names(section.get("ignore"))
    return WeightFormats(plain, tuple(rules), ignored, "compressed-tensors", ", ".join(dict.fromkeys(labels)))


def _scheme(
    scheme: Mapping[str, Any], where: str, group: Mapping[str, Any], section: Mapping[str, Any]
) -> tuple[WeightFormat, str]:
    bits, kind = scheme.get("num_bits"), scheme.get("type")
    strategy, size = scheme.get("strategy"), scheme.get("group_size") or 0
    name = str(group.get("format") or section.get("format") or "")
    inputs = group.get("input_activations")
    static = 4 if isinstance(inputs, dict) and inputs.get("dynamic") is False else 0
    strategy = strategy or ("group" if size else "tensor")
    if (bits, kind) == (4, "float"):
        if name.startswith("mxfp4") or size == 32:
            return MXFP4, "MXFP4"
        extra = 8 if inputs else 4
        return WeightFormat("nvfp4", (1, 16), 1, extra_bytes=extra), "NVFP4"
    if (bits, kind) == (8, "float"):
        if size == 32:
            return MXFP8, "MXFP8"
        if strategy == "block":
            rows, columns = scheme.get("block_structure") or (128, 128)
            return WeightFormat("fp8", (int(rows), int(columns)), 4), f"fp8 in blocks of {rows} x {columns}"
        if strategy == "channel":
            return WeightFormat("fp8", (1, 0), 4, extra_bytes=static), "fp8, one scale a channel"
        return WeightFormat("fp8", None, extra_bytes=4 + static), "fp8, one scale a matrix"
    if (bits, kind) == (8, "int"):
        if strategy == "group":
            return WeightFormat("int8", (1, int(size)), 2), f"int8 in groups of {size}"
        return WeightFormat("int8", (1, 0), 4, extra_bytes=static), "int8, one scale a channel"
    if (bits, kind) == (4, "int"):
        zero = scheme.get("symmetric") is False
        return _int4_group(
            int(size), zero=zero
        ), f"int4 in groups of {size}" if size else "int4, one scale a channel"
    raise NotSupportedError(
        f"{where}.weights: {bits} bits of type {kind!r} are not modelled; known: 4 or 8 bits, float or int"
    )


_MODELOPT: dict[str, tuple[WeightFormat, str]] = {
    "FP8": (WeightFormat("fp8", None, extra_bytes=8), "fp8, one scale a matrix"),
    "FP8_PER_CHANNEL_PER_TOKEN": (WeightFormat("fp8", (1, 0), 4), "fp8, one scale a channel"),
    "FP8_PB_WO": (FP8_BLOCK, "fp8 in blocks of 128 x 128"),
    "NVFP4": (NVFP4, "NVFP4"),
    "W4A16_NVFP4": (NVFP4, "NVFP4"),
    "MXFP8": (MXFP8, "MXFP8"),
    "W4A16_AWQ": (WeightFormat("int4", (1, 128), 2), "int4 in groups of 128"),
}


def _modelopt(section: Mapping[str, Any], plain: Element, source: str) -> WeightFormats:
    algorithm = str(section.get("quant_algo") or "").upper()
    ignored = _names(section.get("ignore")) or _names(section.get("exclude_modules"))
    if algorithm == "MIXED_PRECISION":
        rules = _layer_rules(section, source)
        if not rules:
            raise NotSupportedError(
                f"{source}: quantized_layers: is missing; a checkpoint of mixed precision cannot be sized "
                "without it"
            )
        return WeightFormats(plain, rules, ignored, "modelopt", "mixed: " + _mixture(rules))
    if algorithm not in _MODELOPT:
        raise NotSupportedError(
            f"{source}: quant_algo: {algorithm!r} is not modelled; known: {', '.join(_MODELOPT)}, "
            "MIXED_PRECISION"
        )
    fmt, label = _MODELOPT[algorithm]
    return WeightFormats(plain, (Rule(("Linear",), fmt),), (*ignored, "lm_head"), "modelopt", label)


def _layer_rules(section: Mapping[str, Any], source: str) -> tuple[Rule, ...]:
    """Formats that ModelOpt lists module by module."""
    by_format: dict[str, list[str]] = {}
    layers = section.get("quantized_layers")
    for name, entry in layers.items() if isinstance(layers, dict) else ():
        by_format.setdefault(str(entry.get("quant_algo")).upper(), []).append(str(name))
    for algorithm in by_format:
        if algorithm not in _MODELOPT:
            raise NotSupportedError(
                f"{source}: quantized_layers: {algorithm!r} is not modelled; known: {', '.join(_MODELOPT)}"
            )
    return tuple(Rule(tuple(names), _MODELOPT[algorithm][0]) for algorithm, names in by_format.items())


def _mixture(rules: Iterable[Rule]) -> str:
    return ", ".join(dict.fromkeys(rule.format.element for rule in rules))


_READERS = {
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
}


@lru_cache
def format_of_dtype(dtype: str) -> WeightFormats:
    """What ``--dtype`` makes of a 16-bit checkpoint: every linear layer in 8 bits, but embedding, output
    matrix and router."""
    if dtype in ("fp8", "int8"):
        rule = Rule(("Linear",), WeightFormat(_element(dtype)))
        return WeightFormats("bfloat16", (rule,), ("lm_head",), None, dtype)
    return WeightFormats(_element(dtype), label=dtype)
