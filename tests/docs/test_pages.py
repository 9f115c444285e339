"""The reference pages leave nothing out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

import pytest

import servesim
from docs import refresh
from servesim.profiler.bundle_writer import HEADERS
from servesim.results.csv import COLUMNS
from servesim.results.steps import FILE_COLUMNS
from servesim.specs.checked import Checked
from servesim.specs.cluster import ClusterSpec
from servesim.specs.engine_options import OwnOptions
from servesim.workload.jsonl import REQUEST_KEYS, SESSION_KEYS, SUB_REQUEST_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator


def _terms(page: str) -> set[str]:
    """Everything that a page sets as code, outside its blocks."""
    text = (refresh.ROOT / "docs" / page).read_text(encoding="utf-8")
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)))


def _models(annotation: Any) -> Iterator[type[Checked]]:
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _keys(model: type[Checked]) -> set[str]:
    """Names of the fields of a model and of the models in it."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            found |= _keys(inner)
    return found


def test_every_key_of_a_cluster_config_is_explained() -> None:
    power = set(re.findall(r"\w+", (refresh.ROOT / "docs/power.md").read_text(encoding="utf-8")))
    assert _keys(ClusterSpec) - _terms("cluster-config.md") - power == set()


def test_the_options_of_an_instance_are_in_one_table() -> None:
    text = (refresh.ROOT / "docs/cluster-config.md").read_text(encoding="utf-8")
    table = text.partition("## Options per instance")[2].partition("vLLM's names")[0]
    named = re.findall(r"`([a-z_]+)`", table)
    assert sorted(named) == sorted(OwnOptions.model_fields)


def test_every_table_of_a_bundle_is_named() -> None:
    text = (refresh.ROOT / "docs/bundles.md").read_text(encoding="utf-8")
    assert [name for name in HEADERS if f" {name} " not in text and f"/{name} " not in text] == []


def test_every_key_of_a_workload_line_is_explained() -> None:
    assert {*REQUEST_KEYS, *SESSION_KEYS, *SUB_REQUEST_KEYS} - _terms("workloads.md") == set()


@pytest.mark.parametrize("columns", [COLUMNS, FILE_COLUMNS], ids=["requests", "steps"])
def test_every_column_is_explained(columns: tuple[str, ...]) -> None:
    assert set(columns) - _terms("output.md") == set()


def test_every_figure_of_the_summary_is_explained() -> None:
    summary = servesim.simulate(num_reqs=3).summary
    terms = _terms("output.md")
    statistics = re.compile("|".join(term for term in terms if re.fullmatch(r"[a-z0-9]+_", term)))
    latencies = {term for term in terms if term.endswith("_ms")}
    unexplained = {
        key for key in summary if key not in terms and statistics.sub("", key, count=1) not in latencies
    }
    assert unexplained == set()
    assert {key for part in ("kv_cache", "prefix_cache") for key in summary[part]} - terms == set()


def test_every_part_of_the_public_api_is_named() -> None:
    terms = " ".join(_terms("python-api.md")) + (refresh.ROOT / "docs/python-api.md").read_text("utf-8")
    assert [name for name in servesim.__all__ if name not in terms and name != "__version__"] == []
