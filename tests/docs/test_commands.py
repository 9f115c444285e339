"""What README.md and the pages of docs/ show is what happens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from docs import refresh

if TYPE_CHECKING:
    from pathlib import Path

PAGES = refresh.pages()
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_example_does_what_the_page_shows(page: Path) -> None:
    _, differences = refresh.check_page(page)
    assert not differences, (
        "\n\n".join(f"{page.name}:{difference.line}: {difference.text}" for difference in differences)
        + "\n\n`make docs` shows the real output in the pages"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target for target in _LINK.findall(text) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


def _block(*lines: str, words: str = "") -> refresh.Block:
    (block,) = refresh.blocks([f"```console {words}", *lines, "```"])
    return block


def test_a_command_may_go_on_after_a_backslash() -> None:
    (first, second) = refresh.commands(_block("$ echo a \\", "  b", "a b", "", "$ true"))
    assert (first.text, first.shown) == ("echo a \\\n  b", ["a b"])
    assert (second.text, second.shown) == ("true", [])


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a"], ["a", "b"], False),
        (["a", "…"], ["a", "b", "c"], True),
        (["...", "c"], ["a", "b", "c"], True),
        (["a", "…", "d"], ["a", "b", "c"], False),
        (["wall time      0.32 s"], ["wall time      7.01 s"], True),
        (["time      0.32 s"], ["time      7.01 s"], False),
    ],
)
def test_shown_output_is_compared_line_by_line(shown: list[str], printed: list[str], same: bool) -> None:
    assert refresh.matches(shown, printed) is same


def test_a_page_that_is_wrong_is_found_and_corrected(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    wrong = [
        *("```console", "$ echo 1", "2", "", "$ echo 3", "3", "```", "", "text", ""),
        *("```console head=1 tail=1", "$ seq 5", "…", "6", "```", ""),
        *("```console status=3", "$ exit 3", "```", ""),
        *("```python", ">>> x = 20", ">>> x + 1", "22", "```"),
    ]
    page.write_text("\n".join(wrong) + "\n")
    fresh, differences = refresh.check_page(page)
    assert [difference.line for difference in differences] == [2, 12, 23]
    right = [*wrong]
    right[2], right[12:14], right[-2] = "1", ["1", "…", "5"], "21"
    assert fresh == right


def test_a_command_that_fails_leaves_the_page_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ false\nfine\n```\n")
    fresh, differences = refresh.check_page(page)
    assert "ended with 1, not 0" in differences[0].text
    assert fresh == page.read_text().splitlines()


def test_a_here_document_belongs_to_its_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ cat > a <<'END'\n$ 1\nEND\n$ cat a\n$ 1\n```\n")
    found = refresh.commands(_block(*page.read_text().splitlines()[1:-1]))
    assert [command.text for command in found[:2]] == ["cat > a <<'END'\n$ 1\nEND", "cat a"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_shows_a_fault_or_a_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "a fault of servesim" not in text
    assert "Traceback" not in text
    assert str(refresh.ROOT) not in text
