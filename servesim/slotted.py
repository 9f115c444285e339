"""``dataclass(slots=True)`` as the standard library has it, put off until a class is used.

The standard library writes and compiles half a dozen methods for every dataclass, each time a program starts:
for the hundred classes that a run loads, as long as some runs take. Here a class gets its slots at once, its
``__init__`` when the first object is made, and everything else from the standard library when somebody
compares objects, shows one, or asks for its fields.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, slots: bool, frozen: bool = False, kw_only: bool = False) -> Callable[[type], type]:
        """See :func:`dataclasses.dataclass`; ``slots`` has to be true."""
        if not slots:
            raise TypeError("slots=True is needed here; without it, take dataclasses.dataclass")
        return lambda plain: _put_off(plain, frozen, kw_only)


_MISSING: Any = object()
_REST = ("__repr__", "__eq__", "__hash__", "__match_args__", "__dataclass_params__", "__dataclass_fields__")
"""What the standard library makes, all of it at once."""
_FIELDS: dict[type, dict[str, Any]] = {}
"""Class -> its fields, those of base classes first, and their defaults."""


class _Later:
    """Stands for an attribute of a class until somebody asks for it."""

    __slots__ = ("_make", "_name")

    def __init__(self, name: str, make: Callable[[], None]) -> None:
        self._name = name
        self._make = make

    def __get__(self, instance: object, owner: type) -> Any:
        self._make()
        return getattr(owner if instance is None else instance, self._name)


def _put_off(plain: type, frozen: bool, kw_only: bool) -> type:
    """``plain`` with slots for its fields, and methods that are made when they are needed."""
    own = {name: value for name, value in vars(plain).items() if name not in ("__dict__", "__weakref__")}
    texts = own.get("__annotations__", {})
    fields = {name: own.get(name, _MISSING) for name in texts if not str(texts[name]).startswith("ClassVar")}
    inherited = {name for base in plain.__mro__ for name in vars(base).get("__slots__", ())}
    later = [name for name in _REST if name not in own and (frozen or name != "__hash__")]

    def make_init() -> None:
        setattr(made, "__init__", _init_of(made, frozen, kw_only))  # noqa: B010 - mypy knows better

    def make_rest() -> None:
        for name in later:
            delattr(made, name)
        model: type = dataclasses.dataclass(frozen=frozen, kw_only=kw_only)(
            type(plain.__name__, plain.__bases__, {**own, "__qualname__": plain.__qualname__})
        )
        for name in later:
            setattr(made, name, vars(model)[name])

    namespace = {name: value for name, value in own.items() if name not in fields}
    namespace["__slots__"] = tuple(name for name in fields if name not in inherited)
    namespace["__qualname__"] = plain.__qualname__
    if frozen:
        namespace |= {"__setattr__": _refuse, "__delattr__": _refuse}
        namespace |= {"__getstate__": _state, "__setstate__": _restore}
    elif "__hash__" not in own:
        namespace["__hash__"] = None
    namespace |= {name: _Later(name, make_rest) for name in later}
    if "__init__" not in own:
        namespace["__init__"] = _Later("__init__", make_init)
    made = type(plain)(plain.__name__, plain.__bases__, namespace)
    bases = [_FIELDS[base] for base in reversed(made.__mro__) if base in _FIELDS]
    _FIELDS[made] = {name: default for base in (*bases, fields) for name, default in base.items()}
    return made


def _init_of(made: type, frozen: bool, kw_only: bool) -> Any:
    """``__init__`` of a class, written and compiled."""
    parameters, lines = ["self", *(["*"] if kw_only else [])], []
    names: dict[str, Any] = {"_missing_": _MISSING, "_put_": object.__setattr__}
    for name, default in _FIELDS[made].items():
        value, factory, given = default, None, True
        if isinstance(default, dataclasses.Field):
            given = default.init
            value = _MISSING if default.default is dataclasses.MISSING else default.default
            factory = None if default.default_factory is dataclasses.MISSING else default.default_factory
        names |= {f"default_{name}": value, f"make_{name}": factory}
        source = name if given else f"default_{name}"
        if factory is not None:
            source = f"make_{name}() if {name} is _missing_ else {name}" if given else f"make_{name}()"
            parameters += [f"{name}=_missing_"] if given else []
        elif given:
            parameters.append(name if value is _MISSING else f"{name}=default_{name}")
        lines.append(f"_put_(self, {name!r}, {source})" if frozen else f"self.{name} = {source}")
    if hasattr(made, "__post_init__"):
        lines.append("self.__post_init__()")
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines or ["pass"]), names)
    names["__init__"].__qualname__ = f"{made.__qualname__}.__init__"
    return names["__init__"]


def _refuse(instance: object, name: str, _: object = None) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r} of {type(instance).__name__}")


def _state(instance: Any) -> list[Any]:
    return [getattr(instance, name) for name in _FIELDS[type(instance)]]


def _restore(instance: Any, state: list[Any]) -> None:
    for name, value in zip(_FIELDS[type(instance)], state, strict=True):
        object.__setattr__(instance, name, value)
