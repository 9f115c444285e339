"""Bundles made while a run waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from servesim.errors import InputError
from servesim.profiler import on_demand
from tests.profiler.silicon_data import needs_silicon

LLAMA, MOE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder; making on demand is on, whatever the tests' environment says."""
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: tmp_path)
    monkeypatch.delenv(on_demand.SWITCH, raising=False)
    monkeypatch.setattr(on_demand, "LIMITS", {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_kv": 64})
    return tmp_path


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "_installed", lambda: True)
    monkeypatch.setenv(on_demand.SWITCH, "0")
    assert on_demand.maker(print) is None
    monkeypatch.delenv(on_demand.SWITCH)
    assert on_demand.maker(print, wanted=False) is None
    assert on_demand.maker(print) is not None


def test_without_the_measurements_nobody_makes_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(on_demand.SWITCH, raising=False)
    monkeypatch.setattr(on_demand, "_installed", lambda: False)
    assert on_demand.maker(print) is None


@pytest.mark.parametrize(
    ("hardware", "variant"), [("MI300X", "bf16"), ("H100", "int8"), ("H100", "bf16-kvint8"), ("none", "bf16")]
)
@pytest.mark.usefixtures("home")
def test_what_was_not_measured_is_left_to_the_documented_error(
    monkeypatch: pytest.MonkeyPatch, hardware: str, variant: str
) -> None:
    monkeypatch.setattr(on_demand, "_installed", lambda: True)
    make = on_demand.maker(print)
    assert make is not None
    assert make(hardware, LLAMA, variant, 1) is None


@needs_silicon
def test_a_degree_is_made_once_beside_those_made_before(home: Path) -> None:
    told: list[str] = []
    make = on_demand.maker(told.append)
    assert make is not None
    folder = make("H100", LLAMA, "bf16-kvfp8", 1)
    assert folder == home / "profiler/perf/H100" / LLAMA / "bf16-kvfp8"
    before = (folder / "tp1/dense.csv").read_bytes()
    assert make("H100", LLAMA, "bf16-kvfp8", 1) == folder
    assert len(told) == 1
    assert make("H100", LLAMA, "bf16-kvfp8", 2) == folder
    assert told[1].startswith(f"made the profile bundle H100/{LLAMA}/bf16-kvfp8 tp2 from public kernel")
    assert (folder / "tp1/dense.csv").read_bytes() == before
    assert yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))["tp_degrees"] == [1, 2]


@needs_silicon
@pytest.mark.usefixtures("home")
def test_experts_come_whole_as_well() -> None:
    make = on_demand.maker(print)
    assert make is not None
    folder = make("H100", MOE, "bf16", 4)
    assert folder is not None
    assert sorted(path.name for path in folder.glob("tp*")) == ["tp1", "tp4"]


@needs_silicon
@pytest.mark.usefixtures("home")
def test_an_a100_has_no_fp8_kv_and_says_so() -> None:
    make = on_demand.maker(print)
    assert make is not None
    with pytest.raises(
        InputError, match=r"fp8 KV cache: was not measured on a100_sxm .* Use --kv-cache-dtype"
    ):
        make("A100", LLAMA, "bf16-kvfp8", 1)
