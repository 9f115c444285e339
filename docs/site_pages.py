"""Pages of the site that lie outside docs/: the README, the results, the changelog (a hook of MkDocs).

Links keep the form that works in a checkout; here they are turned into those that work in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "workloads/README.md": "shipped-workloads.md",
}
"""File of the repository -> page of the site."""
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```\w+)[^\n]*$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of :data:`OUTSIDE`."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page into links of the site, and keep only the language of a fenced block."""
    sources = {target: source for source, target in OUTSIDE.items()}
    name = page.file.src_uri
    folder = posixpath.dirname(sources.get(name, f"docs/{name}"))
    return _FENCE.sub(r"\1", _LINK.sub(lambda link: _site_link(link, folder), markdown))


def _site_link(link: re.Match[str], folder: str) -> str:
    """A link seen from ``folder`` of the repository as the site has it; files that are no page lose it."""
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in OUTSIDE:
        return f"[{text}]({OUTSIDE[path]}{anchor})"
    if path.startswith("docs/") and path.endswith(".md"):
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"
    return text
