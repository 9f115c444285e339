"""A plain text table: first column to the left, everything else to the right."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Table:
    """Cells are texts already formatted; ``None`` stands for a rule between groups of rows."""

    header: list[str]
    rows: list[list[str] | None] = field(default_factory=list)

    def plain(self, indent: str = "") -> str:
        """The table as lines of text, without trailing blanks."""
        filled = [row for row in self.rows if row is not None]
        widths = [
            max(len(row[column]) for row in [self.header, *filled]) for column in range(len(self.header))
        ]
        rule = indent + "─" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [_line(self.header, widths, indent), rule]
        lines += [rule if row is None else _line(row, widths, indent) for row in self.rows]
        return "\n".join(lines)


def _line(cells: list[str], widths: list[int], indent: str) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return indent + "  ".join(padded).rstrip()
