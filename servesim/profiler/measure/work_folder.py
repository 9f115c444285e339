"""The hidden folder beside a bundle where an unfinished sweep lies, and what may go into it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from servesim.cost.finding import degrees_in, variant_dtypes
from servesim.errors import InputError, RunError
from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.shots import CATEGORIES
from servesim.results.atomic import atomic_write
from servesim.slotted import dataclass
from servesim.specs.dtypes import resolve_kv_dtype
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from servesim.profiler.meter import ProfileJob

CONDITIONS = "conditions.yaml"
"""Beside the tables of an unfinished sweep: what they were measured with."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How to go about a sweep."""

    force: bool = False
    """Measure again what is there."""
    only: tuple[str, ...] = CATEGORIES
    budget_s: float | None = None
    """Coarsen the grid until the sweep should fit; None: the grid as it is."""


_MAY_CHANGE = ("engine_effective",)
"""Conditions that say how far a sweep reaches, not how a row came about."""


def _refuse_other_conditions(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name not in _MAY_CHANGE and before.get(name) != value:
            raise InputError(
                f"{path}: {name}: was {before.get(name)!r} when the rows there were measured and is "
                f"{value!r} now; "
                "measure everything again with --force, or give the bundle another --hardware label"
            )


def same_grid(path: Path, begun: dict[str, Any], grid: SweepGrid, options: MeasureOptions) -> SweepGrid:
    """The grid of the unfinished sweep: half of one grid and half of another would not make a table."""
    before = SweepGrid(**begun)
    if options.budget_s is None and before != grid:
        differing = [f"{name} {value}" for name, value in begun.items() if value != getattr(grid, name)]
        raise InputError(
            f"{path}: grid: an unfinished sweep has {', '.join(differing)}; give it the same limits and "
            "factors to "
            "finish it, or start anew with --force"
        )
    return before


def prepare(
    work: Path, folder: Path, conditions: dict[str, Any], job: ProfileJob, options: MeasureOptions
) -> dict[str, Any]:
    """Set up the work folder from an unfinished sweep, else from the finished bundle, else empty.

    Returns what the unfinished sweep left about itself; empty where there is none.

    Raises:
        InputError: rows that are to stay were measured under other conditions.
        RunError: the folder cannot be written.
    """
    begun: dict[str, Any] = {}
    anew = options.force and set(options.only) == set(CATEGORIES)
    try:
        if anew:
            shutil.rmtree(work, ignore_errors=True)
        if (work / CONDITIONS).is_file():
            begun = read_yaml_object(work / CONDITIONS)
            _refuse_other_conditions(work / CONDITIONS, begun, conditions)
        else:
            shutil.rmtree(work, ignore_errors=True)
            if (folder / "meta.yaml").is_file() and not (
                anew and set(degrees_in(folder)) <= set(job.tp_degrees)
            ):
                before = read_yaml_object(folder / "meta.yaml")
                _refuse_other_conditions(folder / "meta.yaml", before, conditions)
                shutil.copytree(folder, work)
                (work / "meta.yaml").unlink()
        if options.force:
            for tp in job.tp_degrees:
                for category in options.only:
                    (work / f"tp{tp}" / f"{category}.csv").unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{work}: cannot be written: {error.strerror or error}") from error
    return begun


def take_over(
    work: Path, folder: Path, conditions: dict[str, Any], job: ProfileJob, only: Sequence[str]
) -> dict[str, str]:
    """Copy what another variant has in common: attention depends on the KV format, the rest on the weights'.

    Returns table -> variant it was copied from. Nothing is taken that has been measured here already.
    """
    taken = {}
    for other in sorted(folder.parent.glob("*/meta.yaml")):
        variant = other.parent.name
        if variant == folder.name:
            continue
        before = read_yaml_object(other)
        if any(
            before.get(key) != conditions[key] for key in conditions if key not in (*_MAY_CHANGE, "variant")
        ):
            continue
        dtype, kv_cache_dtype = variant_dtypes(variant)
        same_kv = resolve_kv_dtype(dtype, kv_cache_dtype) == job.kv_dtype
        tables = [*(("attention", "skew") if same_kv else ())]
        tables += [*(("dense", "per_sequence", "moe") if dtype == job.dtype else ())]
        for name in tables:
            pairs = [
                (root / f"tp{tp}" / f"{name}.csv" for root in (other.parent, work)) for tp in job.tp_degrees
            ]
            copies = [(source, target) for source, target in pairs]
            if name in only and all(s.is_file() and not t.exists() for s, t in copies):
                for source, target in copies:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                taken[name] = variant
    return taken


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``, keys in the order given."""
    import yaml

    with atomic_write(path, "w") as handle:
        yaml.safe_dump(content, handle, sort_keys=False, allow_unicode=True, width=118)


Key = tuple[str, ...]
Row = tuple[Any, ...]


def text(value: object) -> str:
    """A cell: floats with six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class TableFile:
    """A CSV file whose first columns name a shot and whose last ``values`` columns hold what was measured."""

    def __init__(self, path: Path, header: tuple[str, ...], values: int = 1) -> None:
        """Opens the file, and creates it (with its folder) where there is none.

        Raises:
            InputError: a whole line of the file is no row of this table.
        """
        self.path = path
        self.header = header
        self._keys = len(header) - values
        self.rows: dict[Key, tuple[str, ...]] = {}
        """What has been measured: key cells -> all cells."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
            self._handle = path.open("ab")
            if self._handle.tell() == 0:
                self._write(",".join(header) + "\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error

    def key(self, row: Row) -> Key:
        """The cells that name the shot of a row (or of its key columns alone)."""
        return tuple(text(value) for value in row[: self._keys])

    def __contains__(self, row: Row) -> bool:
        return self.key(row) in self.rows

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; on return they are on the disk."""
        lines = []
        for row in rows:
            cells = tuple(text(value) for value in row)
            self.rows[cells[: self._keys]] = cells
            lines.append(",".join(cells) + "\n")
        try:
            self._write("".join(lines))
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        self._handle.close()

    def _write(self, lines: str) -> None:
        self._handle.write(lines.encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the writer was stopped within a line
            with self.path.open("rb+") as handle:
                handle.truncate(len(whole))
        lines = whole.decode(errors="replace").splitlines()
        if lines and lines[0] != ",".join(self.header):
            raise self._damaged(1, lines[0])
        for number, line in enumerate(lines[1:], 2):
            cells = tuple(line.split(","))
            if len(cells) != len(self.header) or not _are_numbers(cells[self._keys :]):
                raise self._damaged(number, line)
            self.rows[cells[: self._keys]] = cells

    def _damaged(self, line: int, found: str) -> InputError:
        return InputError(
            f"{self.path}: line {line}: `{found[:80]}` is no row of {','.join(self.header)}; "
            "remove the line, or measure everything again with --force"
        )


def _are_numbers(cells: tuple[str, ...]) -> bool:
    try:
        return all(float(cell) == float(cell) for cell in cells)
    except ValueError:
        return False
