"""The console script."""

from __future__ import annotations

import subprocess
import sys

import pytest

from servesim import __main__ as console
from servesim.errors import MissingFileError, RunError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in console.COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'pydantic', 'rich', 'pandas', 'pyarrow', 'matplotlib', 'yaml'}"
    code = (
        "import sys; from servesim.__main__ import main; main(['--help']); "
        f"sys.exit(bool({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", console.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        console.main([command, "--help"])
    assert stop.value.code == 0
    assert f"servesim {command}" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("servesim 0.")


def test_a_misspelt_command_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["comprae"]) == 2
    assert "did you mean 'compare'?" in capsys.readouterr().err


def test_a_misspelt_flag_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        console.main(["--ouput", "x.csv"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: unknown argument '--ouput'; did you mean '--output'?; see servesim run --help\n"
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MissingFileError("x/ does not exist"), 2, "FileNotFoundError: x/ does not exist\n"),
        (RunError("cannot go on"), 1, "error: cannot go on\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_message_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("servesim.cli.run.run", fail)
    assert console.main([]) == status
    assert capsys.readouterr().err == message


def test_a_fault_of_ours_shows_its_traceback_only_when_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("servesim.cli.run.run", fail)
    assert console.main([]) == 1
    assert "a fault of servesim, not of your input: ZeroDivisionError: a bug" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        console.main(["--log-level", "DEBUG"])
