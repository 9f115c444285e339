"""Write the fields of published configs that the program reads: configs/model/ORG/NAME.json.

    python benchmarks/ship_model_configs.py FOLDER ORG/NAME [FOLDER ORG/NAME ...]

FOLDER holds the published ``config.json``. Kept are the fields that reading the model asks for; the model
that is read from them must be the one of the whole file. A config whose fields are longer than LONGEST
characters (lists of quantised modules) is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from servesim.errors import InputError  # noqa: E402
from servesim.specs.model import _ALIASES, ModelSpec, model_from_config  # noqa: E402
from tests.golden import make_model_fields  # noqa: E402

LONGEST = 31_000
READ = {*ModelSpec.model_fields, *_ALIASES} - {"name", "path", "layers"} | {
    "use_sliding_window",
    "max_window_layers",
}
_TEXT = ("text_config", "language_config", "llm_config")


def fields_of(config: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a config, in its own order."""
    kept = make_model_fields.trimmed(config)

    def with_read(whole: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in whole.items():
            if key in _TEXT and isinstance(value, dict):
                found[key] = with_read(value, cut.get(key, {}))
            elif key in cut:
                found[key] = cut[key]
            elif key in READ and value is not None:
                found[key] = value
        return found

    return with_read(config, kept)


def text_of(fields: dict[str, Any]) -> str:
    """One field a line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Write every config that can be cut down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="FOLDER ORG/NAME", help="a config and the model's name")
    words = parser.parse_args().pairs
    if len(words) % 2:
        parser.error(f"a folder and a name each; {words[-1]} stands alone")
    for folder, name in zip(words[::2], words[1::2], strict=True):
        config = json.loads((Path(folder) / "config.json").read_text())
        try:
            whole = model_from_config(config, name, name)
            fields = fields_of(config)
            if re.search(r"fp8|fp4|int4|awq|gptq", name.lower()) and whole.layers.formats.method is None:
                raise InputError("named after a format that no field tells; it lies in hf_quant_config.json")
            again = model_from_config(json.loads(text_of(fields)), name, name)
        except InputError as error:
            print(f"{name}: left out: {error}")
            continue
        assert (again, again.layers) == (whole, whole.layers), name
        if len(text_of(fields)) > LONGEST:
            print(f"{name}: {len(text_of(fields))} characters, left out")
            continue
        out = ROOT / "configs/model" / f"{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text_of(fields))


if __name__ == "__main__":
    main()
