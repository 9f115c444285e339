"""Bundles made while a run waits for them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from servesim.__main__ import main
from servesim.cost.bundle import find_bundle
from servesim.cost.finding import missing_bundles_from
from servesim.cost.identity import Wanted, wanted_for
from servesim.errors import InputError
from servesim.profiler import on_demand, sources
from servesim.profiler.on_demand import bundles_on_demand
from servesim.specs.hardware import load_hardware
from servesim.specs.model import load_model
from tests.profiler.silicon_data import needs_silicon

LLAMA, MOE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"
HEADS_OF_ITS_OWN = "google/gemma-4-26B-A4B"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
NPU = """\
memory_gib: 24
memory_bandwidth_gbs: 1000
l2_mib: 32
sm_count: 16
peak_tflops: {bfloat16: 100}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder; making on demand is on, whatever the tests' environment says."""
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: tmp_path)
    monkeypatch.delenv(on_demand.SWITCH, raising=False)
    monkeypatch.setattr(on_demand, "LIMITS", {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_kv": 64})
    return tmp_path


@pytest.fixture
def work(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a hardware file of its own, without public measurements."""
    folder = home / "work"
    (folder / "configs" / "hardware").mkdir(parents=True)
    (folder / "configs" / "hardware" / "Mine.yaml").write_text(NPU)
    monkeypatch.chdir(folder)
    return folder


def own_model(folder: Path, **changes: object) -> str:
    """A folder with a config.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


def asked(hardware: str, model: str, variant: str) -> Wanted:
    return wanted_for(load_model(model), load_hardware(hardware), variant)


def made(hardware: str, model: str, tp: int = 1) -> tuple[Path, str]:
    """The folder of the bundle that a run reads, and what it is told."""
    told: list[str] = []
    with bundles_on_demand(True, told.append):
        bundle = find_bundle(asked(hardware, model, "bf16"), tp)
        bundle.tables(tp)
    return bundle.folder, "\n".join(told)


def step_us(hardware: str, model: str) -> float:
    """Time of one dense layer as a run reads it."""
    with bundles_on_demand(True, print):
        tables = find_bundle(asked(hardware, model, "bf16"), 1).tables(1)
    return float(tables.dense["gate_up_proj"].at([64])[0])


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(on_demand.SWITCH, "0")
    assert on_demand.maker(print) is None
    monkeypatch.delenv(on_demand.SWITCH)
    assert on_demand.maker(print, wanted=False) is None
    assert on_demand.maker(print) is not None


@pytest.mark.parametrize(
    ("hardware", "variant", "installed", "source"),
    [
        ("MI300X", "bf16", True, "roofline"),
        ("H100", "int8", True, "roofline"),
        ("H100", "bf16-kvint8", True, "roofline"),
        ("H100", "bf16", False, "roofline"),
        ("none", "bf16", True, None),
    ],
)
def test_what_was_not_measured_comes_from_peak_rates(
    hardware: str, variant: str, installed: bool, source: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "silicon_installed", lambda: installed)
    chosen = sources.source_for(load_hardware(hardware), variant)
    assert (chosen and chosen[0]) == source


@pytest.mark.usefixtures("home")
def test_hardware_without_a_file_is_left_to_the_error() -> None:
    make = on_demand.maker(print)
    assert make is not None
    assert make(asked("none", LLAMA, "bf16"), 1) is None


@pytest.mark.usefixtures("work")
def test_a_bundle_from_peak_rates_says_so(home: Path) -> None:
    folder, told = made("Mine", LLAMA)
    assert folder == home / "profiler/perf/Mine" / LLAMA / "bf16"
    assert told.startswith(f"made the profile bundle Mine/{LLAMA}/bf16 tp1 from peak rates (roofline) in ")
    assert "nobody published kernel measurements of this hardware; kept in" in told
    assert made("Mine", LLAMA) == (folder, "")


def test_an_edited_bandwidth_gives_the_new_answer(work: Path) -> None:
    before = step_us("Mine", LLAMA)
    path = work / "configs/hardware/Mine.yaml"
    path.write_text(NPU.replace("1000", "500"))
    assert step_us("Mine", LLAMA) > 1.2 * before
    path.write_text(NPU)
    assert step_us("Mine", LLAMA) == before


def test_an_edited_config_gives_the_new_answer(work: Path) -> None:
    path = own_model(work / "configs/model/org")
    Path(path, "config.json").rename(work / "configs/model/org/m.json")
    before = step_us("Mine", "org/m")
    (work / "configs/model/org/m.json").write_text(json.dumps(CONFIG | {"intermediate_size": 8192}))
    assert step_us("Mine", "org/m") > 1.5 * before


def test_two_models_of_one_folder_name_do_not_share(work: Path) -> None:
    one, two = own_model(work / "one/base"), own_model(work / "two/base", intermediate_size=8192)
    first, second = made("Mine", one)[0], made("Mine", two)[0]
    assert first != second
    assert {first.parent.name[:5], second.parent.name[:5]} == {"base@"}
    assert made("Mine", one) == (first, "")
    assert made("Mine", own_model(work / "three/base"))[0] == first  # the same shape


def test_a_path_to_a_known_shape_shares_its_bundle(work: Path, home: Path) -> None:
    (work / "configs/model/org").mkdir(parents=True)
    (work / "configs/model/org/m.json").write_text(json.dumps(CONFIG))
    folder = made("Mine", "org/m")[0]
    assert folder == home / "profiler/perf/Mine/org/m/bf16"
    assert made("Mine", own_model(work / "copies/org/m")) == (folder, "")
    assert made("Mine", own_model(work / "others/org/m", hidden_size=256))[0] != folder


def test_a_misfit_that_the_user_made_is_kept(work: Path, home: Path) -> None:
    """The run's own goes to the data folder."""
    (work / "configs/model/org").mkdir(parents=True)
    config = work / "configs/model/org/m.json"
    config.write_text(json.dumps(CONFIG))
    assert main(["profile", "org/m", "--hardware", "Mine", "--source", "roofline"]) == 0
    mine = work / "profiler/perf/Mine/org/m/bf16/meta.yaml"
    before = mine.read_bytes()
    config.write_text(json.dumps(CONFIG | {"intermediate_size": 8192}))
    folder, told = made("Mine", "org/m")
    assert folder.is_relative_to(home / "profiler")
    assert "made the profile bundle" in told
    assert mine.read_bytes() == before


def test_where_nothing_is_made_a_misfit_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what differs, and the command in it works."""
    (work / "configs/model/org").mkdir(parents=True)
    config = work / "configs/model/org/m.json"
    config.write_text(json.dumps(CONFIG))
    assert main(["profile", "org/m", "--hardware", "Mine", "--source", "roofline"]) == 0
    config.write_text(json.dumps(CONFIG | {"intermediate_size": 8192}))
    monkeypatch.setenv(on_demand.SWITCH, "0")
    with pytest.raises(InputError, match="intermediate_size 2048, here 8192") as caught:
        find_bundle(asked("Mine", "org/m", "bf16"), 1)
    command = str(caught.value).split("again with:  servesim ")[1].splitlines()[0]
    assert main(shlex.split(command)) == 0
    find_bundle(asked("Mine", "org/m", "bf16"), 1).tables(1)


def test_a_measured_misfit_is_refused_even_with_a_maker(work: Path) -> None:
    model = own_model(work / "one/base")
    assert main(["profile", model, "--hardware", "Mine", "--source", "roofline"]) == 0
    (meta,) = work.rglob("profiler/perf/*/*/*/meta.yaml")
    stated = yaml.safe_load(meta.read_text(encoding="utf-8"))
    stated["source"] = "torch"
    meta.write_text(yaml.safe_dump(stated))
    (work / "configs/hardware/Mine.yaml").write_text(NPU.replace("1000", "500"))
    with (
        missing_bundles_from(on_demand.maker(print)),
        pytest.raises(InputError, match=r"measured for something else.*memory_bandwidth_gbs 1000, here 500"),
    ):
        find_bundle(asked("Mine", model, "bf16"), 1)


def test_a_bundle_by_hand_in_the_data_folder_is_kept(work: Path, home: Path) -> None:
    root = home / "profiler/perf"
    words = ["profile", LLAMA, "--hardware", "Mine", "--source", "roofline", "--output-root", str(root)]
    assert main(words) == 0
    (work / "configs/hardware/Mine.yaml").write_text(NPU.replace("1000", "500"))
    with pytest.raises(InputError, match="was not made on demand; remove it"):
        made("Mine", LLAMA)


def test_the_python_api_makes_bundles_too(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    import servesim

    workload = work / "w.jsonl"
    workload.write_text('{"input_toks": 8, "output_toks": 2, "arrival_time_ns": 0}\n')
    flags = {"hardware": "Mine", "model": own_model(work / "one/base"), "dataset": str(workload)}
    with pytest.raises(InputError, match="does not exist"):
        servesim.simulate(auto_profile=False, **flags)
    servesim.simulate(**flags)
    assert "made the profile bundle Mine/base@" in caplog.text
    comparison = servesim.compare(sets={"a": {"tp": 2}, "b": {"tp": 1}}, **flags)
    assert len(comparison.results) == 2


def test_run_with_a_path_makes_its_bundle(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "w.jsonl").write_text('{"input_toks": 8, "output_toks": 2, "arrival_time_ns": 0}\n')
    words = ["run", "--model", own_model(work / "a b/base"), "--hardware", "Mine", "--dataset", "w.jsonl"]
    assert main([*words, "--no-auto-profile"]) == 2
    error = capsys.readouterr().err
    command = error.split("Make it with:  servesim ")[1].splitlines()[0]
    assert main(words) == 0
    assert "made the profile bundle Mine/base@" in capsys.readouterr().err
    assert main(shlex.split(command)) == 0  # the path is quoted


@needs_silicon
def test_a_degree_is_made_once_beside_those_made_before(home: Path) -> None:
    told: list[str] = []
    make = on_demand.maker(told.append)
    assert make is not None
    wanted = asked("H100", LLAMA, "bf16-kvfp8")
    folder = make(wanted, 1)
    assert folder == home / "profiler/perf/H100" / LLAMA / "bf16-kvfp8"
    before = (folder / "tp1/dense.csv").read_bytes()
    assert make(wanted, 1) == folder
    assert len(told) == 1
    assert make(wanted, 2) == folder
    assert told[1].startswith(f"made the profile bundle H100/{LLAMA}/bf16-kvfp8 tp2 from public kernel")
    assert (folder / "tp1/dense.csv").read_bytes() == before
    assert yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))["tp_degrees"] == [1, 2]


@pytest.mark.usefixtures("work")
def test_a_degree_made_later_is_checked_by_its_own_meta() -> None:
    """meta.yaml was read before the second degree was made."""
    with bundles_on_demand(True, print):
        first = find_bundle(asked("Mine", LLAMA, "bf16"), 1)
        second = first.of_degree(2)
        assert first.folder == second.folder
        path = first.folder / "tp2/dense.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-5]) + "\n")
        with pytest.raises(InputError, match=r"tp2/dense\.csv: .* rows, where meta.yaml states"):
            first.tables(2)
        first.tables(1)


@needs_silicon
@pytest.mark.usefixtures("home")
def test_a_degree_made_later_states_its_reach() -> None:
    with bundles_on_demand(True, print):
        first = find_bundle(asked("H100", LLAMA, "bf16-kvfp8"), 1)
        second = first.of_degree(2)
        assert first.measured_reach(2) == second.measured_reach(2) is not None
        assert first.measured_reach(1) == second.measured_reach(1)


@needs_silicon
@pytest.mark.usefixtures("home")
def test_experts_come_whole_as_well() -> None:
    make = on_demand.maker(print)
    assert make is not None
    folder = make(asked("H100", MOE, "bf16"), 4)
    assert folder is not None
    assert sorted(path.name for path in folder.glob("tp*")) == ["tp1", "tp4"]


@needs_silicon
@pytest.mark.usefixtures("home")
def test_what_measurements_do_not_cover_comes_from_peak_rates() -> None:
    """Once: the next run reads it, and does not try the measurements again."""
    for again in (False, True):
        told: list[str] = []
        with bundles_on_demand(True, told.append):
            bundle = find_bundle(asked("B200", HEADS_OF_ITS_OWN, "bf16"), 1)
        assert bundle.meta["source"] == "roofline"
        if again:
            assert told == []
        else:
            assert "do not cover it: attention with 16 heads, 8 KV heads of size 256" in told[0]


@needs_silicon
def test_a_refusal_of_the_measurements_names_another_source(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", HEADS_OF_ITS_OWN, "--hardware", "B200", "--output-root", str(work)]) == 2
    assert "--source roofline computes such a bundle from peak rates" in capsys.readouterr().err


@needs_silicon
def test_an_edited_config_is_derived_anew(work: Path) -> None:
    (work / "configs/model/org").mkdir(parents=True)
    config = work / "configs/model/org/m.json"
    llama = {**CONFIG, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config.write_text(json.dumps({**llama, "head_dim": 128}))
    before = step_us("H100", "org/m")
    config.write_text(json.dumps({**llama, "head_dim": 128, "intermediate_size": 16384}))
    assert step_us("H100", "org/m") > 1.5 * before


@needs_silicon
def test_an_edited_gpu_is_no_measured_one(work: Path) -> None:
    """Kernels of another bandwidth were not measured: peak rates, with this GPU's efficiencies."""
    shipped = Path(load_hardware.__code__.co_filename).parents[2] / "configs/hardware/H100.yaml"
    mine = work / "configs/hardware/H100.yaml"
    mine.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    folder, told = made("H100", LLAMA, 4)
    assert "from public kernel measurements" in told
    text = shipped.read_text(encoding="utf-8").replace("_gbs: 3350", "_gbs: 1675")
    mine.write_text(text, encoding="utf-8")
    again, told = made("H100", LLAMA, 4)
    assert "memory_bandwidth_gbs 1675, measured GPU 3350" in told
    assert again == folder
    with pytest.raises(InputError, match="memory_bandwidth_gbs 1675, measured GPU 3350"):
        sources.compute("silicon", _job("H100"))


def _job(hardware: str) -> Any:
    from servesim.profiler.meter import ProfileJob
    from servesim.specs.architecture import load_architecture

    return ProfileJob(load_model(LLAMA), load_architecture("llama"), load_hardware(hardware))
