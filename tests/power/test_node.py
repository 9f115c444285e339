"""Energy of a node, device by device."""

from __future__ import annotations

from typing import Any

import pytest

from servesim.power.node import NodeActivity, NpuActivity, node_energy
from servesim.power.quantities import AJ, joules, mean_watts, nanowatts, transfer_aj
from servesim.specs.power import PowerSpec
from tests.power.test_activity import spans

S = 10**9
NPU = {"idle_power": 50, "standby_power": 100, "active_power": 600, "standby_duration": 3}


def power(**devices: Any) -> PowerSpec:
    return PowerSpec.model_validate({"base_node_power": 0, **devices})


def two_npus() -> NodeActivity:
    """Two ranks that compute from 1 to 3 s."""
    return NodeActivity([NpuActivity(4, 0, 2, "NPU1", spans((1 * S, 3 * S)))])


def devices_j(spec: PowerSpec, activity: NodeActivity, end_s: int = 10) -> dict[str, float]:
    taken = node_energy(spec, 512, activity, 0, end_s * S).devices
    return {device: energy / AJ for device, energy in taken.items()}


def test_npus_are_active_then_in_standby_then_idle() -> None:
    energy = node_energy(power(npu={"NPU1": NPU}), 512, two_npus(), 0, 10 * S)
    each = 2 * 600 + 3 * 100 + 5 * 50
    assert [npu.energy_aj for npu in energy.npus] == [each * AJ, each * AJ]
    assert [(npu.instance, npu.npu) for npu in energy.npus] == [(4, 0), (4, 1)]
    assert energy.total_aj == 2 * each * AJ


def test_the_cpu_works_while_any_npu_does() -> None:
    cpu = {"idle_power": 100, "active_power": 300}
    assert devices_j(power(cpu=cpu), two_npus()) == {"base": 0, "cpu": 100 * 10 + 200 * 0.7 * 2}
    assert devices_j(power(cpu={**cpu, "util": 1}), two_npus())["cpu"] == 100 * 10 + 200 * 2


def test_dimms_are_counted_and_moved_bits_paid() -> None:
    dram = {"dimm_size": 100, "idle_power": 3, "energy_per_bit": 20}
    activity = NodeActivity(memory_bytes={"dram": 10**9})
    # 512 GB need 6 DIMMs of 100; 8e9 bits of 20 pJ are 0.16 J
    assert devices_j(power(dram=dram), activity) == {"base": 0, "dram": 6 * 3 * 10 + 0.16}


def test_links_draw_idle_power_and_pay_per_bit() -> None:
    link = {"num_links": 4, "idle_power": 2, "energy_per_bit": 5}
    assert devices_j(power(link=link), NodeActivity(link_bytes=10**9))["link"] == 4 * 2 * 10 + 0.04


def test_cxl_devices_draw_idle_power_and_pay_per_bit() -> None:
    cxl = {"num_devices": 4, "idle_power": 12, "energy_per_bit": 30}
    activity = NodeActivity(memory_bytes={"dram": 10**12, "cxl": 10**9})
    # four devices of 12 W for 10 s; 8e9 bits of 30 pJ are 0.24 J
    assert devices_j(power(cxl=cxl), activity) == {"base": 0, "cxl": 4 * 12 * 10 + 0.24}


def test_pim_draws_power_while_it_computes() -> None:
    activity = NodeActivity(pim=spans((1 * S, 2 * S), (4 * S, 6 * S)))
    assert devices_j(power(pim={"active_power": 7}), activity)["pim"] == 21


def test_the_rest_of_the_node_draws_all_the_time() -> None:
    spec = power(
        base_node_power=60,
        nic={"num_nics": 2, "idle_power": 10},
        storage={"num_devices": 3, "idle_power": 5},
    )
    assert devices_j(spec, NodeActivity()) == {"base": 600, "nic": 200, "storage": 150}


def test_no_time_takes_no_energy() -> None:
    spec = power(base_node_power=60, npu={"NPU1": NPU})
    assert node_energy(spec, 512, two_npus(), 0, 0).total_aj == 0
    assert mean_watts(0, 0) == 0.0


def test_a_gigawatt_year_is_exact() -> None:
    year_ns = 365 * 86400 * S
    assert joules(nanowatts(1e6) * 1000 * year_ns) == 1e9 * 365 * 86400
    assert transfer_aj(10**18, 0.000001) == 8 * 10**18


@pytest.mark.parametrize(("watts", "nano"), [(0.1, 10**8), (1e6, 10**15), (0, 0)])
def test_powers_are_whole_nanowatts(watts: float, nano: int) -> None:
    assert nanowatts(watts) == nano
