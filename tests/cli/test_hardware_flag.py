"""``--hardware`` puts a run or a comparison on another accelerator."""

from __future__ import annotations

import pytest

from servesim.__main__ import main


@pytest.mark.parametrize("hardware", ["H100", "H200", "B200", "L40S"])
def test_a_comparison_on_other_hardware_gives_a_table(
    hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--hardware", hardware, "--num-reqs", "5", "--no-auto-profile", "--csv"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "figure,unit,kv auto,kv fp8,kv fp8 change %"
    figures = {line.split(",")[0]: line.split(",")[2:] for line in table[1:]}
    wide, narrow = (float(value) for value in figures["kv_cache_tokens"][:2])
    assert narrow == pytest.approx(2 * wide, rel=0.001)


def test_accelerators_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"--set={name}: --hardware {name}" for name in ("H100", "H200")]
    assert main(["compare", *sets, "--num-reqs", "5", "--no-auto-profile", "--csv"]) == 0
    figures = {line.split(",")[0]: line.split(",")[2:] for line in capsys.readouterr().out.splitlines()[1:]}
    h100, h200 = (float(value) for value in figures["mean_tpot_ms"][:2])
    assert h200 < h100  # more bandwidth, the same chip


def test_a_bundle_nobody_has_is_an_error_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--hardware", "GB200", "--no-auto-profile"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "FileNotFoundError: profiler/perf/GB200/meta-llama/Llama-3.1-8B/bf16/ does not exist"
    )
    assert "servesim profile meta-llama/Llama-3.1-8B --hardware GB200 --source silicon" in error
