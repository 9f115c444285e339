"""Looking into a bundle: its tables at telling points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.bundle import Bundle
from servesim.errors import MissingFileError
from servesim.results.table import Table
from servesim.specs import paths
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from servesim.cost.bundle import RankTables
    from servesim.cost.tables import Curve

_COLUMNS = 9
"""Points shown of an axis."""


def open_bundle(name: str) -> Bundle:
    """The bundle at a folder, or of ``<hardware>/<org>/<model>/<variant>`` wherever bundles are found.

    Raises:
        MissingFileError: there is none.
    """
    folder = Path(name).expanduser()
    if not (folder / "meta.yaml").is_file():
        try:
            folder = paths.find(f"profiler/perf/{name}", "bundle")
        except MissingFileError:
            raise MissingFileError(
                f"{name}: no such bundle; give a folder that holds meta.yaml, or "
                "<hardware>/<org>/<model>/<variant> of one below profiler/perf"
            ) from None
    parts = folder.resolve().parts
    hardware, model, variant = (
        (parts[-4], "/".join(parts[-3:-1]), parts[-1]) if len(parts) > 4 else ("", "", "")
    )
    return Bundle(folder, hardware, model, variant, read_yaml_object(folder / "meta.yaml"))


def overview(tables: RankTables) -> dict[str, Table]:
    """Title -> times in us at some points of each table of one degree."""
    found = {
        "dense, us over tokens": _curves(tables.dense),
        "per_sequence, us over sequences": _curves(tables.per_sequence),
        **_attention(tables),
    }
    if tables.moe is not None:
        tokens, experts = tables.moe.surface.axes
        found[f"{tables.moe.source}, us: tokens down, activated experts across"] = _grid(
            some(tokens),
            some(experts),
            lambda at: tables.moe.surface.at(*at),  # type: ignore[union-attr]
        )
    if tables.collectives:
        curves = {f"{name} of {ranks}": curve for (name, ranks), curve in tables.collectives.items()}
        found["comm, us over payload bytes"] = _curves(curves)
    return found


def some(points: NDArray[np.int64], most: int = _COLUMNS) -> NDArray[np.int64]:
    """At most so many of the points, evenly spread over their order, the first and the last among them."""
    if len(points) <= most:
        return points
    places = np.unique(np.round(np.linspace(0, len(points) - 1, most)).astype(int))
    return np.asarray(points[places])


def _curves(curves: Mapping[str, Curve]) -> Table:
    longest = max(curves.values(), key=lambda curve: len(curve.points)).points
    doubling = 2 ** np.arange(0, 40)
    shown = some(np.array([p for p in longest if p in doubling or p == longest[-1]], dtype=np.int64), 12)
    table = Table(["layer", *map(str, shown)])
    table.rows += [[name, *map(_us, curve.at(shown))] for name, curve in curves.items()]
    return table


def _attention(tables: RankTables) -> dict[str, Table]:
    surface = tables.attention
    chunks, decodes, histories, lengths = surface.axes
    chunks, decodes, lengths = (axis[axis > 0] for axis in (chunks, decodes, lengths))
    found = {
        "attention, decodes alone, us: sequences down, KV tokens across": _grid(
            some(decodes), some(lengths), lambda at: surface.at(0 * at[0], at[0], 0 * at[0], at[1])
        ),
        "attention, a chunk alone, us: tokens down, history across": _grid(
            some(chunks), some(histories), lambda at: surface.at(at[0], 0 * at[0], at[1], 0 * at[0])
        ),
    }
    if len(decodes) and len(lengths):
        middle = int(lengths[len(lengths) // 2])
        found[f"attention, a chunk beside decodes of {middle} tokens, us: chunk down, sequences across"] = (
            _grid(
                some(chunks),
                some(decodes),
                lambda at: surface.at(at[0], at[1], 0 * at[0], 0 * at[0] + middle),
            )
        )
    return found


def _grid(down: NDArray[np.int64], across: NDArray[np.int64], us: Callable[[list[Any]], Any]) -> Table:
    table = Table(["", *map(str, across)])
    for value in down:
        at = [np.full(len(across), value), across]
        table.rows.append([str(value), *map(_us, us(at))])
    return table


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
