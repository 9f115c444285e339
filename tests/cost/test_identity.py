"""A bundle is used for what it was made for, whole, and from every place that has a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from servesim.cost.bundle import find_bundle, load_bundle
from servesim.cost.bundle_csv import stamp_of
from servesim.cost.identity import Wanted, differences, made_for
from servesim.errors import InputError, MissingFileError
from servesim.profiler.bundle_writer import write_bundle
from servesim.specs.model import model_from_config
from servesim.specs.shape import bundle_label, digest, shape_of
from tests.cost.bundles import HARDWARE, MODEL, VARIANT, Toy, toy_model
from tests.profiler.roofline_toy import build_bundle, job

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: tmp_path / "home")
    return tmp_path


def write(root: Path, **changes: object) -> Path:
    """A small computed bundle below ``root``."""
    asked = job(**changes)
    folder = root / "profiler/perf/Toy" / asked.model.name / asked.variant
    write_bundle(folder, build_bundle(asked))
    return folder


def test_the_shape_is_what_kernel_times_depend_on() -> None:
    model = toy_model()
    shape = shape_of(model)
    assert shape == {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    deeper = model.model_copy(update={"num_hidden_layers": 4, "name": "other", "torch_dtype": "fp8"})
    assert shape_of(deeper) == shape
    assert shape_of(toy_model(experts=4)) == shape | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
    }
    half = toy_model(sliding_window=64, layer_types=["full_attention", "sliding_attention"])
    assert shape_of(half) == shape | {"sliding_window": 64, "sliding_share": "1/2"}


def test_a_path_has_its_shape_in_its_label() -> None:
    model = toy_model()
    assert bundle_label(model) == MODEL
    given = model.model_copy(update={"path": "some/where", "name": "base"})
    assert bundle_label(given) == f"base@{digest(shape_of(model), 8)}"


def test_a_config_does_not_say_what_it_is_called() -> None:
    config = toy_model().model_dump(exclude_none=True) | {"name": "spoofed", "path": "spoofed"}
    model = model_from_config(config, "org/m", "config.json")
    assert (model.name, model.path) == ("org/m", "")


def test_what_differs_is_named_field_by_field(root: Path) -> None:
    folder = write(root)
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    asked = job()
    facts = asked.hardware
    assert differences(meta, folder, Wanted("Toy", LLAMA, "bf16", asked.model, facts)) == []
    wider = asked.model.model_copy(update={"intermediate_size": 28672, "num_experts": 0})
    slower = facts.model_copy(update={"memory_bandwidth_gbs": 500.0, "peak_tflops": {"bfloat16": 50.0}})
    found = differences(meta, folder, Wanted("Toy", LLAMA, "bf16", wider, slower))
    assert found[0] == "intermediate_size 14336, here 28672"
    assert found[1].split()[0] == "memory_bandwidth_gbs"
    assert any(line.startswith("peak_tflops.bfloat16 ") for line in found)
    stated = facts.model_copy(update={"roofline": facts.roofline.model_copy(update={"decode_stream": 0.5})})
    (line,) = differences(meta, folder, Wanted("Toy", LLAMA, "bf16", asked.model, stated))
    assert line == "roofline.decode_stream unset, here 0.5"


def test_an_edited_made_for_is_noticed(root: Path) -> None:
    folder = write(root)
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    assert made_for(meta, folder) is not None
    meta["made_for"]["model"]["hidden_size"] = 1
    with pytest.raises(InputError, match=r"the fingerprint [0-9a-f]{16} belongs to other values"):
        made_for(meta, folder)


def _cut(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:100])


DAMAGE: list[tuple[str, Callable[[bytes], bytes] | None, str]] = [
    ("attention.csv", _cut, r"99 rows, where meta.yaml states \d+ \(is the file cut short\?\)"),
    ("attention.csv", lambda c: c.replace(b"\n0,0,1,16,", b"\n0,0,1,17,", 1), "its content is not what meta"),
    ("dense.csv", lambda c: c + c.splitlines()[-1].replace(b"64", b"65") + b"\n", "rows, where meta.yaml"),
    ("per_sequence.csv", lambda c: c[:-5] + b"9\n", "its content is not what meta.yaml states"),
    ("comm.csv", None, "no such file, though meta.yaml states it with"),
]


@pytest.mark.parametrize(("name", "damage", "expected"), DAMAGE, ids=[f"{n}-{e[:9]}" for n, _, e in DAMAGE])
def test_a_damaged_table_is_refused(
    root: Path, name: str, damage: Callable[[bytes], bytes] | None, expected: str
) -> None:
    path = write(root, tp_degrees=(2,)) / "tp2" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=expected) as caught:
        load_bundle("Toy", LLAMA, "bf16").tables(2)
    assert str(caught.value).startswith(f"profiler/perf/Toy/{LLAMA}/bf16/tp2/{name}: ")


def test_line_ends_of_another_system_are_no_damage(root: Path) -> None:
    folder = write(root)
    for path in folder.glob("tp1/*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    load_bundle("Toy", LLAMA, "bf16").tables(1)


def test_a_stamp_counts_rows_below_the_header() -> None:
    assert stamp_of(b"a,b\n1,2\n3,4\n").rows == stamp_of(b"a,b\n1,2\n3,4").rows == 2
    assert stamp_of(b"a,b\n").rows == 0


def test_bad_statements_are_told_with_their_key(root: Path) -> None:
    for stated, where in ((["x"], "files: "), ({"tp1/dense.csv": "all"}, "files.tp1/dense.csv: 'all'")):
        bundle = Toy(meta={"files": stated}).bundle(root)
        with pytest.raises(InputError, match=where):
            bundle.tables(1)
    with pytest.raises(InputError, match="made_for: must be a mapping with model, hardware, derivation"):
        Toy(meta={"made_for": {"model": 1}}).bundle(root)


@pytest.mark.parametrize("grid", [[0, 16, 64, 256], "0, 16-256 x4"])
def test_an_older_bundle_is_held_against_its_grid(root: Path, grid: object) -> None:
    meta = {"source": "vllm", "attention_grid": {"chunks": [0, 16, 64], "kv": grid, "n_decode": "0, 1-8 x2"}}
    Toy(meta=meta).bundle(root).tables(1)
    short = Toy(meta=meta)
    short.attention = {key: us for key, us in short.attention.items() if key[0] < 64}
    with pytest.raises(InputError, match=r"prefill_chunk reaches 16, where .* states 64 \(is the file cut"):
        short.bundle(root).tables(1)


def test_an_older_bundle_is_used_with_one_warning(root: Path) -> None:
    (warning,) = Toy().bundle(root).unstated()
    assert warning.endswith(
        "meta.yaml does not state which model's shape it was made for or what its tables have to hold; "
        "used as it is, unchecked"
    )
    write(root)
    assert load_bundle("Toy", LLAMA, "bf16").unstated() == []


@pytest.mark.parametrize("us", ["0", "0.0", "1e9", "1e18"])
def test_a_time_is_above_zero_and_bounded(root: Path, us: str) -> None:
    folder = Toy().write(root)
    path = folder / "tp1/dense.csv"
    path.write_text(path.read_text().replace(",18.0", f",{us}", 1))
    with pytest.raises(InputError, match=r"time_us is .*; must be above 0 and below 1e\+09"):
        load_bundle(HARDWARE, MODEL, VARIANT).tables(1)


def test_a_degree_is_looked_for_in_every_place(root: Path) -> None:
    """A bundle with one degree hides no other degrees that lie elsewhere."""
    here = Toy().write(root)
    there = Toy(tp=4).write(root / "home")
    assert find_bundle(Wanted(HARDWARE, MODEL, VARIANT), 4).folder == there
    bundle = load_bundle(HARDWARE, MODEL, VARIANT, 1)
    assert bundle.folder.resolve() == here
    assert bundle.tables(4).folder == there / "tp4"
    with pytest.raises(MissingFileError, match=r"has tp1\.\n.*home.* has tp4\.\nMake it with:  .* --tp 1,2$"):
        bundle.tables(2)


def test_whole_experts_are_looked_for_in_every_place(root: Path) -> None:
    Toy(tp=4).write(root)
    Toy(moe={(1, 2): 5.0, (8, 4): 9.0}).write(root / "home")
    assert load_bundle(HARDWARE, MODEL, VARIANT, 4).whole_experts().source == "tp1/moe.csv"


def test_a_misfit_hides_no_bundle_that_fits(root: Path) -> None:
    asked = job()
    write(root, model=asked.model.model_copy(update={"intermediate_size": 4096}))
    fits = write(root / "home")
    wanted = Wanted("Toy", LLAMA, "bf16", asked.model, asked.hardware)
    assert find_bundle(wanted, 1).folder == fits


def test_a_namesake_of_earlier_versions_is_passed_over(root: Path) -> None:
    """Computed bundles of any folder called ``base`` were filed under ``base``; measured ones are kept."""
    model = toy_model().model_copy(update={"name": "base", "path": "one/base"})
    for source in ("roofline", "torch"):
        Toy(meta={"source": source}).write(root)
        (root / f"profiler/perf/{HARDWARE}/base").mkdir(exist_ok=True)
        place = root / f"profiler/perf/{HARDWARE}/base/{VARIANT}"
        (root / f"profiler/perf/{HARDWARE}/{MODEL}/{VARIANT}").rename(place)
        wanted = Wanted(HARDWARE, bundle_label(model), VARIANT, model)
        if source == "torch":
            assert find_bundle(wanted, 1).folder.parent.name == "base"
        else:
            with pytest.raises(MissingFileError):
                find_bundle(wanted, 1)
            for path in sorted(place.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            place.rmdir()
