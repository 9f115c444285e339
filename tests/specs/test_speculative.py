"""vLLM's JSON for speculative decoding, and where the acceptance of drafts comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servesim.errors import InputError
from servesim.specs.options import RuntimeOptions
from servesim.specs.speculative import PUBLISHED, SpeculativeSpec, speculative_spec


def spec(acceptance: str | None = None, **entries: Any) -> SpeculativeSpec:
    config = {"method": "ngram", "num_speculative_tokens": 3, **entries}
    found = speculative_spec(json.dumps(config), acceptance)
    assert found is not None
    return found


def test_nothing_asked_for_is_nothing() -> None:
    assert speculative_spec(None) is None


@pytest.mark.parametrize("method", ["ngram", "eagle", "eagle3", "mtp", "draft_model"])
def test_every_method_has_a_published_acceptance(method: str) -> None:
    found = spec(method=method, model="a drafter", num_speculative_tokens=7)
    assert len(found.rates) == 7
    assert list(found.rates) == sorted(found.rates, reverse=True)
    assert found.source.startswith(PUBLISHED[method].source)
    assert ("beyond" in found.source) == (len(PUBLISHED[method].rates) > 1)
    assert found.rates[0] == pytest.approx(PUBLISHED[method].rates[0])


def test_vllms_own_keys_say_the_acceptance() -> None:
    assert spec(synthetic_acceptance_rates=[0.9, 0.5, 0.1]).rates == (0.9, 0.5, 0.1)
    assert spec(synthetic_acceptance_length=2.25).rates == (1.0, 0.25, 0.0)
    assert spec(synthetic_acceptance_length=2.25).acceptance_length == 2.25


def test_rates_come_from_the_option_too(tmp_path: Path) -> None:
    assert spec("0.8,0.4,0.2").rates == (0.8, 0.4, 0.2)
    assert spec("decay=0.5").rates == (0.5, 0.25, 0.125)
    file = tmp_path / "rates.json"
    file.write_text('{"rates": [0.8], "decay": 0.5, "source": "our own logs"}')
    found = spec(str(file))
    assert (found.rates, found.source) == ((0.8, 0.4, 0.2), "our own logs")


def test_a_method_is_found_as_vllm_finds_it() -> None:
    config = {"num_speculative_tokens": 2}
    for model, method in (("ngram", "ngram"), ("org/EAGLE3-x", "eagle3"), ("org/small", "draft_model")):
        found = speculative_spec(json.dumps({**config, "model": model}))
        assert found is not None
        assert found.method == method


@pytest.mark.parametrize(
    ("entries", "acceptance", "told"),
    [
        ({"method": "medusa"}, None, "medusa is not simulated"),
        ({"method": "magic"}, None, "must be one of"),
        ({"num_speculative_tokens": 0}, None, "must be a number from 1"),
        ({"method": "eagle"}, None, "needs the drafter's name"),
        ({"parallel_drafting": True}, None, "parallel_drafting is not simulated"),
        ({"synthetic_acceptance_rates": [0.5]}, None, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": [0.5, 0.6, 0.1]}, None, "must not be above the one before"),
        ({"synthetic_acceptance_rates": [0.5, 0.4, 2]}, None, "from 0 to 1"),
        ({"synthetic_acceptance_length": 9}, None, "must be 1 to 4"),
        ({"synthetic_acceptance_length": 2}, "0.5,0.4,0.1", "leave one out"),
        ({}, "0.5", "must be 3 numbers"),
        ({}, "decay=x", "from 0 to 1"),
        ({}, "no/such.json", "no such file"),
    ],
)
def test_what_is_refused(entries: dict[str, Any], acceptance: str | None, told: str) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=told):
        spec(acceptance, **entries)


def test_keys_without_influence_are_noted() -> None:
    assert spec(prompt_lookup_max=4).notes == ("--speculative-config: prompt_lookup_max: without influence",)


def test_options_take_a_mapping_as_well() -> None:
    options = RuntimeOptions(speculative_config={"method": "ngram", "num_speculative_tokens": 1})
    assert json.loads(options.speculative_config or "") == {"method": "ngram", "num_speculative_tokens": 1}
