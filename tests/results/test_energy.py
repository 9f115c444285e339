"""Energy of a run, from its step log."""

from __future__ import annotations

import json
from array import array
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import servesim
from servesim.errors import InputError
from servesim.explore.compare import Comparison
from servesim.power.quantities import AJ
from servesim.results import meters
from servesim.results.closing import closing
from servesim.results.energy import MOST_INTERVALS, energy_line, node_meters
from servesim.results.heartbeat import Heartbeat
from servesim.results.records import InstanceLog, RunLog, TierMemory
from servesim.results.result import Result
from servesim.specs.cluster import ClusterSpec, load_cluster
from servesim.specs.cluster_checks import check_cluster
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.hand_made import MS, add_step, instance_options, record
from tests.hand_made import instance as log_of
from tests.specs.clusters import cluster, instance, node

if TYPE_CHECKING:
    from servesim.power.activity import Spans

POWER: dict[str, Any] = {
    "base_node_power": 100,
    "npu": {
        "RTXPRO6000": {"idle_power": 50, "standby_power": 100, "active_power": 600, "standby_duration": 0.5}
    },
    "cpu": {"idle_power": 100, "active_power": 200, "util": 0.5},
    "dram": {"dimm_size": 64, "idle_power": 3, "energy_per_bit": 20},
    "link": {"num_links": 1, "idle_power": 2, "energy_per_bit": 1000},
    "nic": {"num_nics": 1, "idle_power": 20},
    "storage": {"num_devices": 2, "idle_power": 5},
}


def logs_of(spec: ClusterSpec) -> list[InstanceLog]:
    return [
        log_of(index, node=where, spec=each, options=instance_options())
        for index, (where, each) in enumerate(spec.instances)
    ]


def two_steps(spec: ClusterSpec) -> Result:
    """One request of 1000 + 2 tokens: steps from 1.0 to 1.5 s and from 2.5 to 3.0 s of a run of 4 s.

    Nothing arrives before 1 s, and the run is taken to go on to 4 s.
    """
    log = RunLog(logs_of(spec), end_ns=4000 * MS)
    add_step(log.instances[0], 1000, 1500, prefill_tokens=1000, running=1)
    add_step(log.instances[0], 2500, 3000, decode_tokens=1, running=1)
    log.requests = [record(0, 1000, [(0, 0, 1)], log)]
    return Result(log, Workload([Request(0, 1000, 2, 1000 * MS)], "by hand"), RuntimeOptions(), spec)


def one_node(**changes: Any) -> ClusterSpec:
    return load_cluster(cluster(nodes=[node(instance(**changes), power=POWER)]))


def test_a_run_of_two_steps_to_the_joule() -> None:
    energy = two_steps(one_node()).summary["energy"]
    devices = {
        "base": 4 * 100.0,
        "npu": 1.0 * 600 + 2 * 0.5 * 100 + 2 * 50.0,  # 1 s active, twice 0.5 s standby, 2 s idle
        "cpu": 4 * 100 + 1.0 * 50,
        "dram": 8 * 3 * 4.0,
        "link": 2 * 4.0,  # one NPU: nothing moves
        "nic": 80.0,
        "storage": 40.0,
    }
    assert energy["per_node"][0]["devices_j"] == devices
    assert energy["total_j"] == sum(devices.values()) == 400 + 800 + 450 + 96 + 8 + 80 + 40
    assert energy["mean_w"] == 1874 / 4
    assert energy["j_per_output_token"] == 1874 / 2
    assert energy["tokens_per_s_per_w"] == pytest.approx(2 / 1874, abs=1e-9)
    assert energy["per_node"][0]["npus"] == [
        {"instance": 0, "npu": 0, "energy_j": 800.0, "active_s": 1.0, "standby_s": 1.0, "idle_s": 2.0}
    ]
    assert energy["not_modelled"] == []


