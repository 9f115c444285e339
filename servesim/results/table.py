"""A plain text table: first column to the left, everything else to the right."""

from __future__ import annotations

from dataclasses import field

from servesim.slotted import dataclass
from servesim.terminal import painted


@dataclass(slots=True)
class Table:
    """Cells are texts already formatted; ``None`` stands for a rule between groups of rows."""

    header: list[str]
    rows: list[list[str] | None] = field(default_factory=list)
    meanings: dict[tuple[int, int], str] = field(default_factory=dict)
    """(row, column) -> ``good`` or ``bad``: cells that are coloured where colours are shown."""
    kept: int = 1
    """First columns that every part of a table repeats when it is too wide for the screen."""
    together: int = 1
    """Columns after those that stay side by side, in groups of so many."""

    def plain(self, indent: str = "", width: int | None = None) -> str:
        """The table as lines of text, without trailing blanks.

        Args:
            indent: before every line.
            width: columns of the screen: a table that is wider folds its titles, and if that is not enough
                comes in parts, one below the other. No digit is ever cut.
        """
        columns = list(range(len(self.header)))
        if width is None or self._width(columns, self._widths()) + len(indent) <= width:
            return self._part(columns, self._widths(), indent)
        widths = self._widths(folded=True)
        parts = [self._part(part, widths, indent) for part in self._parts(widths, width - len(indent))]
        return "\n\n".join(parts)

    def fits(self, width: int | None) -> bool:
        """Whether the table is not wider than a screen, titles folded."""
        return width is None or self._width(range(len(self.header)), self._widths(folded=True)) <= width

    def _widths(self, folded: bool = False) -> list[int]:
        filled = [row for row in self.rows if row is not None]
        return [
            max(
                max((len(word) for word in title.split()), default=0) if folded else len(title),
                *(len(row[column]) for row in filled),
                0,
            )
            for column, title in enumerate(self.header)
        ]

    @staticmethod
    def _width(columns: list[int] | range, widths: list[int]) -> int:
        return sum(widths[column] for column in columns) + 2 * (len(columns) - 1)

    def _parts(self, widths: list[int], width: int) -> list[list[int]]:
        """Columns of every part: those kept, and as many groups as fit, but at least one."""
        kept = list(range(self.kept))
        parts = [kept]
        for first in range(self.kept, len(self.header), self.together):
            group = list(range(first, min(first + self.together, len(self.header))))
            if len(parts[-1]) > len(kept) and self._width([*parts[-1], *group], widths) > width:
                parts.append(kept)
            parts[-1] = [*parts[-1], *group]
        return parts

    def _part(self, columns: list[int], widths: list[int], indent: str) -> str:
        rule = indent + "─" * self._width(columns, widths)
        titles = [_folded(self.header[column], widths[column]) for column in columns]
        height = max(len(lines) for lines in titles)
        lines = []
        for line in range(height):
            cells = {
                column: folded[line - height + len(folded)] if line >= height - len(folded) else ""
                for column, folded in zip(columns, titles, strict=True)
            }
            lines.append(self._line(cells, widths, indent, None))
        lines.append(rule)
        for number, row in enumerate(self.rows):
            shown = rule if row is None else self._line(dict(enumerate(row)), widths, indent, number, columns)
            lines.append(shown)
        return "\n".join(lines)

    def _line(
        self,
        cells: dict[int, str],
        widths: list[int],
        indent: str,
        row: int | None,
        columns: list[int] | None = None,
    ) -> str:
        shown = []
        chosen = list(cells) if columns is None else columns
        last = max((place for place, column in enumerate(chosen) if cells[column]), default=0)
        for place, column in enumerate(chosen[: last + 1]):
            cell, width = cells[column], widths[column]
            padded = cell.rjust(width) if column else cell.ljust(width) if place < last else cell
            meaning = self.meanings.get((row, column), "") if row is not None else ""
            shown.append(painted(padded, meaning))
        return (indent + "  ".join(shown)).rstrip()


def _folded(title: str, width: int) -> list[str]:
    """A title in lines of ``width``, broken between words only."""
    lines = [""]
    for word in title.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
