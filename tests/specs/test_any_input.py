"""Whatever stands in a config, the answer is what it describes or one InputError: nothing else is raised."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.specs.cluster import load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.model import model_from_config
from servesim.specs.options import RuntimeOptions
from servesim.specs.reading import parse_json_object
from tests.fuzz.mutate import places
from tests.specs.clusters import cluster, instance, model_config, node, npu_mem

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**18, 10**60)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FULL = cluster(
    nodes=[
        node(
            instance(
                npu_mem=npu_mem(mem_util=0.9, reserve=1),
                pp_size=1,
                ep_size=1,
                dp_group="A",
                placement={"default": {"weights": "npu"}, "blocks": [{"blocks": "0-3", "kv_loc": "cpu"}]},
                engine={"cudagraph": True},
                dtype="bfloat16",
                max_num_seqs=4,
            ),
            power={"base_node_power": 60, "nic": {"num_nics": 1, "idle_power": 5}},
        )
    ],
    cxl_mem={"mem_size": 1, "mem_bw": 1, "mem_latency": 0},
)


def with_junk(value: dict[str, Any], place: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    changed = copy.deepcopy(value)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    return changed


def answered(call: Any, *arguments: Any) -> None:
    """The call returns, or raises an InputError with something to read."""
    message = "fine"
    try:
        call(*arguments)
    except InputError as error:
        message = str(error)
    assert message.strip()
    assert "pydantic" not in message


def test_the_config_that_is_spoilt_is_good() -> None:
    check_cluster(load_cluster(FULL))


@given(st.sampled_from(places(FULL)), JUNK)
def test_any_value_anywhere_in_a_cluster(place: tuple[Any, ...], junk: Any) -> None:
    answered(lambda: check_cluster(load_cluster(with_junk(FULL, place, junk))))


@settings(deadline=None)  # files are read where a key is left out
@given(st.sampled_from(places(FULL)))
def test_any_key_left_out_of_a_cluster(place: tuple[Any, ...]) -> None:
    changed = copy.deepcopy(FULL)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    answered(lambda: check_cluster(load_cluster(changed)))


@given(
    st.dictionaries(
        st.sampled_from([*model_config(), "num_experts", "layer_types", "head_dim"]), JUNK, max_size=4
    )
)
def test_any_value_in_a_model(changes: dict[str, Any]) -> None:
    answered(model_from_config, {**model_config(), **changes}, "tiny", "config.json")


@given(st.dictionaries(st.sampled_from(list(RuntimeOptions.model_fields)), JUNK, max_size=3))
def test_any_value_of_any_option(changes: dict[str, Any]) -> None:
    answered(lambda: RuntimeOptions(**changes))


@given(st.integers(0, len(json.dumps(FULL)) - 1))
def test_a_cluster_cut_anywhere_is_told_with_its_place(length: int) -> None:
    with pytest.raises(InputError, match=r"^c\.json: line 1"):
        parse_json_object(json.dumps(FULL)[:length], "c.json")


@given(st.text(max_size=30))
def test_any_text_is_no_crash(text: str) -> None:
    answered(parse_json_object, text, "c.json")
