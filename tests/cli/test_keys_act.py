"""Every key of a cluster config that no option names changes a run, or is noted where it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import simulate
from servesim.specs.cluster import ClusterSpec, NpuMemory, ReplicaSpec
from servesim.specs.hardware import EngineSpec
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import MOE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

Keys = dict[str, Any]
ENGINE_ACTS: dict[str, tuple[Any, Keys]] = {
    "eager_launch_us": (50.0, {"cudagraph": False}),
    "prefill_step_overhead_us": (5.0, {}),
    "decode_step_overhead_us": (5.0, {}),
    "host_step_us": (500.0, {}),
    "host_sequence_us": (500.0, {}),
    "front_end_us": (5.0, {}),
    "front_end_jitter_us": (5.0, {}),
}
"""Key of ``engine`` -> a value, and keys of the instance beside it, with which it acts."""
ENGINE_ELSEWHERE = {
    "sustained_tflops_16bit", "sustained_tflops_8bit", "smooth_gemms", "decode_attention_8bit", "cudagraph",
    "tail_in_mixed_steps", "skew_in_mixed_steps", "chunked_attention",
}  # fmt: skip
"""Keys of ``engine`` that act on bundles which ``tests/cost`` makes for them."""
IDLE: dict[str, tuple[Keys, Keys]] = {
    "link_topology": ({}, {"link_topology": "switch"}),
    "collectives": ({}, {"collectives": "links"}),
    "cxl_mem": ({}, {"cxl_mem": {"mem_size": 1, "mem_bw": 60, "mem_latency": 250}}),
    "moe_backend": ({"model": MOE, "moe_backend": "all_to_all"}, {}),
    "npu_mem.mem_util": ({"npu_mem": {"mem_size": 1, "mem_util": 0.5}}, {}),
    "npu_mem.reserve": ({"npu_mem": {"mem_size": 1, "reserve": 0.5}}, {}),
    "engine.eager_launch_us": ({"engine": {"eager_launch_us": 50}}, {}),
    "engine.decode_attention_8bit": ({"engine": {"decode_attention_8bit": 2}}, {}),
    "engine.sustained_tflops_8bit": ({"engine": {"sustained_tflops_8bit": 9}}, {}),
    "engine.sustained_tflops_16bit": ({"dtype": "fp8", "engine": {"sustained_tflops_16bit": 9}}, {}),
    "engine.tail_in_mixed_steps": (
        {"engine": {"tail_in_mixed_steps": False, "skew_in_mixed_steps": True}},
        {},
    ),
}
"""Key -> what an instance, and the cluster, hold where it does not act."""
ALWAYS = {
    "num_nodes", "link_bw", "link_latency", "nodes",
    "model_name", "hardware", "npu_mem", "num_npus", "tp_size", "pp_size", "ep_size", "dp_group", "pd_type",
    "placement", "engine", "mem_size", "mem_bw", "mem_latency",
}  # fmt: skip
"""Keys that say what there is, or are refused where they cannot act."""


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")):
        yield


def some() -> Workload:
    """Six prompts, one every 5 ms."""
    requests = [Request(index, 100 + index, 8 + index, arrival_ns=index * 5_000_000) for index in range(6)]
    return Workload(requests, source="some")


def ran(instance: Keys, cluster: Keys) -> tuple[Any, list[str]]:
    """Times of all requests, and the notes."""
    own = dict(instance)
    result = simulate(toy_cluster([toy_instance(own.pop("model", "org/toy"), **own)], **cluster), some())
    return result.requests.tolist(), result.summary["notes"]


def test_every_key_has_an_entry() -> None:
    named = {name.rpartition(".")[2] for name in IDLE} | set(ENGINE_ACTS) | ENGINE_ELSEWHERE | ALWAYS
    for spec in (ClusterSpec, ReplicaSpec, NpuMemory, EngineSpec):
        assert set(spec.model_fields) <= named


@pytest.mark.parametrize("name", IDLE)
def test_a_key_that_cannot_act_is_noted(name: str) -> None:
    instance, cluster = IDLE[name]
    _, notes = ran(instance, cluster)
    where = f"{name} of instance 0" if name in instance or "." in name else name
    assert [note for note in notes if note.startswith(f"{where} has no effect here: ")], notes


@pytest.mark.parametrize("name", ENGINE_ACTS)
def test_a_constant_of_the_engine_acts_without_a_note(name: str) -> None:
    value, beside = ENGINE_ACTS[name]
    before, _ = ran(beside, {})
    after, notes = ran({**beside, "engine": {name: value}}, {})
    assert after != before
    assert not [note for note in notes if name in note and "no effect" in note]


def test_an_exchange_between_members_acts() -> None:
    """Experts on two members travel between them, so that the way they travel matters."""
    found = []
    for backend in ("allgather_reducescatter", "all_to_all"):
        keys = {"ep_size": 2, "dp_group": "A", "moe_backend": backend}
        result = simulate(toy_cluster([toy_instance(MOE, **keys), toy_instance(MOE, **keys)]), some())
        assert not [note for note in result.summary["notes"] if "moe_backend" in note]
        found.append(result.requests.tolist())
    assert found[0] != found[1]


def test_pim_without_offloaded_attention_is_noted() -> None:
    described = toy_cluster([toy_instance()])
    described["nodes"][0]["cpu_mem"]["pim_config"] = "DDR4_8GB_3200_pim"
    assert [
        note
        for note in simulate(described, some()).summary["notes"]
        if note.startswith("cpu_mem.pim_config of node 0 has no effect here: ")
    ]
