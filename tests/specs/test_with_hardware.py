"""``--hardware``, ``--model`` and ``--tp`` rewrite the instances of any cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servesim.errors import InputError
from servesim.specs.cluster import ClusterSpec, load_cluster
from servesim.specs.cluster_changes import with_hardware, with_options
from servesim.specs.hardware import load_hardware
from servesim.specs.options import RuntimeOptions

TP2 = "configs/cluster/single_node_tp2.json"


def _moved(**changes: object) -> ClusterSpec:
    return with_hardware(load_cluster(TP2), **changes)  # type: ignore[arg-type]


def test_memory_and_links_are_those_of_the_hardware_file() -> None:
    moved, h100 = _moved(hardware="H100"), load_hardware("H100")
    ((_, instance),) = moved.instances
    assert instance.hardware == "H100"
    assert (instance.npu_mem.mem_size, instance.npu_mem.mem_bw) == (79.18, 3350)
    assert h100.link is not None
    assert moved.link_bw == h100.link.bandwidth_gbs
    # an empty all-reduce of two ranks, two passes of one hop, takes the file's latency
    assert moved.link_latency == h100.link.latency_us * 1000 / 2


def test_doing_it_twice_is_doing_it_once() -> None:
    once = _moved(hardware="H200", model="meta-llama/Llama-3.1-70B", tp=4)
    assert with_hardware(once, "H200", "meta-llama/Llama-3.1-70B", 4) == once


def test_a_cluster_already_on_the_hardware_keeps_its_own_figures() -> None:
    assert _moved(hardware="RTXPRO6000") == load_cluster(TP2)
    assert _moved() == load_cluster(TP2)


def test_the_degree_decides_the_number_of_npus() -> None:
    ((_, instance),) = _moved(tp=8).instances
    assert (instance.tp_size, instance.num_npus, instance.pp_size) == (8, 8, 1)


def test_what_an_instance_says_of_its_former_hardware_goes() -> None:
    cluster = load_cluster(TP2)
    ((_, instance),) = cluster.instances
    own = instance.model_copy(update={"num_gpu_blocks": 100, "block_size": 32})
    node = cluster.nodes[0].model_copy(update={"instances": (own,)})
    ((_, moved),) = with_hardware(cluster.model_copy(update={"nodes": (node,)}), "H100").instances
    assert moved.num_gpu_blocks is None
    assert moved.block_size == 32


def test_the_flags_say_the_same() -> None:
    options = RuntimeOptions(hardware="B200", model="Qwen/Qwen3-8B", tp=1)
    assert with_options(load_cluster(TP2), options) == _moved(hardware="B200", model="Qwen/Qwen3-8B", tp=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [("H1000", r"--hardware: H1000 is not known; did you mean 'H100'\?"), ("zzz", "known: .*H100")],
)
def test_unknown_hardware_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _moved(hardware=name)


def test_keys_that_do_not_carry_over_are_noted() -> None:
    stated = json.loads(Path(TP2).read_text(encoding="utf-8"))
    stated["nodes"][0]["instances"][0] |= {"engine": {"decode_step_overhead_us": 50}, "num_gpu_blocks": 900}
    cluster = load_cluster(stated)
    moved = with_hardware(with_hardware(cluster, hardware="H100"), hardware="H100", tp=4)
    (note,) = moved.notes
    assert note == "--hardware drops engine, num_gpu_blocks of instance 0, stated for what it was before"
    assert with_hardware(cluster, hardware="RTXPRO6000").notes == ()