def test_power_per_interval_sees_standby_reach_into_the_next_one() -> None:
    result = two_steps(one_node())
    always = 100 + 100 + 24 + 2 + 20 + 10
    expected = [
        always + 50.0,
        always + 0.5 * (600 + 50) + 0.5 * 100,
        always + 50 + 0.5 * (600 - 50 + 50),
        always + 0.5 * 100 + 0.5 * 50,
    ]
    series = result.power(1.0)
    assert series["power_w"].tolist() == expected == result.summary["energy"]["per_node"][0]["power_w"]
    assert series["end_ns"].tolist() == [1000 * MS, 2000 * MS, 3000 * MS, 4000 * MS]
    assert result.power(3.0)["end_ns"].tolist() == [3000 * MS, 4000 * MS]
    with pytest.raises(ValueError, match="0 ns is not allowed"):
        result.power(0)


def test_ranks_all_draw_and_pay_for_all_reduces() -> None:
    spec = one_node(num_npus=2, tp_size=2)
    devices = two_steps(spec).summary["energy"]["per_node"][0]["devices_j"]
    assert devices["npu"] == 1600.0
    moved_bytes = 1001 * 64 * 8192 * 2  # tokens x all-reduces x hidden state x (both ranks send it once)
    assert devices["link"] == pytest.approx(8 + moved_bytes * 8 * 1000e-12, abs=1e-6)


def test_pipeline_stages_are_active_in_turn() -> None:
    npus = two_steps(one_node(num_npus=2, pp_size=2)).summary["energy"]["per_node"][0]["npus"]
    assert [npu["active_s"] for npu in npus] == [0.5, 0.5]


def test_a_dummy_batch_costs_as_much_as_a_step_of_one_token() -> None:
    spec = one_node(num_npus=2, tp_size=2)
    result = two_steps(spec)
    dummies = result.instances[0].dummies
    for start_ms, end_ms in ((1500, 1750), (3000, 3250)):
        dummies.start_ns.append(start_ms * MS)
        dummies.end_ns.append(end_ms * MS)
    node = result.summary["energy"]["per_node"][0]
    assert [npu["active_s"] for npu in node["npus"]] == [1.5, 1.5]
    assert node["devices_j"]["cpu"] == 4 * 100 + 1.5 * 50
    moved_bytes = (1001 + 2) * 64 * 8192 * 2
    assert node["devices_j"]["link"] == pytest.approx(8 + moved_bytes * 8 * 1000e-12, abs=1e-6)
    assert sum(result.power(0.4)["power_w"]) > sum(two_steps(spec).power(0.4)["power_w"])
    assert result.summary["instances"][0]["dummy_steps"] == 2


def test_tokens_count_on_the_node_that_decodes_them() -> None:
    sides = node(instance(pd_type="prefill")), node(instance(pd_type="decode"), power=POWER)
    spec = load_cluster(cluster(num_nodes=2, nodes=list(sides)))
    log = RunLog(logs_of(spec), end_ns=4000 * MS)
    for side in log.instances:
        add_step(side, 1000, 1500, decode_tokens=1, running=1)
    log.requests = [record(0, 1000, [(1, 0, 0)], log, instance=0)]
    result = Result(log, Workload([Request(0, 1000, 1, 1000 * MS)], "by hand"), RuntimeOptions(), spec)
    assert result.summary["energy"]["output_tokens"] == 1


def test_a_prefill_instance_sends_its_kv_cache() -> None:
    spec = load_cluster(
        cluster(nodes=[node(instance(pd_type="prefill"), instance(pd_type="decode"), power=POWER)])
    )
    result = two_steps(spec)
    result.instances[0].steps.hit_tokens.put(0, 24)
    result.instances[0].steps.recomputed_tokens.put(0, 5)  # they left before
    devices = result.summary["energy"]["per_node"][0]["devices_j"]
    moved_bytes = (1001 - 5 + 24) * 65536  # the hand-made instance has an fp8 KV cache
    assert devices["link"] == pytest.approx(8 + moved_bytes * 8 * 1000e-12, abs=1e-6)


