"""The page that all benchmarks write their sections into."""

from __future__ import annotations

from pathlib import Path

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
    temporary = page.with_suffix(".tmp")
    temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    temporary.replace(page)
