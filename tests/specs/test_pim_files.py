"""Memory that computes: what its files say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from servesim.errors import InputError, MissingFileError
from servesim.specs.pim import PimSpec, load_pim, read_pim

if TYPE_CHECKING:
    from pathlib import Path

SMALL = """
[dram]
capacity_gb = 1
data_rate_mts = 1000
bus_width_bits = 64
burst_length = 8
row_to_column_ns = 10
cas_latency_ns = 12
[attention]
slope = 2
intercept = 100
"""


def test_bandwidth_and_latency_follow_from_the_dram(tmp_path: Path) -> None:
    path = tmp_path / "small.ini"
    path.write_text(SMALL)
    dram = read_pim(path).dram
    assert dram.bandwidth_gbs == 8  # 1000 transfers of 8 bytes a microsecond
    assert dram.read_latency_ns == 10 + 12 + 8  # activate, read, 8 transfers of 1 ns


@pytest.mark.parametrize(
    ("name", "capacity", "bandwidth", "slope", "intercept"),
    [
        ("DDR4_8GB_3200", 8, 25.6, 333.25, 30675),
        ("LPDDR4X_2GB_4266", 2, 8.532, 432.45, 33918),
        ("LPDDR5_2GB_6400", 2, 12.8, 282.43, 15997),
        ("HBM2_1GB_2000", 1, 32, 242.05, 14514),
    ],
)
def test_shipped_devices_are_as_documented(
    name: str, capacity: float, bandwidth: float, slope: float, intercept: float
) -> None:
    device = load_pim(name)
    assert (device.dram.capacity_gb, device.dram.bandwidth_gbs) == (capacity, pytest.approx(bandwidth))
    assert (device.attention.slope, device.attention.intercept) == (slope, intercept)


def test_a_new_device_needs_nothing_but_a_file(root: Path) -> None:
    folder = root / "configs" / "pim"
    folder.mkdir(parents=True)
    (folder / "Mine.ini").write_text(SMALL)
    assert load_pim("Mine").attention.slope == 2


DRAMSIM = """
[dram_structure]
protocol = DDR4
bankgroups = 4
BL = 8

[timing]
tCK = 0.5 ; ns
CL = 20
tRCD = 22

[system]
channel_size = 2048
bus_width = 64
"""


def _device(root: Path, name: str, text: str) -> PimSpec:
    folder = root / "configs" / "pim"
    folder.mkdir(parents=True)
    (folder / f"{name}.ini").write_text(text.replace(" ; ns", ""))
    return load_pim(name)


def test_a_dramsim_file_says_the_same(root: Path) -> None:
    pim = _device(root, "DDR4_8GB_3200_pim", DRAMSIM)
    dram = pim.dram
    assert (dram.capacity_gb, dram.data_rate_mts, dram.bus_width_bits, dram.burst_length) == (2, 4000, 64, 8)
    assert (dram.row_to_column_ns, dram.cas_latency_ns) == (11, 10)
    assert pim.attention == load_pim("DDR4_8GB_3200").attention


def test_a_dramsim_file_may_time_attention(root: Path) -> None:
    pim = _device(root, "Mine", DRAMSIM + "[attention]\nslope = 3\nintercept = 5\n")
    assert (pim.attention.slope, pim.attention.intercept) == (3, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DRAMSIM, r"attention: is missing, and no device of that name is shipped; add a section"),
        (DRAMSIM.replace("CL = 20", ""), r"timing\.CL: is missing; must be a number above 0"),
        (DRAMSIM.replace("BL = 8", "BL = many"), r"dram_structure\.BL: 'many' is not allowed"),
        (DRAMSIM.replace("[system]", "[other]"), r"system\.channel_size: is missing"),
    ],
)
def test_what_a_dramsim_file_lacks_is_named(root: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        _device(root, "Mine", text)


def test_a_name_may_end_in_pim() -> None:
    assert load_pim("DDR4_8GB_3200_pim") == load_pim("DDR4_8GB_3200")
    with pytest.raises(MissingFileError, match=r"configs/pim/DDR9\.ini: no such device"):
        load_pim("DDR9_pim")


def test_a_device_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(
        MissingFileError, match=r"DDR4_8GB_320\.ini: no such device; did you mean 'DDR4_8GB_3200'"
    ):
        load_pim("DDR4_8GB_320")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALL.replace("slope = 2", "slope = fast"), "attention.slope"),
        (SMALL.replace("slope = 2", "slope = -2"), "attention.slope"),
        (SMALL.replace("slope = 2\n", ""), "attention.slope"),
        (SMALL + "slop = 2\n", "attention.slop"),
        (SMALL.replace("burst_length = 8", "burst_length = 8.5"), "dram.burst_length"),
        (SMALL.replace("[dram]", ""), "not an INI file"),
        (SMALL + "slope = 3\n", "not an INI file"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.ini"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read_pim(path)
    assert str(path) in str(error.value)