@pytest.mark.parametrize(
    ("storage", "dram_bytes", "cxl_bytes"),
    [("CPU", 3_000_000_000, 0), ("CXL", 0, 3_000_000_000), ("CXL:2", 0, 3_000_000_000)],
)
def test_a_lower_tier_takes_energy_in_its_memory(storage: str, dram_bytes: int, cxl_bytes: int) -> None:
    cxl = {"num_devices": 2, "idle_power": 10, "energy_per_bit": 40}
    memory = {"mem_size": 256, "mem_bw": 60, "mem_latency": 250, "num_devices": 4}
    result = two_steps(load_cluster(cluster(nodes=[node(power={**POWER, "cxl": cxl})], cxl_mem=memory)))
    log = result.instances[0]
    log.tier = TierMemory(storage, 0, False, 1 << 30, 256, 1 << 20, 256.0, 0)
    log.steps.tier_bytes.put(0, 2_000_000_000)
    log.steps.tier_bytes.put(1, 1_000_000_000)
    devices = result.summary["energy"]["per_node"][0]["devices_j"]
    assert devices["dram"] == pytest.approx(8 * 3 * 4.0 + dram_bytes * 8 * 20e-12, abs=1e-9)
    assert devices["cxl"] == pytest.approx(2 * 10 * 4.0 + cxl_bytes * 8 * 40e-12, abs=1e-9)
    halves = [result.power(0.25)["power_w"][4:6].mean(), result.power(0.5)["power_w"][2]]
    assert halves[0] == pytest.approx(halves[1])


def test_placed_weights_and_kv_take_energy_in_their_memory() -> None:
    rules = [{"blocks": "0-1", "weights": "cpu"}, {"blocks": "1", "kv_loc": "cpu"}]
    result = two_steps(one_node(placement={"blocks": rules}))
    result.instances[0].kv_reads = array("q", (0, 1000))
    devices = result.summary["energy"]["per_node"][0]["devices_j"]
    weights = 2 * 218_112_000  # of a block in 16 bit
    moved_bytes = 2 * 2 * weights + 2048 * (1001 + 1000)  # two steps; KV in fp8: 1001 written, 1000 read
    assert devices["dram"] == pytest.approx(8 * 3 * 4.0 + moved_bytes * 8 * 20e-12, abs=1e-6)
    halves = [result.power(0.25)["power_w"][4:6].mean(), result.power(0.5)["power_w"][2]]
    assert halves[0] == pytest.approx(halves[1])


def test_a_dummy_batch_reads_placed_weights() -> None:
    result = two_steps(one_node(placement={"blocks": [{"blocks": "7", "weights": "cpu"}]}))
    log = result.instances[0]
    log.kv_reads = array("q", (0, 1000))
    log.dummies.start_ns.append(3000 * MS)
    log.dummies.end_ns.append(3250 * MS)
    moved_bytes = 3 * 2 * 218_112_000
    devices = result.summary["energy"]["per_node"][0]["devices_j"]
    assert devices["dram"] == pytest.approx(8 * 3 * 4.0 + moved_bytes * 8 * 20e-12, abs=1e-6)


def test_bits_that_nobody_pays_for_are_named() -> None:
    memory = {"mem_size": 256, "mem_bw": 60, "mem_latency": 250, "num_devices": 4}
    placement = {"default": {"weights": "cxl:1"}}
    spec = load_cluster(cluster(nodes=[node(instance(placement=placement), power=POWER)], cxl_mem=memory))
    result = two_steps(spec)
    result.instances[0].kv_reads = array("q", (0, 1000))
    energy = result.summary["energy"]
    assert energy["not_charged"] == ["cxl_mem"]
    assert energy_line(energy).endswith(", bits moved to and from cxl_mem not charged")
    assert two_steps(one_node()).summary["energy"]["not_charged"] == []


