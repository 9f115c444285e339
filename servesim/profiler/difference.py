"""How far two bundles are apart: every row of the one against the other's lookup at the same point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.bundle_csv import read_labelled, read_numbers
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.tables import Curve

    Floats = NDArray[np.float64]

ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")


@dataclass(frozen=True, slots=True)
class TableDifference:
    """One table, or one layer of it, of one degree: relative differences ``other / base - 1``."""

    tp: int
    table: str
    points: int
    """Rows of the base within the other's range."""
    outside: int
    """Rows beyond it, which were not compared."""
    median: float
    """Of the differences' sizes, as P95 is."""
    p95: float
    signed_median: float
    worst: float
    where: str
    base_us: float
    other_us: float


def differences(base: Bundle, other: Bundle, tp: int) -> list[TableDifference]:
    """Every table that both have at this degree, in the order of the files."""
    return [
        _difference(tp, name, keys, times, looked_up, inside)
        for name, keys, times, looked_up, inside in _comparisons(base, other, tp)
        if inside.any()
    ]


Comparison = tuple[str, list[str], "Floats", "Floats", "NDArray[np.bool_]"]
"""Name, what each point is called, base us, other us, whether the point is in the other's range."""


def _comparisons(base: Bundle, other: Bundle, tp: int) -> Iterator[Comparison]:
    theirs = other.tables(tp)
    base.tables(tp)  # checks the files whose rows are read below
    folder = base.folder / f"tp{tp}"
    yield from _by_layer(folder / "dense.csv", "tokens", theirs.dense)
    yield from _by_layer(folder / "per_sequence.csv", "sequences", theirs.per_sequence)
    yield from _attention(base.file(f"tp{tp}/attention.csv"), theirs)
    if (folder / "moe.csv").is_file() and theirs.moe is not None and theirs.moe.split == 1:
        rows = read_numbers(folder / "moe.csv", ("tokens", "activated_experts", "time_us"))
        surface = theirs.moe.surface
        names = [f"{tokens:g} tokens, {active:g} experts" for tokens, active in rows[:, :2]]
        inside = _within(rows[:, :2], surface.axes)
        yield "moe", names, rows[:, 2], surface.at(*rows[:, :2].T), inside
    yield from _collectives(folder / "comm.csv", theirs)


def _by_layer(path: Path, axis: str, curves: dict[str, Curve]) -> Iterator[Comparison]:
    texts, rows = read_labelled(path, ("layer",), (axis, "time_us"))
    names = np.array([name for (name,) in texts])
    for layer in dict.fromkeys(names.tolist()):
        if layer in curves:
            points, times = rows[names == layer].T
            at = [f"{point:g} {axis}" for point in points]
            inside = _within(points[:, None], (curves[layer].points,))
            yield f"{path.stem} {layer}", at, times, curves[layer].at(points), inside


def _attention(path: Path, theirs: RankTables) -> Iterator[Comparison]:
    rows = read_numbers(path, (*ATTENTION, "time_us"))
    chunk, history, decodes, kv, times = rows.T
    surface = theirs.attentions.get("attention", theirs.attention)
    looked_up = surface.at(chunk, decodes, history, kv)
    inside = _within(np.column_stack([chunk, decodes, history, kv]), surface.axes)
    names = [
        f"chunk {c:g}, history {h:g}, {n:g} x {length:g}" for c, h, n, length in zip(*rows.T[:4], strict=True)
    ]
    kinds = {
        "attention decode": chunk == 0,
        "attention prefill": (chunk > 0) & (decodes == 0),
        "attention mixed": (chunk > 0) & (decodes > 0),
    }
    for title, these in kinds.items():
        picked = np.flatnonzero(these)
        if len(picked):
            yield title, [names[i] for i in picked], times[picked], looked_up[picked], inside[picked]


def _collectives(path: Path, theirs: RankTables) -> Iterator[Comparison]:
    if not theirs.collectives or not path.is_file():
        return
    texts, rows = read_labelled(path, ("collective",), ("ranks", "bytes", "time_us"))
    keys = [(name, int(ranks)) for (name,), ranks in zip(texts, rows[:, 0], strict=True)]
    for key in dict.fromkeys(keys):
        if key in theirs.collectives:
            wanted = np.array([one == key for one in keys])
            sizes, times = rows[wanted, 1], rows[wanted, 2]
            curve = theirs.collectives[key]
            inside = _within(sizes[:, None], (curve.points,))
            title = f"comm {key[0]} of {key[1]}"
            yield title, [f"{size:g} bytes" for size in sizes], times, curve.at(sizes), inside


def _within(points: Floats, axes: tuple[NDArray[np.int64], ...]) -> NDArray[np.bool_]:
    """Which rows (points, axes) lie inside a table's axes, so that nothing is extrapolated or held."""
    first, last = (np.array([axis[end] for axis in axes], dtype=np.float64) for end in (0, -1))
    return np.asarray(((points >= first) & (points <= last)).all(axis=1))


def _difference(
    tp: int, table: str, names: list[str], times: Floats, looked_up: Floats, inside: NDArray[np.bool_]
) -> TableDifference:
    usable = inside & (times > 0)
    relative = looked_up[usable] / times[usable] - 1.0
    size = np.abs(relative)
    worst = int(size.argmax())
    row = int(np.flatnonzero(usable)[worst])
    return TableDifference(
        tp=tp,
        table=table,
        points=int(usable.sum()),
        outside=int((~usable).sum()),
        median=float(np.median(size)),
        p95=float(np.percentile(size, 95)),
        signed_median=float(np.median(relative)),
        worst=float(relative[worst]),
        where=names[row],
        base_us=float(times[row]),
        other_us=float(looked_up[row]),
    )
