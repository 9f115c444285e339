"""The scripts of ``benchmarks/`` still start, and one still finds the constants that it once wrote."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.profiler.silicon_data import needs_silicon

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
COMMANDS = {
    path.stem: path for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_answers_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = COMMANDS[name].read_text(encoding="utf-8")
    parses = re.search(r"(ArgumentParser|command|measured_against_recordings)\(", text)
    assert parses, "--help would run it, and write its section of RESULTS.md"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(COMMANDS[name]), run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_no_benchmark_is_overlooked() -> None:
    assert len(COMMANDS) == len(list(FOLDER.glob("*.py"))) - len({"results_page", "roofline_samples"})


@needs_silicon
def test_a_fit_gives_the_shipped_constants() -> None:
    """But for those of decodes, which fit_roofline.py says why they moved."""
    import fit_roofline
    from roofline_samples import measured_hardware, samples_of

    from servesim.profiler.roofline.efficiency import fits

    hardware = next(each for each in measured_hardware() if each.name == "A100")
    found = fit_roofline.fit(hardware, samples_of(hardware, fit_roofline.MODELS))
    shipped = fits()["gpus"]["a100_sxm"]
    assert found.keys() == shipped.keys()
    for name, value in shipped.items():
        assert found[name] == pytest.approx(value, rel=0.06 if name.startswith("decode_") else 1e-9), name