@pytest.mark.parametrize(
    ("counts", "told"), [((3, 2), r"nodes\[1\].* 2 is not .* leaves 1 "), ((5,), "leaves 4 ")]
)
def test_a_cxl_device_is_accounted_for_once(counts: tuple[int, ...], told: str) -> None:
    nodes = [
        node(power={**POWER, "cxl": {"num_devices": count, "idle_power": 10, "energy_per_bit": 40}})
        for count in counts
    ]
    memory = {"mem_size": 256, "mem_bw": 60, "mem_latency": 250, "num_devices": 4}
    with pytest.raises(InputError, match=told):
        check_cluster(load_cluster(cluster(num_nodes=len(nodes), nodes=nodes, cxl_mem=memory)))
    with pytest.raises(InputError, match="cxl_mem leaves 0 devices"):
        check_cluster(load_cluster(cluster(num_nodes=len(nodes), nodes=nodes)))


def test_an_idle_run_draws_idle_power() -> None:
    spec = one_node()
    idle = Result(RunLog(logs_of(spec), end_ns=10_000 * MS), Workload([], "nothing"), RuntimeOptions(), spec)
    energy = idle.summary["energy"]
    assert energy["total_j"] == 10 * (100 + 50 + 100 + 24 + 2 + 20 + 10)
    assert (energy["j_per_output_token"], energy["tokens_per_s_per_w"]) == (None, 0.0)
    assert energy_line(energy) == "3,060 J, 306.0 W on average"


def test_a_run_without_time_takes_no_energy() -> None:
    spec = one_node()
    energy = Result(RunLog(logs_of(spec)), Workload([], "nothing"), RuntimeOptions(), spec).summary["energy"]
    assert (energy["total_j"], energy["mean_w"], energy["tokens_per_s_per_w"]) == (0.0, 0.0, None)
    assert energy["per_node"][0]["power_w"] == []


def test_nodes_without_power_are_reported_as_not_modelled() -> None:
    spec = load_cluster(cluster(num_nodes=3, nodes=[node(), node(power=POWER), node()]))
    result = two_steps(spec)
    energy = result.summary["energy"]
    assert energy["not_modelled"] == [0, 2]
    assert [entry["node"] for entry in energy["per_node"]] == [1]
    # the tokens came from node 0, whose energy nobody knows
    assert (energy["output_tokens"], energy["j_per_output_token"]) == (0, None)
    assert "nodes 0, 2 not modelled" in closing(result)


def test_a_cluster_without_power_has_no_energy() -> None:
    result = two_steps(load_cluster(cluster()))
    assert result.summary["energy"] is None
    assert len(result.power()) == 0
    assert "energy         not modelled" in closing(result)


def test_devices_left_out_draw_nothing() -> None:
    spec = load_cluster(cluster(nodes=[node(power={"base_node_power": 60})]))
    energy = two_steps(spec).summary["energy"]
    assert energy["per_node"][0]["devices_j"] == {"base": 240.0}
    assert energy["per_node"][0]["npus"] == []


def test_long_runs_have_long_intervals() -> None:
    spec = one_node()
    log = RunLog(logs_of(spec), end_ns=10**13 + 1)  # 10,000 s and a little
    energy = Result(log, Workload([], "nothing"), RuntimeOptions(), spec).summary["energy"]
    assert energy["interval_s"] == 6.0
    assert len(energy["per_node"][0]["power_w"]) == 1667 <= MOST_INTERVALS


def lines_of(result: Result, interval_ms: int, times_ms: list[int]) -> list[str]:
    lines: list[str] = []
    heartbeat = Heartbeat(interval_ms * MS, lines.append, result.cluster)
    for time_ms in times_ms:
        heartbeat.advance(time_ms * MS, result.log)
    heartbeat.finish(result.log)
    return lines


