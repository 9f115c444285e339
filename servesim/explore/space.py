"""The configurations of a sweep: every combination of some choices, those listed, and what rules them out."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.cluster import load_cluster
from servesim.specs.flags import renamed
from servesim.specs.options import RuntimeOptions
from servesim.specs.paths import find
from servesim.specs.presets import LIMITS
from servesim.specs.reading import parse_json_object, read_json_object, read_text, read_yaml_object
from servesim.specs.serve_line import read_serve_line
from servesim.specs.validation import hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from servesim.specs.cluster import ClusterSpec

MOST = 100_000
"""Configurations of a sweep at most."""
CLUSTER = "cluster."
"""What the names of keys of the cluster config begin with: ``cluster.link_bw``,
``cluster.nodes.0.instances.*.max_num_seqs``."""
_KEYS = ("options", "grid", "list", "constraints", "slo")
_NOT_SWEPT = (
    "output", "summary", "steps", "timeline", "itl", "log_interval", "log_level", "run_id",
    "ensemble", "step_noise", "run_noise", "arrival_jitter", "network_backend", "inputs_root",
    "cleanup_inputs",
)  # fmt: skip
"""Options of files, of the screen and of repeated runs, which a configuration has no use for."""
SWEPT = tuple(name for name in RuntimeOptions.model_fields if name not in _NOT_SWEPT)


@dataclass(slots=True)
class Space:
    """What a sweep goes through."""

    options: dict[str, Any] = field(default_factory=dict)
    """What holds for every configuration unless it says otherwise."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> values; every combination is a configuration."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """Configurations one by one; with a grid, each is combined with all of it."""
    constraints: list[str] = field(default_factory=list)
    slo: str | None = None

    @property
    def size(self) -> int:
        """Configurations, those that the constraints rule out among them."""
        return math.prod(map(len, self.grid.values())) * max(len(self.listed), 1)

    def test(self) -> Callable[[Mapping[str, Any]], bool]:
        """Whether the constraints allow a configuration.

        Raises:
            InputError: a constraint is none, or a listed configuration sets what the grid sets.
        """
        for number, own in enumerate(self.listed):
            for name in sorted(set(own) & set(self.grid)):
                raise InputError(f"list[{number}]: {name}: stands in the grid, too; keep one of them")
        names = {name: RuntimeOptions.model_fields[name].default for name in SWEPT}
        tests = [Constraint(text, names) for text in self.constraints]
        return lambda each: all(test.holds(self._values(names, each)) for test in tests)

    def _values(self, names: Mapping[str, Any], each: Mapping[str, Any]) -> dict[str, Any]:
        """What a configuration sets; None for what a preset decides by the hardware."""
        chosen = {**self.options, **each}
        if isinstance(chosen.get("vllm_serve"), str):
            chosen = {"preset": "vllm-serve", **read_serve_line(chosen["vllm_serve"]).options, **chosen}
        open_yet = dict.fromkeys(LIMITS) if chosen.get("preset") else {}
        return {**names, **open_yet, **chosen}

    def configurations(self) -> tuple[list[dict[str, Any]], int]:
        """Every configuration once, in order, and how many the constraints ruled out.

        Raises:
            InputError: there are none, too many, or a constraint cannot be worked out.
        """
        allowed = self.test()
        if self.size > MOST:
            raise InputError(
                f"a sweep of {self.size:,} configurations is too large; at most {MOST:,} are run; "
                "--optimizer chooses some of them"
            )
        found: dict[str, dict[str, Any]] = {}
        ruled_out = 0
        for own in self.listed or [{}]:
            for values in product(*self.grid.values()):
                each = {**own, **dict(zip(self.grid, values, strict=True))}
                if allowed(each):
                    found.setdefault(json.dumps(each, sort_keys=True, default=str), each)
                else:
                    ruled_out += 1
        if not found:
            raise InputError(f"no configuration is left: the constraints rule out all {ruled_out:,}")
        return list(found.values()), ruled_out


