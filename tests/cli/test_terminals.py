"""What commands print on screens of any encoding, width and colour, and when nothing can be printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servesim import terminal
from servesim.results.table import Table

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--num-reqs", "3"]
COMMANDS = [
    [*RUN, "--ensemble", "2"],
    ["compare", *RUN],
    ["slo", "--slo", "ttft:1000", *RUN],
    ["support", "meta-llama/Llama-3.1-8B", "--hardware", "H100"],
    ["explain-step", "--decodes", "4", "--kv", "64"],
    ["workload", "describe", "workloads/example_trace.jsonl"],
    ["profile", "inspect", "profiler/perf/H100/meta-llama/Llama-3.1-8B/bf16"],
]


def servesim(
    words: list[str], stdout: int | None = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The program in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "servesim", *words],
        cwd=ROOT, env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "encoding"),
    [*((words, "ascii") for words in COMMANDS), (COMMANDS[0], "cp1252")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_any_encoding_shows_every_command(words: list[str], encoding: str) -> None:
    done = servesim(words, PYTHONIOENCODING=encoding)
    assert (done.returncode, b"Unicode" in done.stderr) == (0, False), done.stderr
    shown = done.stdout.decode(encoding)
    assert "─" not in shown
    assert "\\u" not in shown


def test_characters_without_a_likeness_are_escaped() -> None:
    terminal.prepare_streams()
    assert "a─b … 日".encode("ascii", "servesim-plain") == b"a-b ... \\u65e5"
    assert "café ─".encode("cp1252", "servesim-plain").decode("cp1252") == "café -"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [RUN, ["--help"]], ids=["run", "help"])
def test_a_full_disk_under_stdout_is_told(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = servesim(words, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == b"error: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors are closed another way there")
def test_a_closed_stdout_is_told() -> None:
    command = f'exec "{sys.executable}" -m servesim --version >&-'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: standard output is closed; give it a file, or /dev/null\n"


@pytest.mark.skipif(sys.platform == "win32", reason="another signal there")
@pytest.mark.parametrize("module", ["servesim", "serving", "servesim.door"])
def test_ctrl_c_while_modules_load_ends_quietly(module: str) -> None:
    # A module that is loaded early on sends the signal: no test of ours depends on how fast a machine is.
    code = (
        "import builtins, os, runpy, signal\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *rest, **named):\n"
        "    if name == 'servesim.errors': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return load(name, *rest, **named)\n"
        "builtins.__import__ = interrupted\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = "import signal; from servesim.door import main; main(); print(signal.getsignal(2))"
    ignoring = "import signal, sys; signal.signal(2, signal.SIG_IGN); sys.argv[1:] = ['--version']; " + code
    done = subprocess.run([sys.executable, "-c", ignoring], cwd=ROOT, capture_output=True, check=False)
    assert str(int(signal.SIG_IGN)).encode() in done.stdout or b"SIG_IGN" in done.stdout


def test_the_screen_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.screen_width() is None, "captured output is no terminal"
    for columns, width in (("60", 60), ("200", 200), ("3", terminal.NARROWEST)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal.screen_width() == width


def test_colours_follow_the_customs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert terminal.painted("+3 %", "good") == "+3 %"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert terminal.painted("+3 %", "good") == "\033[32m+3 %\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.painted("+3 %", "good") == "+3 %"


def test_lines_break_between_words_only() -> None:
    long = "source /a/path/that/is/long-and-has-hyphens/and/more " * 3
    for line in terminal.wrapped(long, 44, indent="  ").splitlines():
        assert all(word in long.split() for word in line.split())


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("sets", [1, 4])
def test_comparisons_fit_the_screen_with_all_their_digits(columns: int, sets: int) -> None:
    words = [word for n in range(1, sets + 1) for word in ("--set", f"at most {n}: --max-num-seqs {n}")]
    small = ["compare", "--dataset", "workloads/short_chat.jsonl", "--num-reqs", "4", *words]
    wide = servesim(small).stdout.decode()
    shown = servesim(small, COLUMNS=str(columns)).stdout.decode()
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    figures = re.compile(r"(?<![\w.])[\d,]*\d(?:\.\d+)?(?![\w.])")
    assert set(figures.findall(wide)) <= set(figures.findall(shown)), "no digit is cut"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_banner_breaks_between_words(columns: int) -> None:
    narrow = servesim(RUN, COLUMNS=str(columns)).stdout.decode().partition("[INFO]")[0].replace("·", "")
    words = servesim(RUN).stdout.decode().partition("[INFO]")[0].replace("·", "").split()
    assert narrow.split() == words
    longest = max(map(len, words)) + 12
    assert max(map(len, narrow.splitlines())) <= max(columns, longest)


def test_the_closing_figures_fit_the_screen() -> None:
    whole = servesim(RUN, COLUMNS="60").stdout.decode()
    closing = whole[whole.index("requests  ", whole.rindex("[INFO]")) :]
    assert max(map(len, closing.splitlines())) <= 60


def test_warnings_are_yellow_where_colours_are_shown() -> None:
    far = ["--num-reqs", "2", "--max-num-batched-tokens", "100000"]
    assert b"\033[33m[WARNING]\033[0m" in servesim(far, FORCE_COLOR="1").stderr
    assert servesim(far, FORCE_COLOR="1", NO_COLOR="1").stderr.startswith(b"[WARNING]")
    assert servesim(far).stderr.startswith(b"[WARNING]")


def test_wide_tables_come_in_parts() -> None:
    table = Table(["", "first set", "change", "second set", "change"], kept=1, together=2)
    table.rows.append(["a row", "1,234,567", "+1%", "7,654,321", "-2%"])
    assert table.plain(width=200) == table.plain()
    parts = table.plain(width=30).split("\n\n")
    assert [part.splitlines()[-1] for part in parts] == [
        "a row  1,234,567     +1%",
        "a row  7,654,321     -2%",
    ]
    assert all(len(line) <= 30 for part in parts for line in part.splitlines())
