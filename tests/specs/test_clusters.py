"""What a cluster config says, and what may be left out of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.cluster import ClusterSpec, InstanceSpec, load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.engine_options import EngineOptions, OwnOptions
from servesim.specs.flags import flag_of
from servesim.specs.placement import BlockPlacement
from tests.recorded import recorded_path
from tests.specs.clusters import cluster, instance, node

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED = [path for path in paths.find_all("configs/cluster/*.json") if path.name != "schema.json"]
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


def only(loaded: ClusterSpec) -> InstanceSpec:
    [(_, spec)] = loaded.instances
    return spec


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_cluster_is_good(path: Path) -> None:
    check_cluster(load_cluster(path))


@pytest.mark.parametrize("run", ["Llama-3.1-8B", "Qwen3-32B", "Qwen3-30B-A3B-Instruct-2507"])
def test_a_recorded_cluster_is_good(run: str) -> None:
    check_cluster(load_cluster(recorded_path("runs", "RTXPRO6000", run, "cluster.json")))


def test_the_documented_cluster() -> None:
    loaded = load_cluster("configs/cluster/single_node_single_instance.json")
    spec = only(loaded)
    assert (spec.model_name, spec.hardware, spec.num_npus) == ("meta-llama/Llama-3.1-8B", "RTXPRO6000", 1)
    assert (spec.npu_mem.mem_size, spec.npu_mem.mem_bw, spec.npu_mem.mem_util) == (None, None, None)
    assert (loaded.link_bw, loaded.link_latency) == (16, 20000)


def test_either_number_of_npus_or_tp_size_may_be_left_out() -> None:
    given_tp = only(load_cluster(cluster(instance(num_npus=..., tp_size=4, pp_size=2))))
    given_npus = only(load_cluster(cluster(instance(num_npus=8, tp_size=..., pp_size=2))))
    assert (given_tp.num_npus, given_tp.tp_size) == (8, 4)
    assert given_tp == given_npus


def test_links_are_a_number_or_one_per_dimension() -> None:
    one = load_cluster(cluster())
    assert one.link_bandwidths_gbs == (16,)
    several = load_cluster(cluster(link_bw=[450, 50.5], link_latency=[500, 2000]))
    assert several.link_bandwidths_gbs == (450, 50.5)
    assert several.link_latencies_ns == (500, 2000)


def test_instances_are_numbered_node_by_node() -> None:
    nodes = [node(instance(), instance(max_num_seqs=2)), node(instance(max_num_seqs=3))]
    loaded = load_cluster(cluster(num_nodes=2, nodes=nodes))
    assert [(index, spec.max_num_seqs) for index, spec in loaded.instances] == [(0, None), (0, 2), (1, 3)]


def test_every_per_instance_option_stands_in_an_instance() -> None:
    assert EngineOptions.model_fields.keys() == OwnOptions.model_fields.keys()
    for name in OwnOptions.model_fields:
        field = InstanceSpec.model_fields[name]
        assert field.default is None
        assert field.annotation is not None
    values = {"dtype": "fp8", "kv_cache_dtype": "fp8_e5m2", "block_size": 32, "enable_prefix_caching": False}
    spec = only(load_cluster(cluster(instance(**values))))
    assert (spec.dtype, spec.kv_cache_dtype, spec.block_size, spec.enable_prefix_caching) == (
        "fp8",
        "fp8",
        32,
        False,
    )


def test_no_other_option_stands_in_an_instance() -> None:
    carrying = {name for name, field in InstanceSpec.model_fields.items() if flag_of(field) is not None}
    assert carrying <= set(EngineOptions.model_fields)


def test_kv_heads_may_be_replicated() -> None:
    check_cluster(load_cluster(cluster(instance(num_npus=16, tp_size=16))))  # 8 KV heads


def test_experts_spread_over_a_data_parallel_group() -> None:
    member = instance(model_name=MIXTRAL, ep_size=2, dp_group="A")
    check_cluster(load_cluster(cluster(member, member)))
    with pytest.raises(InputError, match="ep_size: 2 is not allowed; must be <= 1"):
        check_cluster(load_cluster(cluster(member)))


def test_an_instance_may_hold_experts_twice_or_share_them() -> None:
    several = instance(model_name=MIXTRAL, num_npus=4, tp_size=4, ep_size=2)
    check_cluster(load_cluster(cluster(several)))
    shared = instance(model_name=MIXTRAL, num_npus=2, tp_size=2, ep_size=4, dp_group="A")
    check_cluster(load_cluster(cluster(shared, shared, shared, shared)))


def test_ranks_are_wired_as_rings_unless_told_otherwise() -> None:
    assert load_cluster(cluster()).link_wirings == ("ring",)
    assert load_cluster(cluster(link_topology="switch")).link_wirings == ("switch",)
    assert load_cluster(cluster(link_topology=["switch", "ring"])).link_wirings == ("switch", "ring")
    with pytest.raises(InputError, match="link_topology"):
        load_cluster(cluster(link_topology="torus"))


def test_members_of_a_group_agree_on_how_tokens_reach_experts() -> None:
    members = [
        instance(model_name=MIXTRAL, ep_size=2, dp_group="A", moe_backend=backend)
        for backend in ("allgather_reducescatter", "all_to_all")
    ]
    with pytest.raises(InputError, match="moe_backend: 'all_to_all' is not allowed"):
        load_cluster(cluster(*members))


def test_prefill_and_decode_instances_of_different_degree() -> None:
    roles = [instance(pd_type="prefill"), instance(pd_type="decode", num_npus=2, tp_size=2)]
    check_cluster(load_cluster(cluster(*roles)))


def test_placement_rules_in_the_documented_forms() -> None:
    placement = {
        "default": {"weights": "npu", "kv_loc": "npu", "kv_evict_loc": "cpu"},
        "blocks": [{"blocks": "0-3", "weights": "cxl:0"}, {"blocks": "8,9,10", "weights": "cpu"}],
        "layers": {"lm_head": {"weights": "cpu"}},
    }
    cxl = {"mem_size": 1024, "mem_bw": 60, "mem_latency": 250, "num_devices": 4}
    loaded = load_cluster(cluster(instance(placement=placement), cxl_mem=cxl))
    check_cluster(loaded)
    rules = only(loaded).placement
    assert rules is not None
    assert [rule.block_indices for rule in rules.blocks] == [[0, 1, 2, 3], [8, 9, 10]]
    assert rules.blocks[0].kv_loc is None


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), min_size=1, max_size=6))
def test_block_ranges_name_each_block_once(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    expected = {block for first, more in ranges for block in range(first, first + more + 1)}
    assert BlockPlacement(blocks=text).block_indices == sorted(expected)


def test_a_file_may_name_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"$schema": "schema.json", **cluster()}))
    assert load_cluster(path).model_dump() == load_cluster(cluster()).model_dump()


def test_a_cluster_cannot_be_changed() -> None:
    loaded = load_cluster(cluster())
    with pytest.raises(AttributeError, match="frozen"):
        loaded.num_nodes = 2  # type: ignore[misc]


def test_a_cluster_remembers_its_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(cluster()))
    assert load_cluster(path).source == str(path)
    assert load_cluster(cluster()).source == "cluster"
