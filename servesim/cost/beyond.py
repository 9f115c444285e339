"""How measured times go on beyond their last point.

Far from its start, a kernel takes the same time for every further token, byte or sequence. That rate is
told by all points together, by a least-squares line in which each point counts with the square of its
place: the far ones decide, however finely they were measured. A line with this slope goes on from the last
point. The slope of the last interval alone is mostly noise where points are close, and products of matrices
are measured every 16 rows. ``benchmarks/held_out.py`` leaves the upper parts of measured tables out and
predicts them by both; other ways to weight the points do about as well.

Attention of a prompt chunk is no line: every token of the chunk also attends to those before it. It goes on
with a time for every token and one for every pair of tokens (:class:`ChunkGrowth`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_Number = TypeVar("_Number", float, "NDArray[np.float64]")


def slope_beyond(points: Ints | Floats, values: Floats) -> Floats:
    """What ``values``, shape (points, ...), grow by for each unit beyond the last of two points or more.

    ``points`` rise and are not below 0. Sums of products, so that all machines find the same floats.
    """
    place = points / float(points[-1])
    weight = place * place if len(points) > 2 else np.ones(2)
    away = place - (weight * place).sum() / weight.sum()
    share = weight * away / ((weight * away * away).sum() * float(points[-1]))
    slope: Floats = (share.reshape((-1,) + (1,) * (values.ndim - 1)) * values).sum(axis=0)
    return slope


def pairs(chunk: _Number, history: _Number) -> _Number:
    """Pairs of a token of the chunk and one that it attends to, of itself half."""
    return chunk * (history + chunk / 2.0)


class ChunkGrowth(NamedTuple):
    """What attention of one block takes more beyond the largest measured chunk, in µs."""

    token_us: float
    """For every token: queries read, outputs written."""
    pair_us: float
    """For every pair of tokens, see :func:`pairs`."""

    def us(self, chunk: int, history: int, last: int) -> float:
        """µs that a chunk takes longer than one of ``last`` tokens behind the same history."""
        return self.token_us * (chunk - last) + self.pair_us * (pairs(chunk, history) - pairs(last, history))


def chunk_growth(chunks: Ints, histories: Ints, us: Floats) -> ChunkGrowth:
    """The growth that a table of chunks alone shows, ``us`` of shape (chunks, histories).

    A least-squares fit of ``start + a · tokens + b · pairs + c · history`` to all chunks behind all
    histories, errors counted in per cent and each chunk with the square of its size. Long histories tell the
    time of a pair apart from that of a token. Neither is below 0. A single chunk goes on in proportion to its
    tokens.
    """
    if len(chunks) == 1:  # nothing tells how it grows
        return ChunkGrowth(float(us[0, 0]) / float(chunks[0]), 0.0)
    last, longest = float(chunks[-1]), float(histories[-1])
    chunk = np.repeat(chunks.astype(np.float64), len(histories))
    history = np.tile(histories.astype(np.float64), len(chunks))
    weight = chunk / last / us.ravel()
    units = {"start": 1.0, "token": last, "pair": pairs(last, longest), "history": longest}
    columns = {"start": np.ones(len(weight)), "token": chunk, "pair": pairs(chunk, history)}
    if longest:
        columns["history"] = history
    names = list(columns)
    if len(weight) < len(names):  # too few to tell a token from a pair
        names.remove("token")
    while True:
        fitted = [columns[name] / units[name] * weight for name in names]
        found = dict(zip(names, _least_squares(fitted, chunk / last), strict=True))
        below = [name for name in ("token", "pair") if found.get(name, 0.0) < 0.0]
        if not below:
            return ChunkGrowth(*(found.get(name, 0.0) / units[name] for name in ("token", "pair")))
        names.remove(min(below, key=lambda name: found[name]))


def _least_squares(columns: list[Floats], wanted: Floats) -> list[float]:
    """What the columns are multiplied by to come nearest to ``wanted``, by the normal equations."""
    size = len(columns)
    rows = [[float((a * b).sum()) for b in (*columns, wanted)] for a in columns]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if not rows[i][i]:
            continue
        for k in range(size):
            if k != i:
                share = rows[k][i] / rows[i][i]
                rows[k] = [x - share * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[-1] / row[i] if row[i] else 0.0 for i, row in enumerate(rows)]
