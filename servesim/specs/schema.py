"""The JSON Schema of cluster configs, for editors; rewrite it with ``python -m servesim.specs.schema``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import VERSION
from pydantic.json_schema import GenerateJsonSchema

from servesim.specs.cluster import ClusterSpec
from servesim.specs.dtypes import KV_CACHE_DTYPES
from servesim.specs.flags import flag_name, flag_of
from servesim.specs.options import RuntimeOptions, per_instance_fields
from servesim.specs.paths import packaged_data_dir

SCHEMA_FILE = "configs/cluster/schema.json"


def cluster_schema() -> dict[str, Any]:
    """The schema generated from :class:`~servesim.specs.cluster.ClusterSpec`."""
    schema = ClusterSpec.model_json_schema(mode="validation", schema_generator=GenerateJsonSchema)
    schema["$schema"] = GenerateJsonSchema.schema_dialect
    schema["$comment"] = f"generated with pydantic {VERSION}; spelling differs a little between its releases"
    schema["title"] = "servesim cluster config"
    schema["properties"]["$schema"] = {"type": "string"}
    instance = schema["$defs"]["InstanceSpec"]
    # The loader fills in whichever of the two is left out; a schema says it with anyOf.
    instance["required"] = [name for name in instance["required"] if name not in ("num_npus", "tp_size")]
    instance["anyOf"] = [{"required": ["num_npus"]}, {"required": ["tp_size"]}]
    instance["properties"]["kv_cache_dtype"]["anyOf"][0]["enum"] = list(KV_CACHE_DTYPES)
    for name in per_instance_fields():
        flag = flag_of(RuntimeOptions.model_fields[name])
        if flag is not None:
            instance["properties"][name]["description"] = f"{flag.help}; wins over {flag_name(name)}"
    return schema


def schema_text() -> str:
    """The schema file's content."""
    return json.dumps(cluster_schema(), indent=2) + "\n"


def main() -> int:
    """Write the schema of a source checkout, or to the path given."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else packaged_data_dir() / SCHEMA_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(schema_text(), encoding="utf-8")
    temporary.replace(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
