"""Rows for an attention shape that was not measured, from the two measured shapes nearest to it.

Time is close to linear in the query heads over the same KV heads (more rows for the same KV), and close to
linear in the KV heads at the same group size (more of everything). Both hold along the tables' own shapes;
where neither brackets the shape asked for, the line through the two nearest goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.profiler.silicon.tables import KernelTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.attention import AttentionShape

    Ids = NDArray[np.int64]

Heads = tuple[int, int]
"""Query heads and KV heads."""


def measured_heads(rows: KernelTable) -> list[Heads]:
    """Every (heads, KV heads) in the rows, sorted."""
    heads, kv_heads = (rows.integers(name).tolist() for name in ("num_heads", "num_key_value_heads"))
    return sorted(set(zip(heads, kv_heads, strict=True)))


def neighbours(known: list[Heads], heads: int, kv_heads: int) -> tuple[Heads, Heads, float] | None:
    """Two measured shapes and the weight of the second, or None when no line of shapes leads here.

    The weight is between 0 and 1 where the two bracket the shape, above 1 or below 0 beyond them.
    """
    same_kv = [shape for shape in known if shape[1] == kv_heads and shape[0] > kv_heads]
    same_group = [shape for shape in known if shape[0] * kv_heads == heads * shape[1]]
    for line, axis, value in ((same_kv, 0, heads), (same_group, 1, kv_heads)):
        if len(line) < 2 or value > 2 * line[-1][axis]:
            continue
        above = next((i for i, shape in enumerate(line) if shape[axis] >= value), len(line) - 1)
        low, high = line[max(above, 1) - 1], line[max(above, 1)]
        return low, high, (value - low[axis]) / (high[axis] - low[axis])
    return None


def rows_for(table: KernelTable, shape: AttentionShape, keys: tuple[str, str]) -> tuple[KernelTable, str]:
    """The rows of ``shape``, and how they were derived ("" when they were measured).

    ``keys`` are the columns that tell the rows of one shape apart. No rows: the shape can not be derived.
    """
    rows = shape.select(table)
    if len(rows):
        return rows, ""
    same = shape.select_any_heads(table)
    found = neighbours(measured_heads(same), shape.heads, shape.kv_heads) if len(same) else None
    if found is None:
        return rows, ""
    low, high, weight = found
    lower, upper = _of_heads(same, low), _of_heads(same, high)
    blended = on_the_line(lower, upper, weight, _ids(lower, keys), _ids(upper, keys))
    how = "between" if 0 <= weight <= 1 else "extrapolated from"
    return blended, f"{shape.heads}/{shape.kv_heads} heads {how} {low[0]}/{low[1]} and {high[0]}/{high[1]}"


def _of_heads(rows: KernelTable, heads: Heads) -> KernelTable:
    return rows.where(num_heads=heads[0], num_key_value_heads=heads[1])


def on_the_line(
    low: KernelTable, high: KernelTable, weight: float, low_ids: Ids, high_ids: Ids
) -> KernelTable:
    """Rows that both have, times on the line through both; never below half of the shorter time.

    ``low_ids`` and ``high_ids``: one number a row, which tells the rows of one shape apart.
    """
    _, at_low, at_high = np.intersect1d(low_ids, high_ids, return_indices=True)
    lower, upper = low.latency_us[at_low], high.latency_us[at_high]
    times = np.maximum(lower + weight * (upper - lower), 0.5 * np.minimum(lower, upper))
    columns = {name: values[at_low] for name, values in low.columns.items()}
    return KernelTable(low.name, low.version, times, columns)


def _ids(rows: KernelTable, keys: tuple[str, str]) -> NDArray[np.int64]:
    first, second = (rows.integers(name) for name in keys)
    return first * (1 << 32) + second
