"""The shipped JSON Schema is the one the models give."""

from __future__ import annotations

import json

import pytest

from servesim.specs import paths
from servesim.specs.cluster import InstanceSpec, NodeSpec
from servesim.specs.dtypes import KV_CACHE_DTYPES
from servesim.specs.schema import SCHEMA_FILE, cluster_schema, main


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((paths.packaged_data_dir() / SCHEMA_FILE).read_text(encoding="utf-8"))
    made = cluster_schema()
    assert shipped == made, "run: python -m servesim.specs.schema"


def test_the_command_writes_the_schema(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    target = tmp_path / "schema.json"
    monkeypatch.setattr("sys.argv", ["schema", str(target)])
    assert main() == 0
    assert json.loads(target.read_text()) == cluster_schema()
    assert list(tmp_path.iterdir()) == [target]


def test_editors_refuse_unknown_keys_and_complete_known_ones() -> None:
    definitions = cluster_schema()["$defs"]
    for name, model in (("InstanceSpec", InstanceSpec), ("NodeSpec", NodeSpec)):
        assert definitions[name]["additionalProperties"] is False
        assert set(definitions[name]["properties"]) == set(model.model_fields)


def test_either_degree_is_enough_for_an_editor_too() -> None:
    instance = cluster_schema()["$defs"]["InstanceSpec"]
    assert {"model_name", "hardware", "pd_type"} == set(instance["required"])
    assert instance["anyOf"] == [{"required": ["num_npus"]}, {"required": ["tp_size"]}]


def test_the_aliases_of_fp8_are_offered() -> None:
    text = json.dumps(cluster_schema()["$defs"]["InstanceSpec"]["properties"]["kv_cache_dtype"])
    assert all(word in text for word in KV_CACHE_DTYPES)


def test_an_editor_shows_what_an_option_does() -> None:
    properties = cluster_schema()["$defs"]["InstanceSpec"]["properties"]
    assert properties["block_size"]["description"] == "tokens per KV block; wins over --block-size"
