"""Write the fields of published configs that the layer list reads: tests/golden/models/NAME.json.

    python tests/golden/make_model_fields.py CONFIGS NAME...

CONFIGS is a folder of folders with a ``config.json`` each. Kept are the fields that reading the model asked
for; models whose lists of quantised modules are long are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from servesim.specs import families
from servesim.specs.families import reading

OUT = Path(__file__).parent / "models"
LONGEST = 4000


class Recording(reading.Fields):
    """Fields that remember which of them were asked for."""

    def __init__(self, config: Any, source: str, defaults: Any = None) -> None:
        super().__init__(config, source, defaults)
        self.asked: set[str] = set()
        self._values = _Watched(self._values, self.asked)

    def section(self, name: str, defaults: Any = None) -> reading.Fields:
        value = self._values.get(name)
        inner = Recording(value if isinstance(value, dict) else {}, self.source, defaults)
        SECTIONS[name] = inner.asked
        return inner

    def with_defaults(self, defaults: Any) -> reading.Fields:
        inner = Recording(dict(self._values), self.source, defaults)
        inner.asked.update(self.asked)
        SECTIONS[""] = inner.asked
        return inner


class _Watched(dict):  # type: ignore[type-arg]
    def __init__(self, values: Any, asked: set[str]) -> None:
        super().__init__(values)
        self._asked = asked

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            self._asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)


SECTIONS: dict[str, set[str]] = {}
ALWAYS = {
    "model_type",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "tie_word_embeddings",
    "text_config",
    "architectures",
}


def trimmed(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that reading it asks for."""
    SECTIONS.clear()
    made: list[Recording] = []

    def fields(values: Any, source: str) -> Recording:
        made.append(Recording(values, source))
        return made[-1]

    with patch("servesim.specs.families.Fields", fields):
        families.read_layers(config, "config.json")
    asked = ALWAYS | SECTIONS.get("", set()) | set().union(*(one.asked for one in made))

    def cut(values: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in values.items():
            if key == "text_config":
                kept[key] = cut(value)
            elif key in SECTIONS and isinstance(value, dict):
                kept[key] = {inner: value[inner] for inner in value if inner in SECTIONS[key]}
            elif key in asked and value is not None:
                kept[key] = value
        return kept

    return cut(config)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[2:]:
        text = json.dumps(trimmed(json.loads((Path(sys.argv[1]) / name / "config.json").read_text())))
        if len(text) > LONGEST:
            print(f"{name}: {len(text)} characters of fields, left out")
            continue
        (OUT / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
