from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from servesim.cost.bundle import load_bundle, range_warnings
from servesim.cost.finding import profile_command, variant_dtypes
from servesim.cost.step_terms import stage_terms
from servesim.cost.terms import whole_model
from servesim.errors import InputError, MissingFileError
from tests.cost.bundles import HARDWARE, MODEL, VARIANT, Toy, toy_architecture, toy_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLDER = f"profiler/perf/{HARDWARE}/{MODEL}/{VARIANT}"


def test_only_the_folder_asked_for_is_read(root: Path) -> None:
    bundle = Toy().bundle(root)
    (root / FOLDER / "tp2").mkdir()
    (root / FOLDER / "tp2" / "dense.csv").write_bytes(b"\xff nonsense")
    assert bundle.tables(1).dense["embedding"].at([51]).tolist() == [52.0]


def test_a_missing_variant_is_told_with_the_command(root: Path) -> None:
    Toy().write(root)
    with pytest.raises(MissingFileError) as error:
        load_bundle(HARDWARE, MODEL, "bf16-kvfp8")
    text = str(error.value)
    assert text.startswith(f"profiler/perf/{HARDWARE}/{MODEL}/bf16-kvfp8/ does not exist")
    assert f"There is for {MODEL} on {HARDWARE}: bf16." in text
    command = f"servesim profile {MODEL} --hardware {HARDWARE} --source silicon"
    assert f"{command} --dtype bfloat16 --kv-cache-dtype fp8 --tp 1" in text


def test_a_model_without_bundles_shows_where_there_are_some(root: Path) -> None:
    Toy().write(root)
    with pytest.raises(MissingFileError, match=f"other hardware has {HARDWARE}/{MODEL}/{VARIANT}"):
        load_bundle("Other", MODEL, VARIANT)
    with pytest.raises(MissingFileError, match=f"for {HARDWARE} there is {HARDWARE}/{MODEL}/{VARIANT}"):
        load_bundle(HARDWARE, "org/other", VARIANT)
    with pytest.raises(MissingFileError, match="no bundle for org/other, and none for Other"):
        load_bundle("Other", "org/other", VARIANT)


def test_a_missing_degree_names_those_there_are(root: Path) -> None:
    with pytest.raises(MissingFileError, match=rf"{FOLDER}/tp4/ does not exist\n{FOLDER} has tp1\.") as error:
        Toy().bundle(root).tables(4)
    assert "--dtype bfloat16 --kv-cache-dtype auto --tp 1,4" in str(error.value)


def test_the_command_spells_dtypes_as_flags_do() -> None:
    assert variant_dtypes("bf16-kvfp8") == ("bfloat16", "fp8")
    assert variant_dtypes("fp8") == ("fp8", "auto")
    assert profile_command("H", "m", "fp8-kvfp8", 2).endswith("--dtype fp8 --kv-cache-dtype fp8 --tp 2")


def test_the_banner_line_says_source_and_confidence(root: Path) -> None:
    toy = Toy(
        meta={"source": "silicon", "gpu": "G", "confidence": {"decode": "measured", "history": "derived"}}
    )
    assert toy.bundle(root).describe() == f"{FOLDER} (source silicon, G, decode measured, history derived)"


def test_a_run_beyond_the_profiled_range_is_warned_about_once(root: Path) -> None:
    bundle = Toy(meta={"engine_effective": {"max_num_batched_tokens": 2048, "max_num_seqs": 64}}).bundle(root)
    assert range_warnings(bundle, 2048, 64) == []
    (warning,) = range_warnings(bundle, 4096, 128)
    assert (
        "max_num_batched_tokens 4096 (profiled up to 2048) and max_num_seqs 128 (profiled up to 64)"
        in warning
    )
    assert "max_num_seqs unlimited (" in range_warnings(bundle, 1, 2**31 - 1)[0]
    assert range_warnings(Toy(meta={}).bundle(root), 10**6, 10**6) == []


def test_unknown_layers_and_columns_are_passed_over(root: Path) -> None:
    bundle = Toy().bundle(root)
    path = root / FOLDER / "tp1" / "dense.csv"
    lines = path.read_text().splitlines()
    lines = [f"note,{line}" if i == 0 else f"hello,{line}" for i, line in enumerate(lines)]
    path.write_text("\n\n".join([lines[0], "x,new_layer,1,5.0", *lines[1:]]) + "\n\n")
    tables = bundle.tables(1)
    assert tables.dense["new_layer"].at([3]).tolist() == [5.0]
    stage_terms(toy_architecture(root), whole_model(toy_model()), tables)


def test_a_table_of_numbers_may_have_a_column_of_notes(root: Path) -> None:
    bundle = Toy().bundle(root)
    plain = bundle.tables(1).attention
    path = root / FOLDER / "tp1" / "attention.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"note,{header}", *(f"hello,{row}" for row in rows)]))
    noted = load_bundle(bundle.hardware, bundle.model, bundle.variant).tables(1).attention
    assert noted.tensor.tolist() == plain.tensor.tolist()


def test_a_layer_of_the_architecture_without_rows_is_an_error(root: Path) -> None:
    toy = Toy()
    del toy.dense["o_proj"]
    with pytest.raises(
        InputError, match=f"{FOLDER}/tp1/dense.csv: layer o_proj of the architecture has no rows"
    ):
        toy.timer(root)
    with pytest.raises(InputError, match="layer moe of the architecture has no rows"):
        Toy().timer(root, experts=4)


Damage = tuple[str, "Callable[[bytes], bytes] | None", str]


def _swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return edit


