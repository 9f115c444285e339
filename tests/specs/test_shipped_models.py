"""Every config that is shipped loads, and weighs what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from servesim.specs.model import known_models, load_model

SHIPPED = [name for name in known_models() if not name.startswith("servesim/")]
FOLDER = Path(__file__).parents[2] / "configs/model"
NAMED_OTHERWISE = {
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "mistralai/Mixtral-8x22B-v0.1": 140.6,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 401.6,
}
"""Billions of parameters as published, where the name does not end in them."""


def billions(name: str) -> float | None:
    """As a name says it; None: it does not."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name.split("/")[1].lower())
    return NAMED_OTHERWISE.get(name) or (float(found[1]) if found else None)


def test_many_published_models_are_shipped() -> None:
    assert len(SHIPPED) >= 55


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_loads_and_weighs_as_named(name: str) -> None:
    model = load_model(name)
    assert len(model.layers.layers) == model.num_hidden_layers
    named = billions(name)
    if named is not None:
        assert model.layers.parameters() / 1e9 == pytest.approx(named, rel=0.16, abs=0.15)


@pytest.mark.parametrize("name", [name for name in SHIPPED if re.search(r"-(FP8|NVFP4|MXFP4|AWQ)", name)])
def test_a_format_in_the_name_is_that_of_the_weights(name: str) -> None:
    assert load_model(name).layers.formats.method is not None


def test_shipped_configs_are_fields_only() -> None:
    for name in SHIPPED:
        assert (FOLDER / f"{name}.json").stat().st_size < 32_000


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ("google/gemma-3-27b", "google/gemma-3-27b-it"),
        ("Qwen/Qwen3-Next-80B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
    ],
)
def test_a_shipped_sibling_is_found(asked: str, known: str) -> None:
    assert load_model(asked) == load_model(known)
