"""What decides whether CI may pass: nothing is skipped for want of a package or of data that are there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SKIPS = Path(__file__).resolve().parent.parent / ".ci" / "skips.py"


@pytest.fixture
def skips() -> ModuleType:
    found = importlib.util.spec_from_file_location("ci_skips", SKIPS)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def report(path: Path, *cases: tuple[str, str, str | None]) -> str:
    """A JUnit file: (module, test, reason of its skip or None)."""
    tests = [
        f'<testcase classname="{module}" name="{name}">'
        + (f'<skipped type="pytest.skip" message="{reason}"/>' if reason is not None else "")
        + "</testcase>"
        for module, name, reason in cases
    ]
    path.write_text(f"<testsuites><testsuite>{''.join(tests)}</testsuite></testsuites>")
    return str(path)


def test_a_skip_for_want_of_a_package_fails(
    skips: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = report(
        tmp_path / "1.xml",
        ("tests.test_ci", "test_a", "needs PyTorch: pip install 'servesim[torch]'"),
        ("", "tests.test_house", "could not import 'torch'"),
        ("tests.test_ci", "test_b", "there is a GPU"),
        ("tests.test_ci", "test_d", "halves need a single stage"),
        ("tests.test_ci", "test_c", None),
    )
    assert skips.main([first]) == 1
    assert "WANTING tests.test_ci::test_a: needs PyTorch" in capsys.readouterr().out
    assert skips.main(["--files", first]) == 0
    assert capsys.readouterr().out == "tests/test_ci.py\ntests/test_house.py\n"
    second = report(
        tmp_path / "2.xml", ("tests.test_ci", "test_a", None), ("tests.test_house", "test_x", None)
    )
    assert skips.main([first, second]) == 0
    assert "tests.test_ci::test_b: there is a GPU" in capsys.readouterr().out


def test_recorded_data_may_be_missing_elsewhere(
    skips: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(tmp_path / "1.xml", ("tests.test_ci", "test_a", "no recorded data at x"))
    monkeypatch.delenv("SERVESIM_RECORDED", raising=False)
    assert skips.main([first]) == 0
    monkeypatch.setenv("SERVESIM_RECORDED", "/somewhere")
    assert skips.main([first]) == 1


def test_the_script_of_ci_is_sound() -> None:
    text = (SKIPS.parent / "run").read_text()
    assert "timeout" not in text
    assert "|| true" not in text
    assert sys.version_info >= (3, 11)
