"""A column of whole numbers that only grows: its last entries as they are, those before in few bytes.

A long run has tens of millions of steps. Their counts mostly fit 8 or 16 bits, and their times lie near each
other, but which of them do is known only once they are there. So entries are packed :data:`PACKED` at a time,
when at least as many have come behind them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from struct import pack
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PACKED: Final = 1 << 14
"""Entries that are packed together."""
_TOGETHER: Final = 1 << 8
"""Entries that are looked at together before."""
_NEAR: Final = 16
"""Times that are kept as their distance from the first of them."""


class _Part:
    """:data:`PACKED` entries: ``values``, each with ``bases[entry // _NEAR]`` added where there are bases."""

    __slots__ = ("bases", "values")

    def __init__(self, entries: NDArray[np.int64]) -> None:
        self.bases: NDArray[np.int64] | None = None
        self.values: NDArray[Any] = entries
        if entries.min() == entries.max():
            self.values = np.broadcast_to(entries[:1].copy(), len(entries))
        elif (kind := _narrow(entries)) is not None:
            self.values = entries.astype(kind)
        else:
            bases = entries[::_NEAR].copy()
            offsets = entries - np.repeat(bases, _NEAR)
            if (kind := _narrow(offsets)) is not None:
                self.bases, self.values = bases, offsets.astype(kind)

    def entry(self, place: int) -> int:
        value = int(self.values[place])
        return value if self.bases is None else value + int(self.bases[place // _NEAR])

    def entries(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Entries ``start`` to ``stop - 1``, a copy."""
        wide = self.values[start:stop].astype(np.int64)
        if self.bases is not None:
            wide += self.bases[np.arange(start, start + len(wide)) // _NEAR]
        return wide

    def most(self) -> int:
        return int(self.values.max()) if self.bases is None else int(self.entries().max())

    @property
    def num_bytes(self) -> int:
        held = 8 if not self.values.strides[0] else self.values.nbytes
        return held + (0 if self.bases is None else self.bases.nbytes)


def _narrow(entries: NDArray[np.int64]) -> type[np.integer[Any]] | None:
    """The smallest type of at most 32 bits that holds all of them; None: no such type does."""
    low, high = int(entries.min()), int(entries.max())
    for kind in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    return None


class Column(Sequence[int]):
    """Whole numbers, of 64 bits for type code ``q`` and 32 for ``i``; see :mod:`array`."""

    __slots__ = ("_first", "_new", "_parts", "_tail")

    def __init__(self, kind: str, entries: Iterable[int] = ()) -> None:
        self._parts: list[_Part] = []
        self._first = 0
        """Entries that are packed."""
        self._tail: array[int] = array(kind)
        """Those behind them."""
        self._new: list[int] = []
        """The latest, which go there together: one by one, each costs as much as a step's arithmetic."""
        self.extend(entries)

    def append(self, value: int) -> None:
        """Add an entry."""
        self._new.append(value)
        if len(self._new) >= _TOGETHER:
            self._settle()

    def extend(self, values: Iterable[int] | NDArray[np.int64]) -> None:
        """Add entries."""
        if isinstance(values, np.ndarray):
            self._settle().frombytes(values.astype(self._tail.typecode).tobytes())
            self._pack()
            return
        self._new += values
        if len(self._new) >= _TOGETHER:
            self._settle()

    def _settle(self) -> array[int]:
        """Entries that are not packed, all of them, as they are kept."""
        new = self._new
        if new:
            self._tail.frombytes(pack(f"{len(new)}{self._tail.typecode}", *new))
            new.clear()
            self._pack()
        return self._tail

    def _pack(self) -> None:
        """Pack what has been there for long."""
        tail = self._tail
        while len(tail) >= 2 * PACKED:
            self._parts.append(_Part(np.array(tail[:PACKED], dtype=np.int64)))
            del tail[:PACKED]
            self._first += PACKED

    @property
    def packed(self) -> int:
        """How many of them, the first, are packed."""
        return self._first

    def __len__(self) -> int:
        return self._first + len(self._tail) + len(self._new)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                return [self[at] for at in range(start, stop, stride)]
            tail = self._settle()
            if start >= self._first:
                return tail[start - self._first : max(stop - self._first, 0)].tolist()
            found: list[int] = self.between(start, stop).tolist()
            return found
        if index < 0:
            index += len(self)
        place = index - self._first
        if place >= len(self._tail):
            return self._new[place - len(self._tail)]
        if place >= 0:
            return self._tail[place]
        if index < 0:
            raise IndexError(f"entry {index - len(self)} of {len(self)}")
        return self._parts[index // PACKED].entry(index % PACKED)

    def __iter__(self) -> Iterator[int]:
        tail = self._settle()
        for part in self._parts:
            yield from part.entries().tolist()
        yield from tail

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Entries ``start`` to ``stop - 1``, as far as there are any; a copy."""
        tail, stop = self._settle(), min(stop, len(self))
        found = np.empty(max(stop - start, 0), dtype=np.int64)
        at = start
        while at < min(stop, self._first):
            number, place = divmod(at, PACKED)
            taken = min(PACKED - place, stop - at)
            found[at - start : at - start + taken] = self._parts[number].entries(place, place + taken)
            at += taken
        if at < stop:
            found[at - start :] = tail[at - self._first : stop - self._first]
        return found

    def array(self) -> NDArray[np.int64]:
        """All entries, a copy, shape (entries,)."""
        return self.between(0, len(self))

    def most(self) -> int:
        """The largest entry, 0 at least."""
        return max(0, max(self._settle(), default=0), *(part.most() for part in self._parts))

    @property
    def num_bytes(self) -> int:
        """What its entries take."""
        return self._tail.itemsize * len(self._settle()) + sum(part.num_bytes for part in self._parts)