def read_space(path: str | Path) -> Space:
    """The space of a YAML file; or of vLLM's JSON of serve parameters, whose entries are listed.

    Raises:
        InputError: something in the file is wrong.
    """
    text = read_text(Path(path))
    source = str(path)
    if source.endswith(".json") and text.lstrip().startswith("["):
        return space_of({"list": parse_json_object(f'{{"list": {text}}}', source)["list"]}, source)
    if not source.endswith(".json"):
        return space_of(read_yaml_object(Path(path)), source)
    described = read_json_object(Path(path))
    if (
        described
        and all(isinstance(entry, dict) for entry in described.values())
        and not (set(described) & set(_KEYS))
    ):
        return space_of({"list": list(described.values())}, source)  # label -> parameters
    return space_of(described, source)


def space_of(described: Mapping[str, Any], source: str = "sweep") -> Space:
    """The space that a mapping describes, checked.

    Raises:
        InputError: an unknown key, a choice that is none, or a value of the wrong kind.
    """
    for key in described:
        if key not in _KEYS:
            raise InputError(f"{source}: {key}: is no key of a sweep; {hint(str(key), _KEYS)}")
    space = Space(
        options=_named(_mapping(described, "options", source), f"{source}: options"),
        constraints=[str(text) for text in _list(described, "constraints", source)],
        slo=described.get("slo"),
    )
    grid = _mapping(described, "grid", source)
    for name, entry in _named(grid, f"{source}: grid").items():
        space.grid[name] = choices(entry, f"{source}: grid: {name}")
    for number, entry in enumerate(_list(described, "list", source)):
        where = f"{source}: list[{number}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}: must be an object of options, such as {{max_num_seqs: 64}}")
        own = {key: value for key, value in entry.items() if key != "_benchmark_name"}
        space.listed.append(_named(own, where))
    if not space.grid and not space.listed:
        raise InputError(f"{source}: has neither grid nor list; give one of them")
    if space.slo is not None:
        from servesim.explore.slo import parse_slo

        parse_slo(space.slo)
    return space


def _mapping(described: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = described.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"{source}: {key}: must be an object")
    return found


def _list(described: Mapping[str, Any], key: str, source: str) -> Sequence[Any]:
    found = described.get(key) or []
    if not isinstance(found, list | tuple):
        raise InputError(f"{source}: {key}: must be a list")
    return found


def _named(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The mapping with every option under its own name; vLLM's names and dashes are understood."""
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key)
        options[name if name.startswith(CLUSTER) else name.lstrip("-").replace("-", "_")] = value
    try:
        own = renamed(RuntimeOptions.model_fields, options)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    for name in own:
        if name in SWEPT or name.startswith(CLUSTER):
            continue
        if name in _NOT_SWEPT:
            raise InputError(f"{where}: {name}: has no effect in a sweep; leave it out")
        raise InputError(f"{where}: {name}: is no option of a run; {hint(name, list(SWEPT))}")
    return own


def choices(entry: Any, where: str) -> list[Any]:
    """The values of a list, of ``{choices: […]}`` or of ``{range: …}``; InputError for anything else."""
    if isinstance(entry, Mapping):
        if set(entry) == {"choices"}:
            entry = entry["choices"]
        elif set(entry) == {"range"} and isinstance(entry["range"], Mapping):
            return _range(entry["range"], f"{where}: range")
        else:
            raise InputError(f"{where}: must be a list, {{choices: [...]}} or {{range: {{min, max, step}}}}")
    if not isinstance(entry, list | tuple) or not entry:
        raise InputError(f"{where}: must be a list of at least one value")
    return list(entry)


def _range(given: Mapping[str, Any], where: str) -> list[Any]:
    """min, min + step … up to max; with ``scale: log`` min, min * step …"""
    unknown = set(given) - {"min", "max", "step", "scale"}
    numbers = [given.get("min"), given.get("max"), given.get("step", 1)]
    scale = given.get("scale", "linear")
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if unknown or not plain or scale not in ("linear", "log"):
        raise InputError(f"{where}: must have numbers min, max and step, and scale linear or log")
    low, high, step = numbers
    log = scale == "log"
    if not all(map(math.isfinite, numbers)) or low > high or step <= (1 if log else 0) or (log and low <= 0):
        raise InputError(
            f"{where}: min must not be above max, and step above {'1, min above 0' if log else 0}"
        )
    count = int(math.log(high / low) / math.log(step) + 1e-9 if log else (high - low) / step + 1e-9) + 1
    if count > MOST:
        raise InputError(f"{where}: {count:,} values are too many; at most {MOST:,}")
    values = [low * step**i if log else low + step * i for i in range(count)]
    whole = all(isinstance(n, int) for n in numbers)
    return values if whole else [float(f"{value:.12g}") for value in values]


