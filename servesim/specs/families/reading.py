"""Fields of a config, asked for by name: with the library's defaults where a config leaves them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LAYERS = 10_000


class Fields:
    """One section of a ``config.json``; what is missing or wrong is told with the file and the field."""

    def __init__(
        self, config: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.source = source
        self._values = {
            **(defaults or {}),
            **{key: value for key, value in config.items() if value is not None},
        }

    def has(self, *names: str) -> bool:
        return any(name in self._values for name in names)

    def truthy(self, *names: str) -> bool:
        """Whether one of the fields is there and neither zero, false nor empty."""
        return any(bool(self._values.get(name)) for name in names)

    def whole(self, *names: str, default: int | None = None) -> int:
        """A whole number by the first of its names that is there.

        Raises:
            InputError: it is missing and has no default, or is no whole number of zero or more.
        """
        for name in names:
            if name in self._values:
                value = self._values[name]
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000_000:
                    raise InputError(
                        f"{self.source}: {name}: {value!r} is not allowed; must be a whole number >= 0"
                    )
                return value
        if default is None:
            raise InputError(f"{self.source}: {names[0]}: is missing; it is required")
        return default

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.whole(*names, default=default)
        if value == 0:
            raise InputError(f"{self.source}: {names[0]}: 0 is not allowed; must be > 0")
        return value

    def layer_count(self, *names: str, default: int | None = None) -> int:
        """How many layers: bounded, for each takes time and memory; none only where 0 is the default."""
        value = self.whole(*names, default=default) if default == 0 else self.size(*names, default=default)
        if value > MAX_LAYERS:
            raise InputError(f"{self.source}: {names[0]}: {value} is not allowed; must be <= {MAX_LAYERS}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.source}: {name}: {value!r} is not allowed; must be a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: {name}: {value!r} is not allowed; must be true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name, default)
        return value if isinstance(value, str) else default

    def items(self, name: str) -> list[Any]:
        """A list; empty when it is not there."""
        value = self._values.get(name, [])
        if not isinstance(value, list | tuple):
            raise InputError(f"{self.source}: {name}: {value!r} is not allowed; must be a list")
        return list(value)

    def per_layer(self, name: str, count: int) -> list[Any]:
        """A list with an entry for each of ``count`` layers (further ones are those of MTP layers)."""
        values = self.items(name)
        if len(values) < count:
            raise InputError(
                f"{self.source}: {name}: {len(values)} entries are not allowed; must be one a layer ({count})"
            )
        return values[:count]

    def section(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        """A nested object; empty when it is not there."""
        value = self._values.get(name)
        return Fields(value if isinstance(value, dict) else {}, f"{self.source}: {name}", defaults)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        return Fields(self._values, self.source, defaults)
