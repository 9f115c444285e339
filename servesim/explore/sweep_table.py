"""The rows of a sweep: as a table on the screen, as CSV or Parquet, as a DataFrame."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from servesim.results.atomic import atomic_write
from servesim.results.csv import is_parquet, require_parquet
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd

_SHOWN = 40
"""Rows of the table on the screen at most."""
_FIGURES = (
    ("output_throughput", "output tok/s"),
    ("output_throughput_per_gpu", "per GPU"),
    ("mean_ttft_ms", "TTFT mean ms"),
    ("p99_ttft_ms", "TTFT P99 ms"),
    ("p99_tpot_ms", "TPOT P99 ms"),
)
_LAST = ("notes", "run_id", "servesim", "bundle", "options")
"""Columns at the end of a row: where it comes from."""


@dataclass
class Sweep:
    """One row for each configuration, in the order of the space."""

    names: list[str]
    """What the configurations set."""
    rows: list[dict[str, Any]]
    """``key``, ``status`` (``ok``, ``rejected``, ``failed``), ``reason``, what the configuration sets, the
    figures of the summary, where they come from."""
    ruled_out: int = 0
    """Combinations that the constraints ruled out."""
    notes: list[str] = field(default_factory=list)
    """What should be known of the sweep as a whole."""

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows without figures."""
        return [row for row in self.rows if row["status"] != "ok"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The row with the highest output throughput per GPU, among those that keep the SLO if there is
        one."""
        able = [row for row in self.rows if row["status"] == "ok" and row.get("slo_met", True)]
        return max(able, key=lambda row: row["output_throughput_per_gpu"], default=None)

    @property
    def columns(self) -> list[str]:
        """All columns in order: those of any row."""
        found = dict.fromkeys(["key", "status", "reason", *self.names])
        for row in self.rows:
            found.update(dict.fromkeys(row))
        return [name for name in found if name not in _LAST] + [name for name in _LAST if name in found]

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.rows, columns=self.columns)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the rows: Parquet for a path ending in ``.parquet``, CSV otherwise.

        Raises:
            InputError: Parquet is wanted and pyarrow missing.
        """
        name = str(path)
        require_parquet(name, "sweep")
        if is_parquet(name):
            self._save_parquet(name)
            return
        with atomic_write(name, "w") as handle:
            handle.write(self.csv_text())

    def csv_text(self) -> str:
        """The text of a CSV file: one line a row, empty where a row has no such column."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = self.columns
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in self.rows)
        return text.getvalue()

    def _save_parquet(self, path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {}
        for name in self.columns:
            values = [row.get(name) for row in self.rows]
            kinds = {type(value) for value in values if value is not None}
            if len(kinds) > 1 and kinds != {int, float}:
                values = [None if value is None else _cell(value) for value in values]
            elif kinds == {int, float}:
                values = [None if value is None else float(value) for value in values]
            columns[name] = pa.array(values)
        with atomic_write(path) as handle:
            pq.write_table(pa.table(columns), handle, compression="zstd")

    def _titles(self) -> list[str]:
        """Names for the screen: of a key of the cluster config its last part, where that is enough."""
        short = [name.rpartition(".")[2] for name in self.names]
        return [one if short.count(one) == 1 else name for one, name in zip(short, self.names, strict=True)]

    def _repr_html_(self) -> str:
        """In a notebook."""
        from servesim.explore.notebook import page_html, table_html

        return page_html("\n".join(self._summary(None)), table_html(self._table()))

    def _table(self) -> Table:
        """The first rows."""
        slo = any("slo_met" in row for row in self.rows)
        table = Table([*self._titles(), *(title for _, title in _FIGURES), *(["SLO"] if slo else []), ""])
        table.kept = max(len(self.names), 1)
        for row in self.rows[:_SHOWN]:
            cells = [_cell(row.get(name)) for name in self.names]
            cells += [digits(row[key]) if key in row else "" for key, _ in _FIGURES]
            if slo:
                cells.append({True: "kept", False: "missed"}.get(row.get("slo_met", ""), ""))
            mark = "best per GPU" if row is self.best else "" if row["status"] == "ok" else row["status"]
            table.rows.append([*cells, mark])
        return table

    def text(self, file: str | None = None) -> str:
        """The first rows as a table, and what stands out; ``file``: where all of them are."""
        return "\n".join([self._table().plain(width=screen_width()), "", *self._summary(file)])

    def counted(self) -> str:
        """``28 configurations``."""
        return f"{len(self.rows):,} configuration{'' if len(self.rows) == 1 else 's'}"

    def _summary(self, file: str | None) -> list[str]:
        """How many rows there are, and why some have no figures."""
        lines = []
        more = len(self.rows) - _SHOWN
        if more > 0:
            lines.append(f"{more:,} more rows" + (f" in {file}" if file else ""))
        counted = f"{self.counted()}, {len(self.failed):,} without figures"
        if self.ruled_out:
            counted += f", {self.ruled_out:,} ruled out by constraints"
        lines.append(counted)
        lines += [wrapped(note, screen_width()) for note in self.notes]
        reasons = Counter(row["reason"] for row in self.failed)
        told = Counter(str(row["notes"]) for row in self.rows if row.get("notes"))
        for counts, what in ((reasons, "reasons"), (told, "notes")):
            for text, count in list(counts.items())[:5]:
                lines.append(wrapped(f"{count} x {text}", screen_width(), indent="    "))
            if len(counts) > 5:
                lines.append(f"and {len(counts) - 5} more {what}" + (f" in {file}" if file else ""))
        return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value)
