"""The JSON Schema of cluster configs, for editors; rewrite it with ``python -m servesim.specs.schema``."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from servesim.specs.annotated import Declared, split
from servesim.specs.checked import Checked
from servesim.specs.cluster import ClusterSpec
from servesim.specs.dtypes import KV_CACHE_DTYPES
from servesim.specs.engine_options import EngineOptions
from servesim.specs.flags import flag_name, flag_of
from servesim.specs.paths import packaged_data_dir

SCHEMA_FILE = "configs/cluster/schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def cluster_schema() -> dict[str, Any]:
    """The schema generated from :class:`~servesim.specs.cluster.ClusterSpec`."""
    definitions: dict[str, Any] = {}
    schema = _of_class(ClusterSpec, definitions)
    schema = {"$defs": dict(sorted(definitions.items())), **schema}
    schema["$schema"] = _DIALECT
    schema["title"] = "servesim cluster config"
    schema["properties"]["$schema"] = {"type": "string"}
    instance = schema["$defs"]["InstanceSpec"]
    # The loader fills in whichever of the two is left out; a schema says it with anyOf.
    instance["required"] = [name for name in instance["required"] if name not in ("num_npus", "tp_size")]
    instance["anyOf"] = [{"required": ["num_npus"]}, {"required": ["tp_size"]}]
    instance["properties"]["kv_cache_dtype"]["anyOf"][0]["enum"] = list(KV_CACHE_DTYPES)
    for name, field in EngineOptions.model_fields.items():
        flag = flag_of(field)
        if flag is not None:
            instance["properties"][name]["description"] = f"{flag.help}; wins over {flag_name(name)}"
    return schema


def _of_class(model: type[Checked], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class; those of the classes in its fields go to ``definitions``."""
    properties, required = {}, []
    for field in model.model_fields.values():
        found = _of_type(field.annotation, field.metadata, definitions)
        found |= {"description": field.said.description} if field.said.description else {}
        if field.is_required:
            required.append(field.key)
        elif field.said.default_factory is None:
            default = field.default
            found["default"] = default.model_dump(mode="json") if isinstance(default, Checked) else default
            if default == ():
                found["default"] = []
        if "$ref" not in found:
            found["title"] = field.key.replace("_", " ").title()
        properties[field.key] = found
    made = {
        "additionalProperties": False,
        "description": inspect.cleandoc(model.__doc__ or ""),
        "properties": properties,
        "required": required,
        "title": model.__name__,
        "type": "object",
    }
    return made if required else {key: value for key, value in made.items() if key != "required"}


def _of_type(annotation: Any, metadata: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    inner, more = split(annotation)
    found = _of_plain_type(inner, definitions)
    for entry in (*more, *metadata):
        if isinstance(entry, Declared):
            sizes = ("minLength", "maxLength") if found.get("type") == "string" else ("minItems", "maxItems")
            said = {
                "minimum": entry.ge,
                "maximum": entry.le,
                sizes[0]: entry.min_length,
                sizes[1]: entry.max_length,
                "pattern": entry.pattern,
                "description": entry.description,
            }
            found |= {word: value for word, value in said.items() if value is not None}
    return found


def _of_plain_type(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        if annotation.__name__ not in definitions:
            definitions[annotation.__name__] = _of_class(annotation, definitions)
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    if origin is Literal:
        return {"enum": list(arguments), "type": "string"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of_type(member, (), definitions) for member in arguments]}
    if origin is tuple:
        return {"items": _of_type(arguments[0], (), definitions), "type": "array"}
    if origin is dict:
        names = {
            word: value for word, value in _of_type(arguments[0], (), definitions).items() if word != "type"
        }
        values = {"additionalProperties": _of_type(arguments[1], (), definitions), "type": "object"}
        return values | ({"propertyNames": names} if names else {})
    return {"type": _WORDS[annotation]}


def schema_text() -> str:
    """The schema file's content."""
    return json.dumps(cluster_schema(), indent=2) + "\n"


def main() -> int:
    """Write the schema of a source checkout, or to the path given."""
    parser = argparse.ArgumentParser(description="Write the JSON Schema of cluster configs.")
    parser.add_argument("path", nargs="?", type=Path, help="file to write (default: that of the checkout)")
    path = parser.parse_args().path or packaged_data_dir() / SCHEMA_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(schema_text(), encoding="utf-8")
    temporary.replace(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
