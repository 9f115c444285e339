"""Computed bundles know the revision of their formulas, and old ones are noticed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import yaml

from servesim.cost.bundle import load_bundle
from servesim.cost.finding import missing_bundles_from
from servesim.cost.identity import Wanted
from servesim.profiler import on_demand, roofline, silicon, sources
from servesim.profiler.bundle_writer import write_bundle
from servesim.profiler.on_demand import outdated
from servesim.profiler.roofline.efficiency import fits
from servesim.specs.reading import read_yaml_object
from servesim.specs.shape import digest
from tests.profiler.roofline_toy import PERFECT, build_bundle, job
from tests.profiler.silicon_data import needs_silicon, toy_attention

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "meta-llama/Llama-3.1-8B"
STATED = {"made_for": {"derivation": {"constants": digest(fits())}}}
REFITTED = {"made_for": {"derivation": {"constants": "others"}}}
AGAIN = (
    "the figures here belong to the revision: where formulas changed, raise DERIVATION and put the new ones"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder, a place to run in without bundles, and small bundles."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: tmp_path / "home")
    monkeypatch.delenv(on_demand.SWITCH, raising=False)
    monkeypatch.setattr(on_demand, "LIMITS", {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_kv": 64})
    return tmp_path / "home"


def _shipped_like(home: Path, **meta: object) -> Path:
    """A computed bundle in the user's data folder; a value None takes a key out."""
    content = build_bundle(job(tp_degrees=(1, 2)), PERFECT)
    content.meta = {k: v for k, v in (content.meta | meta).items() if v is not None}
    folder = home / "profiler" / "perf" / "H100" / LLAMA / "bf16"
    write_bundle(folder, content)
    return folder


def _read(wanted: bool = True) -> tuple[list[str], list[str]]:
    """What a run that reads the bundle twice is told and warned of."""
    told: list[str] = []
    warned: list[str] = []
    maker = on_demand.maker(told.append, wanted=wanted)
    with missing_bundles_from(maker, on_demand.refresher(told.append, warned.append, wanted=wanted)):
        for _ in range(2):
            load_bundle("H100", LLAMA, "bf16", 1)
    return told, warned


def _installed(monkeypatch: pytest.MonkeyPatch, there: object) -> None:
    monkeypatch.setattr(sources, "silicon_installed", there)


def test_a_change_of_the_roofline_formulas_raises_their_revision() -> None:
    figures = {
        ("dense.csv", "act_fn", 1): 2.012288,
        ("dense.csv", "rotary_emb", 64): 2.1872457,
        ("per_sequence.csv", "lm_head", 3): 525.77274,
        ("attention.csv", 0, 0, 1, 64): 10.26624,
        ("attention.csv", 64, 1024, 16, 1024): 80.620739,
        ("comm.csv", "all_reduce", 2, 4096): 5.0546133,
    }
    content = build_bundle(job(tp_degrees=(2,)), PERFECT)
    assert content.meta["derivation"] == roofline.DERIVATION
    rows = {(name, *row[:-1]): row[-1] for (_, name), table in content.tables.items() for row in table}
    assert {key: rows[key] for key in figures} == pytest.approx(figures, rel=1e-6), AGAIN
    assert sum(sum(gpu.values()) for gpu in fits()["gpus"].values()) == pytest.approx(513.34435, rel=1e-6), (
        AGAIN
    )
    assert roofline.DERIVATION == 3, AGAIN


def test_a_change_of_the_silicon_formulas_raises_their_revision() -> None:
    figures = {
        (0, 0, 1, 64): 5.0244523,
        (0, 0, 16, 1024): 9.4711019,
        (64, 0, 0, 0): 6.0,
        (512, 1024, 0, 0): 70.211758,
        (512, 1024, 8, 2048): 156.87746,
    }
    times = toy_attention()
    assert {point: times.mixed_us(*point) for point in figures} == pytest.approx(figures, rel=1e-6), AGAIN
    assert silicon.DERIVATION == 7, AGAIN


def test_shipped_bundles_are_of_the_current_revision() -> None:
    metas = sorted((ROOT / "profiler" / "perf").glob("*/*/*/*/meta.yaml"))
    assert metas
    for path in metas:
        meta = read_yaml_object(path)
        assert meta.get("derivation", on_demand.FIRST) == on_demand.REVISIONS.get(meta["source"], 1), path
        assert meta["made_for"]["derivation"]["revision"] == meta["derivation"], path


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"source": "vllm"}, None),
        ({"source": "roofline"}, "its formulas are of revision 1, now 3"),
        ({"source": "roofline", "derivation": 2}, "its formulas are of revision 2, now 3"),
        ({"source": "roofline", "derivation": "new"}, "its formulas are of revision new, now 3"),
        ({"source": "roofline", "derivation": 3}, "it does not state what it was made for"),
        ({"source": "roofline", "derivation": 3, **STATED}, None),
        ({"source": "roofline", "derivation": 4, **STATED}, None),
        ({"source": "roofline", "derivation": 3, **REFITTED}, "its constants were fitted anew"),
        ({"source": "silicon", "derivation": 3, "data_version": "9.9", **STATED}, None),
        (
            {"source": "silicon", "derivation": 3, "data_version": "9.8"},
            "it is made from measurements 9.8, now 9.9",
        ),
    ],
)
def test_what_makes_a_bundle_old(
    meta: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "REVISIONS", {"silicon": 3, "roofline": 3})
    monkeypatch.setattr(on_demand, "installed_version", lambda: "9.9")
    assert outdated(meta) == reason


