"""``servesim support``, ``profile inspect``, ``profile diff`` and ``profile --source roofline``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from servesim.__main__ import main

MODEL = "meta-llama/Llama-3.1-8B"
SMALL = ["--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--max-kv", "1024"]
HARDWARE = """\
memory_bandwidth_gbs: 1000
l2_mib: 32
sm_count: 16
peak_tflops: {bfloat16: 100}
"""


@pytest.fixture(autouse=True)
def working_folder(root: Path) -> Path:
    (root / "configs/hardware").mkdir(parents=True)
    (root / "configs/hardware/Mine.yaml").write_text(HARDWARE)
    return root


def make(*flags: str, hardware: str = "Mine") -> int:
    return main(["profile", MODEL, "--hardware", hardware, "--source", "roofline", *SMALL, *flags])


def test_hardware_nobody_has_takes_a_file_of_four_facts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["support", MODEL, "--hardware", "Mine"]) == 0
    before = capsys.readouterr().out
    assert "bundle        none" in before
    assert "--source roofline" in before
    assert make() == 0
    assert Path("profiler/perf/Mine", MODEL, "bf16/meta.yaml").is_file()
    capsys.readouterr()
    assert main(["support", MODEL, "--hardware", "Mine"]) == 0
    after = capsys.readouterr().out
    assert "source        roofline" in after
    assert "extrapolated  tokens 65 to 2048" in after


def test_support_as_json_is_a_list_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    make()
    capsys.readouterr()
    assert main(["support", MODEL, "--hardware", "Mine", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["letter"], answer["bundle"]["source"]) == ("R", "roofline")


def test_the_matrix_has_a_letter_for_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    make("--kv-cache-dtype", "fp8")
    capsys.readouterr()
    assert main(["support", "--matrix", "--hardware", "Mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "Mine"]
    row = next(line for line in lines if line.startswith(MODEL))
    assert row.split() == [MODEL, "rRrr"]
    assert any("1 bundles there" in line for line in lines)


def test_unknown_hardware_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", MODEL, "--hardware", "H10"]) == 2
    error = capsys.readouterr().err
    assert "configs/hardware/H10.yaml" in error
    assert "did you mean" in error


@pytest.mark.parametrize("words", [["support"], ["support", MODEL], ["support", "--hardware", "Mine"]])
def test_half_a_question_is_no_question(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "give a MODEL and --hardware, or --matrix" in capsys.readouterr().err


def test_nothing_possible_is_status_1(working_folder: Path) -> None:
    (working_folder / "configs/hardware/Blank.yaml").write_text("gpu: a name and nothing else\n")
    assert main(["support", MODEL, "--hardware", "Blank"]) == 1


def test_inspect_shows_where_a_bundle_is_from_and_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    make("--tp", "1,2")
    capsys.readouterr()
    assert main(["profile", "inspect", f"Mine/{MODEL}/bf16", "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "source roofline" in out
    assert "degrees: 1, 2" in out
    assert "tp2 attention, decodes alone" in out


def test_inspect_refuses_a_degree_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert main(["profile", "inspect", f"Mine/{MODEL}/bf16", "--tp", "8"]) == 2
    assert "--tp: 8 is not allowed" in capsys.readouterr().err


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs matplotlib: pip install 'servesim[report]'"
)
def test_inspect_draws_png_files(working_folder: Path) -> None:
    make()
    assert main(["profile", "inspect", f"Mine/{MODEL}/bf16", "--plots", "plots"]) == 0
    files = sorted(path.name for path in (working_folder / "plots").iterdir())
    assert files == ["attention.png", "dense.png"]
    assert all((working_folder / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_diff_compares_table_by_table(capsys: pytest.CaptureFixture[str]) -> None:
    make()
    make("--dtype", "fp8")
    capsys.readouterr()
    words = ["profile", "diff", f"Mine/{MODEL}/bf16", f"Mine/{MODEL}/fp8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "tp1 dense gate_up_proj" in out
    assert main([*words, "--json"]) == 0
    rows = {row["table"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["attention decode"]["worst"] == 0.0
    assert rows["dense gate_up_proj"]["signed_median"] < -0.1


def test_diff_without_a_common_degree_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    make()
    make("--dtype", "fp8", "--tp", "2")
    assert main(["profile", "diff", f"Mine/{MODEL}/bf16", f"Mine/{MODEL}/fp8"]) == 2
    assert "none to compare" in capsys.readouterr().err


def test_a_missing_fact_of_the_hardware_file_ends_in_one_message(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (working_folder / "configs/hardware/Blank.yaml").write_text("gpu: a name and nothing else\n")
    assert make(hardware="Blank") == 2
    assert "configs/hardware/Blank.yaml: memory_bandwidth_gbs: is missing" in capsys.readouterr().err