def test_log_lines_end_with_the_power_of_modelled_nodes() -> None:
    spec = load_cluster(cluster(num_nodes=2, nodes=[node(power=POWER), node()]))
    lines = lines_of(two_steps(spec), 1000, [])
    first, second = ([line for line in lines if f"instance={index}" in line] for index in (0, 1))
    # the last second has no step, but the line of an instance that falls idle says so once
    assert [line.rpartition("hit=0.0%")[2] for line in first] == [
        f" power={power} W" for power in (306, 631, 606, 331)
    ]
    assert second
    assert not any("power" in line for line in second)


@given(st.lists(st.integers(0, 4000), max_size=10).map(sorted), st.sampled_from([70, 500, 1000, 9000]))
def test_power_in_log_lines_does_not_depend_on_how_the_clock_jumps(times: list[int], interval: int) -> None:
    result = two_steps(ONE)
    assert lines_of(result, interval, times) == lines_of(result, interval, [])


ONE = one_node()
GROUP = load_cluster(
    cluster(
        nodes=[
            node(
                instance(num_npus=4, tp_size=2, pp_size=2),
                instance(pd_type=None),
                power=POWER,
            )
        ]
    )
)


def random_run(steps: list[tuple[int, int, int, int]], end_ms: int) -> Result:
    """Two instances that share the steps (gap, length, tokens, instance); some steps overlap the one
    before."""
    log = RunLog(logs_of(GROUP), end_ns=end_ms * MS)
    for gap, length, tokens, which in steps:
        instance_log = log.instances[which]
        before = instance_log.steps
        start = (before.start_ns[-1] // MS if len(before) else 0) + gap
        end = max(start + length, before.end_ns[-1] // MS if len(before) else 0)
        add_step(instance_log, start, end, prefill_tokens=tokens, running=1)
    return Result(log, Workload([], "random"), RuntimeOptions(), GROUP)


STEPS = st.lists(
    st.tuples(st.integers(0, 900), st.integers(1, 300), st.integers(1, 5000), st.integers(0, 1)), max_size=12
)


@given(STEPS, st.integers(1, 4000), st.lists(st.integers(0, 4000 * MS), max_size=5))
def test_energy_adds_up_over_devices_and_intervals(
    steps: list[tuple[int, int, int, int]], end_ms: int, cuts: list[int]
) -> None:
    result = random_run(steps, end_ms)
    meter = node_meters(GROUP, result.instances)[0]
    end_ns = result.log.end_ns
    whole = meter.energy(0, end_ns)
    assert whole.total_aj == sum(whole.devices.values())
    assert whole.devices["npu"] == sum(npu.energy_aj for npu in whole.npus)
    edges = sorted({0, end_ns, *(cut for cut in cuts if cut < end_ns)})
    parts = [meter.energy(*window) for window in pairwise(edges)]
    for device, energy in whole.devices.items():
        assert energy == sum(part.devices[device] for part in parts)


@given(STEPS, STEPS, st.integers(1, 4000))
def test_a_run_in_pieces_takes_what_it_takes_at_once(
    steps: list[tuple[int, int, int, int]], dummies: list[tuple[int, int, int, int]], end_ms: int
) -> None:
    result = random_run(steps, end_ms)
    log, end = result.instances[0], 0
    busy = list(zip(log.steps.start_ns, log.steps.end_ns, strict=True))
    for gap, length, _, _ in dummies:
        start, end = end + gap, end + gap + length
        if all(stop <= start * MS or end * MS <= begin for begin, stop in busy):  # no step at the same time
            log.dummies.start_ns.append(start * MS)
            log.dummies.end_ns.append(end * MS)
    meter = node_meters(GROUP, result.instances)[0]
    with mock.patch.object(meters, "_AT_ONCE", 2):
        assert meter.whole(end_ms * MS) == meter.energy(0, end_ms * MS)


def test_energy_of_a_long_run_needs_few_steps_at_once() -> None:
    """Of 3,000 steps it looks at so many at a time, and at the one before."""
    log = RunLog(logs_of(ONE), end_ns=6_000 * MS)
    for number in range(3_000):
        add_step(log.instances[0], 2 * number, 2 * number + 1, decode_tokens=1)
    result = Result(log, Workload([], "long"), RuntimeOptions(), ONE)
    seen = []
    look_at = meters.InstanceMeter.look_at

    def watched(self: meters.InstanceMeter, begin_ns: int, end_ns: int) -> Spans:
        seen.append(look_at(self, begin_ns, end_ns))
        return seen[-1]

    with (
        mock.patch.object(meters, "_AT_ONCE", 500),
        mock.patch.object(meters.InstanceMeter, "look_at", watched),
    ):
        energy = result.summary["energy"]
    assert energy["per_node"][0]["npus"][0]["active_s"] == 3
    assert 500 <= max(len(spans.start_ns) for spans in seen) <= 502


@given(STEPS, st.integers(1, 4000))
def test_energy_is_never_below_idle(steps: list[tuple[int, int, int, int]], end_ms: int) -> None:
    result = random_run(steps, end_ms)
    idle_mw = 1000 * (100 + 5 * 50 + 100 + 24 + 2 + 20 + 10)
    total = node_meters(GROUP, result.instances)[0].energy(0, result.log.end_ns).total_aj
    busiest_mw = idle_mw + 1000 * (5 * 550 + 50)
    link_aj = sum(tokens for _, _, tokens, _ in steps) * (64 * 8192 * 2 + 8192) * 8 * 10**9
    assert idle_mw * end_ms * AJ // 10**6 <= total <= busiest_mw * end_ms * AJ // 10**6 + link_aj


def test_a_comparison_shows_energy_where_every_set_has_it() -> None:
    modelled, plain = two_steps(ONE), two_steps(load_cluster(cluster()))
    rows = {row.key: row.values for row in Comparison(["a", "b"], [modelled, modelled]).rows}
    assert rows["energy_j"] == [1874.0, 1874.0]
    assert rows["j_per_output_token"] == [937.0, 937.0]
    assert rows["mean_power_w"] == [468.5, 468.5]
    assert "tokens_per_s_per_w" in rows
    without = {row.key for row in Comparison(["a", "b"], [modelled, plain]).rows}
    assert not without & {"energy_j", "mean_power_w", "j_per_output_token", "tokens_per_s_per_w"}


def test_the_timeline_has_a_counter_of_power(tmp_path: Path) -> None:
    two_steps(ONE).save_timeline(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    counts = [(e["ts"], e["args"]["mean"]) for e in events if e["name"] == "power (W)"]
    assert counts == [(0, 306), (1e6, 631), (2e6, 606), (3e6, 331), (4e6, 0)]


@pytest.mark.parametrize("stepped", [False, True])
def test_the_shipped_node_says_the_same_stepped_or_jumped(stepped: bool) -> None:
    workload = Workload([Request(0, 1000, 200, 0), Request(1, 500, 300, 9 * 10**9)], "two")
    result = servesim.simulate("configs/cluster/single_node_power.json", workload, stepped=stepped)
    energy = result.summary["energy"]
    (npu,) = energy["per_node"][0]["npus"]
    assert npu["active_s"] == pytest.approx(result.summary["instances"][0]["busy_s"], abs=1e-9)
    assert npu["standby_s"] == 5.0
    reference = servesim.simulate("configs/cluster/single_node_power.json", workload).summary["energy"]
    assert energy == reference


def test_hardware_that_the_power_section_does_not_know_is_an_error() -> None:
    with pytest.raises(InputError, match=r"nodes\[0\]\.power\.npu: has no H100"):
        load_cluster(cluster(nodes=[node(instance(hardware="H100"), power=POWER)]))
