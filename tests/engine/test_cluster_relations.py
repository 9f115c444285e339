"""What two runs of a cluster have to do with one another: names, places and ways of saying are no matter,
and better hardware is never worse for a lone request."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.api import simulate
from servesim.workload.request import Request, Workload
from tests.engine.test_properties import workloads
from tests.engine.toy_world import HARDWARE, MOE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.results.result import Result

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
policies = st.sampled_from(["LOAD", "RR", "PREFIX"])


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        for kind, suffix in (("profiler/perf/Toy/org/toy", ""), ("configs/model/org/toy", ".json")):
            renamed = root / f"{kind.replace('org/toy', 'else/where')}{suffix}"
            renamed.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copy if suffix else shutil.copytree)(root / f"{kind}{suffix}", renamed)
        shutil.copytree(root / "profiler/perf/Toy", root / "profiler/perf/Other")
        yield


def everything(result: Result) -> Any:
    return result.requests.tolist(), result.steps.tolist()


@few
@given(workloads(longest=60), policies, st.integers(1, 3))
def test_nodes_are_no_matter_to_those_alone(workload: Workload, policy: str, count: int) -> None:
    """Instances that share nothing act alike on one node and on a node each."""
    described = [toy_instance() for _ in range(count + 1)]
    one = simulate(toy_cluster(described), workload, request_routing_policy=policy)
    each = simulate(
        toy_cluster(*([instance] for instance in described)), workload, request_routing_policy=policy
    )
    assert everything(one) == everything(each)


@few
@given(workloads(longest=60), st.integers(2, 3))
def test_copies_are_instances_side_by_side(workload: Workload, count: int) -> None:
    copies = simulate(toy_cluster([toy_instance()]), workload, dp=count)
    side_by_side = simulate(toy_cluster([toy_instance() for _ in range(count)]), workload)
    assert everything(copies) == everything(side_by_side)


@few
@given(workloads(longest=60))
def test_names_are_no_matter(workload: Workload) -> None:
    """The same model, and the same accelerator, under another name."""
    usual = everything(simulate(toy_cluster([toy_instance()]), workload))
    assert everything(simulate(toy_cluster([toy_instance("else/where")]), workload)) == usual
    assert everything(simulate(toy_cluster([toy_instance(hardware="Other")]), workload)) == usual


VALUES: dict[str, Any] = {
    "dtype": "fp8",
    "kv_cache_dtype": "fp8",
    "block_size": 32,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 130,
    "max_model_len": 400,
    "long_prefill_token_threshold": 30,
    "enable_chunked_prefill": True,
    "npu_memory_utilization": 0.5,
    "num_gpu_blocks": 60,
    "reserve_full_isl": False,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "max_num_active_seqs": 3,
    "max_num_scheduled_tokens": 50,
    "prefill_schedule_interval": 3,
    "watermark": 0.2,
    "cudagraph": False,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_key_says_what_its_flag_says(name: str) -> None:
    made = [Request(index, 90 + 7 * index, 30, index * 100_000) for index in range(12)]
    instance = {key: value for key, value in toy_instance().items() if key != "num_gpu_blocks"}
    by_key = simulate(toy_cluster([{**instance, name: VALUES[name]}]), Workload(made, "made"))
    by_flag = simulate(toy_cluster([instance]), Workload(made, "made"), **{name: VALUES[name]})
    assert everything(by_key) == everything(by_flag)
    assert by_key.summary["kv_cache"] == by_flag.summary["kv_cache"]


@few
@given(workloads(longest=60), st.sampled_from(["auto", "fp8"]), st.sampled_from([0.0005, 0.02]))
def test_blocks_may_be_counted_by_hand(workload: Workload, kv: str, reserve: float) -> None:
    """The number that the memory plan comes to, given as one, is the same run."""
    instance = toy_instance(npu_mem={"mem_size": 0.03, "reserve": reserve}, kv_cache_dtype=kv)
    del instance["num_gpu_blocks"]
    derived = simulate(toy_cluster([instance]), workload)
    count = derived.summary["kv_cache"]["blocks"]
    assert everything(simulate(toy_cluster([instance]), workload, num_gpu_blocks=count)) == everything(
        derived
    )


def lone(**how: Any) -> Workload:
    return Workload([Request(0, how.get("prompt", 200), how.get("output", 20), 0)], "lone")


SPREAD = {
    "ranks": [toy_instance(tp_size=2)],
    "stages": [toy_instance(pp_size=3)],
    "members": [toy_instance(MOE, ep_size=2, dp_group="A") for _ in range(2)],
    "sides": [toy_instance(pd_type="prefill"), toy_instance(pd_type="decode")],
}


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize(
    ("key", "values"), [("link_bw", [0.001, 0.1, 1, 40, 900]), ("link_latency", [10**6, 10**4, 500, 0])]
)
def test_better_links_are_never_worse(name: str, key: str, values: list[float]) -> None:
    """For a lone request, whose steps nothing can reorder; each link matters somewhere."""
    times = [
        simulate(toy_cluster(deepcopy(SPREAD[name]), **{key: value}), lone()).requests[0] for value in values
    ]
    for figure in ("TTFT", "latency"):
        found = [int(each[figure]) for each in times]
        assert found == sorted(found, reverse=True)
    assert times[0]["latency"] > times[-1]["latency"]


def test_a_longer_prompt_or_answer_never_ends_earlier() -> None:
    for key in ("prompt", "output"):
        ends = [
            int(simulate(toy_cluster([toy_instance()]), lone(**{key: n})).requests[0]["latency"])
            for n in (2, 3, 15, 16, 17, 100, 255, 256, 257, 900)
        ]
        assert ends == sorted(ends)


def test_energy_is_the_sum_of_its_parts_and_follows_the_watts() -> None:
    """Twice the power of every device, and of every bit: twice the joules, in the same time."""
    npu = {"idle_power": 30, "standby_power": 90, "active_power": 600, "standby_duration": 0.001}
    power = {
        "base_node_power": 150,
        "npu": {HARDWARE: npu},
        "cpu": {"idle_power": 90, "active_power": 280, "util": 0.7},
        "dram": {"dimm_size": 64, "idle_power": 3, "energy_per_bit": 20},
        "link": {"num_links": 1, "idle_power": 2, "energy_per_bit": 10},
        "nic": {"num_nics": 1, "idle_power": 20},
        "storage": {"num_devices": 2, "idle_power": 5},
    }

    def doubled(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: doubled(each, key) for key, each in value.items()}
        return value * 2 if "power" in name or name == "energy_per_bit" else value

    made = Workload([Request(index, 200, 20, index * 3_000_000) for index in range(8)], "made")
    found = []
    for watts in (power, doubled(power)):
        described = toy_cluster([toy_instance(tp_size=2)])
        described["nodes"][0]["power"] = watts
        found.append(simulate(described, made).summary["energy"])
    once, twice = found
    assert once is not None
    assert twice is not None
    for energy in found:
        for node in energy["per_node"]:
            assert sum(node["devices_j"].values()) == pytest.approx(node["total_j"])
            assert sum(each["energy_j"] for each in node["npus"]) == pytest.approx(node["devices_j"]["npu"])
        assert sum(node["total_j"] for node in energy["per_node"]) == pytest.approx(energy["total_j"])
    assert twice["total_j"] == pytest.approx(2 * once["total_j"])
    assert twice["j_per_output_token"] == pytest.approx(2 * once["j_per_output_token"])


def test_one_trace_in_every_form_is_one_run() -> None:
    """JSON lines, packed or not, columns of any name and unit, and the forms of public traces."""
    made = [Request(index, 40 + 13 * index, 5 + index, index * 7_000_000) for index in range(20)]
    usual = everything(simulate(toy_cluster([toy_instance()]), Workload(made, "made")))
    own = [
        {
            "input_toks": each.input_tokens,
            "output_toks": each.output_tokens,
            "arrival_time_ns": each.arrival_ns,
        }
        for each in made
    ]
    blocks = [[1000 * each.index + n for n in range(-(-each.input_tokens // 512))] for each in made]
    mooncake = [
        {
            "timestamp": each.arrival_ns // 10**6,
            "input_length": each.input_tokens,
            "output_length": each.output_tokens,
            "hash_ids": ids,
        }
        for each, ids in zip(made, blocks, strict=True)
    ]
    azure = "".join(
        f"2024-05-10 00:00:{each.arrival_ns / 1e9:09.6f}+00:00,{each.input_tokens},{each.output_tokens}\n"
        for each in made
    )
    named = "".join(f"{each.output_tokens},{each.arrival_ns // 1000},{each.input_tokens}\n" for each in made)
    forms = {
        "own.jsonl": ("".join(json.dumps(each) + "\n" for each in own), {}),
        "mooncake.jsonl": ("".join(json.dumps(each) + "\n" for each in mooncake), {}),
        "azure.csv": (f"TIMESTAMP,ContextTokens,GeneratedTokens\n{azure}", {}),
        "named.csv": (f"o,at,i\n{named}", {"columns": "input=i,output=o,arrival=at:us"}),
    }
    for name, (text, how) in forms.items():
        Path(name).write_text(text, encoding="utf-8")
        assert everything(simulate(toy_cluster([toy_instance()]), name, **how)) == usual, name
