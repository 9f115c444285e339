"""Keeps the pages true: runs every command they show and puts its real output under it.

    python docs/refresh.py                      rewrite README.md and docs/*.md
    python docs/refresh.py --check              change nothing, say what differs (status 1 if something does)
    python docs/refresh.py docs/quickstart.md   only these pages

Run are the lines that start with ``$ `` in blocks fenced ``console`` (a backslash at the end continues a
line, a here-document goes on to its end) and the ``>>>`` examples in blocks fenced ``python``. A page runs
from top to bottom in a temporary copy of configs, workloads and profiles, with the package of this checkout;
what one command writes, the next can read. Shown output may leave lines out with a line ``…``; write ``…``
alone to have it filled in. A command with nothing under it is run and its output not shown.

Words after ``console`` in the line that opens a block:

    status=2          the exit status to expect (0 otherwise)
    head=10 tail=5    show the first and last lines only, ``…`` between them
    needs=MODULE      run only where this module can be imported
    setup             not run: it makes the environment that the other commands run in

Blocks fenced ``console-norun`` are not run.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
ELISIONS = ("…", "...")
VARIES = re.compile(r"^wall time .*", re.MULTILINE)
"""What differs from run to run."""
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'")
_COPIED = ("configs", "examples", "workloads", "profiler")
_TIMEOUT_S = 3600


@dataclass(slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    words: list[str]
    """What stands after the language."""
    start: int
    """Index of the first line inside the block."""
    lines: list[str]

    @property
    def is_run(self) -> bool:
        """Whether its commands can be run here."""
        needed = self.word("needs")
        return (
            self.language == "console"
            and "setup" not in self.words
            and (needed is None or find_spec(needed) is not None)
        )

    def word(self, name: str) -> str | None:
        """``5`` for ``tail=5``; None when the block does not say."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), None)


@dataclass(slots=True)
class Command:
    """A command of a block and the output shown under it."""

    offset: int
    """Index of its first line in the block."""
    source: list[str]
    """Its lines as they stand in the page."""
    shown: list[str]
    apart: bool
    """Whether an empty line stands before it."""

    @property
    def text(self) -> str:
        """What is handed to the shell."""
        return "\n".join(self.source)[2:]


@dataclass(slots=True)
class Difference:
    """Something a page says that is not so."""

    line: int
    """Line number of the command or example, from 1."""
    text: str


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(lines: Sequence[str]) -> Iterator[Block]:
    """The fenced blocks of a page, top to bottom."""
    opened: Block | None = None
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            language, *words = line[3:].split() or [""]
            opened = Block(language, words, index + 1, [])
        else:
            opened.lines = list(lines[opened.start : index])
            yield opened
            opened = None
    if opened is not None:
        raise SystemExit(f"line {opened.start}: a block is opened and not closed")


def commands(block: Block) -> list[Command]:
    """The ``$ `` lines of a block, each with what is shown under it."""
    found: list[Command] = []
    until = ""  # the line that ends a here-document, or a line without a backslash at its end
    for offset, line in enumerate(block.lines):
        if until:
            found[-1].source.append(line)
            until = "" if line == until or (until == "\\" and not line.endswith("\\")) else until
        elif line.startswith("$ "):
            apart = offset > 0 and not block.lines[offset - 1].strip()
            found.append(Command(offset, [line], [], apart))
            here = _HERE_DOCUMENT.search(line)
            until = here[1] if here else "\\" if line.endswith("\\") else ""
        elif found:
            found[-1].shown.append(line)
    for command in found:
        while command.shown and not command.shown[-1].strip():
            command.shown.pop()
    return found


@contextlib.contextmanager
def working_copy() -> Iterator[Path]:
    """A temporary folder that looks like a checkout with its environment in ``.venv``."""
    with tempfile.TemporaryDirectory(prefix="servesim-docs-") as name:
        folder = Path(name)
        for part in _COPIED:
            shutil.copytree(ROOT / part, folder / part)
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for program, module in (("servesim", "-m servesim "), ("python", "")):
            path = programs / program
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n', encoding="utf-8")
            path.chmod(0o755)
        yield folder


def run(command: str, folder: Path) -> tuple[int, list[str]]:
    """Exit status and lines printed (both streams, as on a screen) of a command run in ``folder``."""
    environment = {
        **os.environ,
        "SERVESIM_AUTO_PROFILE": "0",  # whether the measurements are installed must not show
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_DATA_HOME": str(folder / "user-data"),
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.returncode, [line.rstrip() for line in done.stdout.rstrip().splitlines()]


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether ``printed`` is what is shown, apart from elided lines and wall times."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() in ELISIONS else re.escape(VARIES.sub("", line.rstrip())) + r"\n"
        for line in shown
    )
    text = "".join(VARIES.sub("", line) + "\n" for line in printed)
    return re.fullmatch(pattern, text) is not None