def split(configuration: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options, and keys of the cluster config (without ``cluster.``)."""
    options = {name: value for name, value in configuration.items() if not name.startswith(CLUSTER)}
    keys = {
        name.removeprefix(CLUSTER): value for name, value in configuration.items() if name.startswith(CLUSTER)
    }
    return options, keys


def cluster_with(source: str | Mapping[str, Any], keys: Mapping[str, Any]) -> ClusterSpec:
    """The cluster config ``source`` (a path or its content) with some keys set.

    Raises:
        InputError: a path leads nowhere, or the result is no valid cluster.
    """
    if not keys:
        return load_cluster(source)
    content = read_json_object(find(source, "cluster config")) if isinstance(source, str) else dict(source)
    content = copy.deepcopy(content)
    for path, value in keys.items():
        places = list(_places(content, path.split("."), path))
        for holder, key in places:
            holder[key] = copy.deepcopy(value)
    return load_cluster(content)


def _places(content: Any, parts: list[str], path: str) -> Iterator[tuple[Any, Any]]:
    """(object, key) of everything that a dotted path with ``*`` leads to."""
    part, *rest = parts
    keys: list[Any]
    if isinstance(content, list):
        if part != "*" and not (part.isdecimal() and int(part) < len(content)):
            raise InputError(f"{CLUSTER}{path}: {part}: must be a number below {len(content)}, or * for all")
        keys = list(range(len(content))) if part == "*" else [int(part)]
    elif isinstance(content, dict):
        if rest:
            content.setdefault(part, {})  # what the file leaves out; an unknown key is told with the cluster
        keys = [part]
    else:
        raise InputError(f"{CLUSTER}{path}: {part}: leads into a value that has no keys")
    for key in keys:
        if rest:
            yield from _places(content[key], rest, path)
        else:
            yield content, key


def file_digest(path: str) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
_ALLOWED = (
    "may hold names of options, numbers, texts in quotes, lists, + - * / // %, comparisons, in, and, or, not"
)


class Constraint:
    """One condition that every configuration has to fulfil."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        """
        Args:
            text: the condition.
            names: what it may name.

        Raises:
            InputError: it is no condition of the kind allowed, or names something else.
        """
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise InputError(f"constraint {text!r}: is no expression; it {_ALLOWED}") from None
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and node.id not in names:
                from servesim.specs.validation import hint

                raise InputError(
                    f"constraint {text!r}: {node.id} is no option of a run; {hint(node.id, list(names))}"
                )

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the configuration with these ``values`` fulfils it.

        Raises:
            InputError: it cannot be worked out, for example because an option is not set.
        """
        try:
            return bool(self._value(self._tree, values))
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            unset = sorted(
                {
                    node.id
                    for node in ast.walk(self._tree)
                    if isinstance(node, ast.Name) and values[node.id] is None
                }
            )
            why = f"{', '.join(unset)} is not set; give it a value" if unset else str(error)
            raise InputError(f"constraint {self.text!r}: cannot be worked out: {why}") from None

    def _value(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, str | int | float | None):
                return value
            case ast.Name(id=name):
                return values[name]
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not self._value(inner, values)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._value(inner, values)
            case ast.BoolOp(op=kind, values=parts):
                test = all if isinstance(kind, ast.And) else any
                return test(self._value(part, values) for part in parts)
            case ast.BinOp(op=kind, left=left, right=right) if type(kind) in _ARITHMETIC:
                one, two = self._value(left, values), self._value(right, values)
                if not all(isinstance(each, int | float) for each in (one, two)):
                    raise TypeError("only numbers can be reckoned with")
                return _ARITHMETIC[type(kind)](one, two)
            case ast.Compare(left=left, ops=kinds, comparators=others):
                sides = [self._value(part, values) for part in (left, *others)]
                known = [_COMPARISONS.get(type(kind)) for kind in kinds]
                if None not in known:
                    return all(
                        compare(one, two)
                        for compare, one, two in zip(known, sides, sides[1:], strict=False)
                        if compare
                    )
        raise InputError(f"constraint {self.text!r}: {ast.unparse(node)!r} is not allowed; it {_ALLOWED}")
