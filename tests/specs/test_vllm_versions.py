"""``--vllm-version``: what it selects, and where it is told."""

from __future__ import annotations

from typing import Any

import pytest

from servesim import simulate
from servesim.engine.build import limits_of
from servesim.errors import InputError
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import InstanceOptions, resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.vllm_versions import DIFFERENCES, NEWEST, VERSIONS, table


def resolved(**flags: Any) -> InstanceOptions:
    cluster = load_cluster(RuntimeOptions().cluster_config)
    (_, instance), *_ = cluster.instances
    return resolve(RuntimeOptions(**flags), instance, load_model(instance.model_name))


@pytest.mark.parametrize(
    ("version", "caps"), [("0.24", True), ("0.30", True), ("0.31", False), ("v0.33.0", False)]
)
def test_a_lone_prompt_is_capped_up_to_0_30(version: str, caps: bool) -> None:
    options = resolved(vllm_version=version, long_prefill_token_threshold=64)
    assert limits_of(options, skip_prefill=False, num_blocks=100).caps_lone_prefill is caps


def test_the_cap_shows_in_a_run() -> None:
    flags: dict[str, Any] = {"long_prefill_token_threshold": 128, "request_rate": 0.05, "num_reqs": 3}
    steps = {version: simulate(vllm_version=version, **flags).steps for version in ("0.28", "0.33")}
    assert steps["0.28"]["prefill_tokens"].max() == 128
    assert steps["0.33"]["prefill_tokens"].max() > 128


def test_memory_is_planned_as_the_version_only_when_given() -> None:
    plans = {version: simulate(num_reqs=2, **flags).summary for version, flags in PLANS.items()}
    assert plans["0.33"]["kv_cache"]["tokens"] < plans["default"]["kv_cache"]["tokens"]
    assert plans["default"]["versions"]["vllm"] == NEWEST
    assert plans["0.24"]["versions"]["vllm"] == "0.24"
    assert plans["0.24"]["instances"][0]["options"]["vllm_version"] == "0.24"


PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "0.24": {"vllm_version": "0.24"},
    "0.33": {"vllm_version": "0.33"},
}


@pytest.mark.parametrize("wrong", ["0.23", "0.34", "1.0", "33", 0.33, "0.33 "])
def test_other_versions_are_refused_with_those_known(wrong: object) -> None:
    with pytest.raises(InputError, match=r"must be one of 0\.24, 0\.25"):
        RuntimeOptions(vllm_version=wrong)


def test_differences_name_known_versions() -> None:
    for difference in DIFFERENCES:
        assert difference.since in VERSIONS[1:]
        assert not difference.holds(VERSIONS[0])
        assert difference.holds(NEWEST)


def test_the_list_of_differences_leaves_none_out() -> None:
    told = " ".join(line[5:].strip() for line in table().splitlines())
    assert [difference.what for difference in DIFFERENCES if difference.what not in told] == []
    since = [line[:5].strip() for line in table().splitlines()]
    assert len(list(filter(None, since))) == len(DIFFERENCES)


def test_tables_of_a_far_version_are_told(caplog: pytest.LogCaptureFixture) -> None:
    flags: dict[str, Any] = {"num_reqs": 2, "hardware": "H100", "model": "meta-llama/Llama-3.1-8B"}
    simulate(vllm_version="0.25", **flags)
    assert "minor versions from" not in caplog.text
    simulate(vllm_version="0.33", **flags)
    assert "of vLLM 0.24.0, 9 minor versions from --vllm-version 0.33" in caplog.text