ATT, DENSE, SEQ = "tp1/attention.csv", "tp1/dense.csv", "tp1/per_sequence.csv"
MALFORMED: list[Damage] = [
    (ATT, lambda _: b"", "line 1: the file is empty"),
    (ATT, lambda c: c.splitlines()[0] + b"\n", "line 1: there are no rows"),
    (ATT, _swap(b"kv_decode", b"kv"), "line 1: column kv_decode is missing"),
    (ATT, _swap(b"kv_decode", b"kv_prefill"), "line 1: column kv_decode is missing"),
    (ATT, lambda c: c.replace(b",time_us", b"").replace(b"\n", b" \n"), "line 1: column time_us is missing"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,sixty,7.0"), "line 3: kv_decode is `sixty`; must be a number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,nan"), "line 3: time_us is `nan`; must be a finite number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,inf"), "line 3: time_us is `inf`; must be a finite number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,-7.0"), "line 3: time_us is `-7.0`; must not be negative"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,6.5,7.0"), "line 3: kv_decode is `6.5`; must be a whole number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,1e300,7.0"), "line 3: kv_decode is `1e300`; must be a whole number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,"), "line 3: time_us is ``; must be a number"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,true"), "line 3: time_us is `true`; must be a number"),
    (ATT, _swap(b"0,0,1,64,7.0", b'0,0,1,64,"7"'), 'line 3: time_us is `"7"`; must be a number'),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,64,7.0,9"), "line 3: 6 fields instead of 5"),
    (ATT, _swap(b"0,0,1,64,7.0", b"0,0,1,16,7.0"), "line 3: the same point as line 2"),
    (ATT, lambda c: c.rstrip()[:-8], "4 fields instead of 5 (is the file cut short?)"),
    (ATT, _swap(b"0,0,1,64", b"\xff,0,1,64"), "line 3: byte 0xff is not UTF-8"),
    (
        ATT,
        lambda c: b"\n".join(x for x in c.splitlines() if not x.startswith(b"0,")),
        "steps without prefill",
    ),
    (ATT, lambda c: b"\n".join(x for x in c.splitlines() if x[:1] in b"p0"), "steps with prefill"),
    (DENSE, _swap(b"qkv_proj,9,18.0", b",9,18.0"), "line 3: layer is empty"),
    (DENSE, _swap(b"qkv_proj,9,18.0", b"qkv_proj,9"), "line 3: 2 fields instead of 3"),
    (DENSE, _swap(b"qkv_proj,9,18.0", b"qkv_proj,9,fast"), "line 3: time_us is `fast`; must be a number"),
    (DENSE, _swap(b"qkv_proj,9,18.0", b"qkv_proj,1,18.0"), "line 3: the same point as line 2"),
    (DENSE, _swap(b"layer,tokens,time_us", b"layer,tokens,tokens,time_us"), "column tokens stands twice"),
    (SEQ, _swap(b"lm_head,11,60.0", b"lm_head,11,NaN"), "line 3: time_us is `NaN`; must be a finite number"),
    (SEQ, None, "tp1/per_sequence.csv: no such file; the bundle is incomplete"),
    ("meta.yaml", None, "meta.yaml: no such file"),
    ("meta.yaml", lambda _: b"a: [1\n", "line 2 column 1: not valid YAML"),
    ("meta.yaml", lambda _: b"- 1\n", "line 1: a list is not allowed here"),
    ("meta.yaml", lambda _: b"skew_fit: yes please\n", "skew_fit: 'yes please' is not allowed"),
    ("meta.yaml", _swap(b"alpha_default: 0.25", b"alpha_default: .nan"), "per_tp.1.alpha_default: nan"),
    ("meta.yaml", _swap(b"bucket_axes", b"axes"), "skew_fit.bucket_axes: None is not allowed"),
    (
        "meta.yaml",
        lambda c: re.sub(rb" *- n<=2\n", b"", c),
        "n_bins must be a list of numbers, one entry longer",
    ),
    ("meta.yaml", _swap(b"- 1000000\n", b"- 3\n"), "skew_fit.bucket_axes.n_bins"),
    ("tp1/skew_fit.csv", None, "skew_fit.csv: no such file, though"),
    ("tp1/skew_fit.csv", _swap(b"n<=2", b"n<=3"), "line 2: bucket 'n<=3' is not among the labels"),
    ("tp1/skew_fit.csv", _swap(b"0.5", b"x"), "line 2: alpha is `x`; must be a number"),
]


@pytest.mark.parametrize(
    ("name", "damage", "expected"), MALFORMED, ids=[f"{n}: {e}" for n, _, e in MALFORMED]
)
def test_a_malformed_bundle_is_told_with_file_and_line(
    root: Path, name: str, damage: Callable[[bytes], bytes] | None, expected: str
) -> None:
    Toy(skew=[(0, "n<=2", "sr<=50%", "kvB<=100", "kp=0", 0.5)]).write(root)
    path = root / FOLDER / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as error:
        load_bundle(HARDWARE, MODEL, VARIANT).tables(1)
    assert str(error.value).startswith(f"{FOLDER}/{name}: ")
    assert expected in str(error.value)


def test_a_collective_measured_twice_is_ambiguous(root: Path) -> None:
    comm = [("all_reduce", 2, 64, 7.0), ("all_gather", 2, 64, 7.0), ("all_reduce", 2, 64, 8.0)]
    with pytest.raises(InputError, match=r"tp2/comm\.csv: line 4: the same point as line 2"):
        Toy(tp=2, comm=comm).bundle(root).tables(2)


def test_bad_limits_are_told_with_their_key(root: Path) -> None:
    bundle = Toy(meta={"engine_effective": {"max_num_seqs": "many"}}).bundle(root)
    with pytest.raises(InputError, match=r"engine_effective\.max_num_seqs: 'many' is not allowed"):
        range_warnings(bundle, 1, 1)