def agrees(shown: Sequence[str], printed: Sequence[str], block: Block) -> bool:
    """Whether what is shown is true, and is as much of it as the block wants shown."""
    cut = block.word("head") is not None or block.word("tail") is not None
    return matches(shown, printed) and (len(shown) == len(elided(printed, block)) if cut else shown != ["…"])


def elided(printed: Sequence[str], block: Block) -> list[str]:
    """The lines to show of what was printed: all, or what ``head`` and ``tail`` of the block say."""
    head, tail = block.word("head"), block.word("tail")
    if head is None and tail is None:
        return list(printed)
    first, last = int(head or 0), int(tail or 0)
    if len(printed) <= first + last + 1:
        return list(printed)
    return [*printed[:first], "…", *printed[len(printed) - last :]]


def check_page(path: Path) -> tuple[list[str], list[Difference]]:
    """Run everything on a page.

    Returns:
        The page's lines with the real output in place, and what differed from them.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    fresh = list(lines)
    differences: list[Difference] = []
    namespace: dict[str, object] = {}
    found = list(blocks(lines))
    with working_copy() as folder:
        replacements = []
        for block in found:
            if block.is_run:
                replacements.append((block, _rerun(block, folder, differences)))
            elif block.language == "python" and any(line.startswith(">>> ") for line in block.lines):
                replacements.append((block, _examples(block, folder, namespace, differences)))
    for block, replacement in reversed(replacements):
        fresh[block.start : block.start + len(block.lines)] = replacement
    return fresh, differences


def _rerun(block: Block, folder: Path, differences: list[Difference]) -> list[str]:
    """Run a block's commands; the block's lines with what they really print."""
    expected = int(block.word("status") or 0)
    fresh: list[str] = []
    for command in commands(block):
        status, printed = run(command.text, folder)
        shown, problem = command.shown, ""
        if status != expected:
            problem = f"{command.text}\nended with {status}, not {expected}:"
        elif shown and not agrees(shown, printed, block):
            shown = elided(printed, block)
            problem = f"{command.text}\nprints something else:"
        if problem:
            line = block.start + command.offset + 1
            differences.append(Difference(line, "\n".join([problem, *printed])))
        fresh += [*([""] if command.apart else []), *command.source, *shown]
    return fresh


class _Recorder(doctest.DocTestRunner):
    """Keeps what examples print instead of reporting it."""

    def __init__(self) -> None:
        super().__init__(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
        self.wrong: dict[int, str] = {}
        """Line of an example -> what it printed instead of what is shown."""

    def report_start(self, *_: object) -> None:
        pass

    def report_failure(self, _out: object, _test: object, example: doctest.Example, got: str) -> None:
        self.wrong[example.lineno] = got

    def report_unexpected_exception(
        self, _out: object, _test: object, example: doctest.Example, exc_info: object
    ) -> None:
        self.wrong[example.lineno] = f"raised {exc_info[1]!r}"  # type: ignore[index]


def _examples(
    block: Block, folder: Path, namespace: dict[str, object], differences: list[Difference]
) -> list[str]:
    """Run a block's ``>>>`` examples; the block's lines with what they really print."""
    test = doctest.DocTestParser().get_doctest("\n".join(block.lines) + "\n", namespace, "page", None, 0)
    recorder = _Recorder()
    with contextlib.chdir(folder):
        recorder.run(test, clear_globs=False)
    namespace.update(test.globs)
    fresh = list(block.lines)
    for example in reversed(test.examples):
        got = recorder.wrong.get(example.lineno)
        if got is None:
            continue
        differences.append(
            Difference(block.start + example.lineno + 1, f"{example.source}prints something else:\n{got}")
        )
        start = example.lineno + example.source.count("\n")
        if not got.startswith("raised "):
            fresh[start : start + example.want.count("\n")] = got.splitlines()
    return fresh


def main() -> int:
    """Refresh or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run every command of the pages and show its real output.")
    parser.add_argument("pages", nargs="*", type=Path, help="pages (default: README.md and docs/*.md)")
    parser.add_argument("--check", action="store_true", help="change nothing, only say what differs")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    failed = 0
    for page in args.pages or pages():
        fresh, differences = check_page(page)
        for difference in differences:
            print(f"{page}:{difference.line}: {difference.text}\n")
        if args.check:
            failed += len(differences)
            continue
        text = "\n".join(fresh) + "\n"
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"{page}: refreshed")
        failed += sum("ended with" in d.text or "raised " in d.text for d in differences)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
