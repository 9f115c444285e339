"""The page that all benchmarks write their sections into."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).with_name("RESULTS.md")


def write_section(name: str, text: str, page: Path = RESULTS) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``; the rest stays.

    A new section's marks are put into the page by hand, below its heading.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page.name}: the marks {begin} and {end} are missing")
    with atomic_write(page, "w") as handle:
        handle.write(f"{before}{begin}\n{text}\n{end}{after}")


def command(name: str, about: str, section: Callable[[], str], lacking: str = "") -> int:
    """The command of a benchmark: makes a section and puts it on the page.

    Args:
        name: of the section.
        about: what ``--help`` says.
        section: makes it.
        lacking: what is said where something that it needs is not there; empty: all is.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--print", action="store_true", dest="printed", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    if lacking:
        print(lacking)
        return 2
    text = section()
    print(text)
    if not args.printed:
        write_section(name, text)
    return 0


def measured_against_recordings(name: str, about: str, section: Callable[[], str], recorded: Path) -> int:
    """The command of a benchmark that compares with the recordings in a folder; see :func:`command`."""
    there = (recorded / "runs").is_dir()
    lacking = f"no recordings at {recorded}; set SERVESIM_RECORDED to the folder that holds them"
    return command(name, about, section, "" if there else lacking)