def test_theinstalled_version_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        known: str | None = importlib.metadata.version("aiconfigurator-core")
    except importlib.metadata.PackageNotFoundError:
        known = None
    assert on_demand.installed_version() == known
    (tmp_path / "aiconfigurator_core-9.8.dist-info").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path / "none"), str(tmp_path)])
    assert on_demand.installed_version() == "9.8"


def test_without_the_package_its_version_makes_nothing_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "installed_version", lambda: None)
    current = {"source": "silicon", "derivation": silicon.DERIVATION, "data_version": "0.1", **STATED}
    assert outdated(current) is None


def test_a_current_bundle_is_read_without_a_word(home: Path) -> None:
    _shipped_like(home)
    assert _read() == ([], [])


@pytest.mark.parametrize("wanted", [True, False])
def test_an_old_bundle_that_cannot_be_made_again_is_told_once(
    wanted: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, lambda: not wanted)
    folder = _shipped_like(home, source="silicon", derivation=0, made_on_demand=True)
    told, (warning,) = _read(wanted=wanted)
    assert told == []
    assert warning == (
        f"{folder}: this bundle is old: its formulas are of revision 0, now {silicon.DERIVATION}; "
        "servesim[silicon], installed and not switched off, makes it again"
    )


def test_a_bundle_that_the_user_made_is_left_alone_and_told(home: Path) -> None:
    folder = _shipped_like(home, derivation=0)
    before = (folder / "meta.yaml").read_bytes()
    told, (warning,) = _read()
    assert told == []
    assert "servesim profile meta-llama/Llama-3.1-8B --hardware H100 --source roofline" in warning
    assert "--tp 1,2 --output-root" in warning
    assert (folder / "meta.yaml").read_bytes() == before


def test_the_commands_look_at_what_they_read(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    from servesim.profiler.on_demand import bundles_on_demand

    _shipped_like(home, derivation=0)
    with bundles_on_demand(True):
        load_bundle("H100", LLAMA, "bf16", 1)
    now = roofline.DERIVATION
    assert f"this bundle is old: its formulas are of revision 0, now {now}" in caplog.text


def test_an_old_bundle_of_the_working_folder_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shipped_like(home, derivation=0)
    monkeypatch.chdir(home)
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: home / "none")
    told, (warning,) = _read()
    assert told == []
    assert warning.endswith("--tp 1,2 --output-root profiler/perf")


def test_an_old_roofline_bundle_made_on_demand_is_renewed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, lambda: False)
    folder = _shipped_like(home, derivation=0, made_on_demand=True)
    (line,), warned = _read()
    assert warned == []
    now = roofline.DERIVATION
    assert f"again, for its formulas are of revision 0, now {now}, from peak rates (roofline)" in line
    assert "pip install 'servesim[silicon]'" in line
    assert read_yaml_object(folder / "meta.yaml")["derivation"] == roofline.DERIVATION


@needs_silicon
def test_measurements_replace_peak_rates_once_installed(home: Path) -> None:
    folder = _shipped_like(home, made_on_demand=True)
    (line,), warned = _read()
    assert warned == []
    assert "again, for measurements of this GPU's kernels are installed now, from public kernel" in line
    assert read_yaml_object(folder / "meta.yaml")["source"] == "silicon"


@needs_silicon
def test_an_old_bundle_is_made_again_with_all_degrees(home: Path) -> None:
    folder = _shipped_like(home, source="silicon", derivation=0, made_on_demand=True)
    old = (folder / "tp2" / "dense.csv").read_bytes()
    (line,), warned = _read()
    assert warned == []
    assert line.startswith(
        f"made the profile bundle H100/{LLAMA}/bf16 again, "
        f"for its formulas are of revision 0, now {silicon.DERIVATION}, from "
    )
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    assert meta["derivation"] == silicon.DERIVATION
    assert meta["tp_degrees"] == [1, 2]
    assert meta["made_on_demand"] is True
    assert (folder / "tp2" / "dense.csv").read_bytes() != old


@needs_silicon
def test_a_degree_added_to_an_old_bundle_renews_the_others(home: Path) -> None:
    folder = _shipped_like(home, source="silicon", derivation=0)
    old = (folder / "tp2" / "dense.csv").read_bytes()
    make = on_demand.maker(lambda _: None)
    assert make is not None
    assert make(Wanted("H100", LLAMA, "bf16"), 4) == folder
    assert (folder / "tp2" / "dense.csv").read_bytes() != old
    assert sorted(path.name for path in folder.glob("tp*")) == ["tp1", "tp2", "tp4"]


@needs_silicon
def test_what_is_no_longer_covered_comes_from_peak_rates(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from servesim.errors import InputError

    def refuse(_: object) -> None:
        raise InputError("not measured any more\nand more lines")

    monkeypatch.setattr("servesim.profiler.silicon.meter.silicon_gpu", refuse)
    _shipped_like(home, source="silicon", derivation=0, made_on_demand=True)
    (line,), warned = _read()
    assert warned == []
    assert "public kernel measurements do not cover it: not measured any more; kept in" in line
