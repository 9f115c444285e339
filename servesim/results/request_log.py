"""What happened to each request, and how that is kept: packed, in a tenth of the memory of as many objects.

A few numbers and one run of tokens are kept for every request (:class:`~servesim.results.columns.Column`),
everything else only where there is something.
Whoever asks for a record gets one that is made for them: what they change in it stays theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from servesim.results.columns import PACKED, Column
from servesim.results.request_record import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

_EACH = {
    "request": "q",
    "arrival_ns": "q",
    "queued_ns": "q",
    "scheduled_ns": "q",
    "first_token_ns": "q",
    "end_ns": "q",
    "front_end_ns": "q",
    "first": "q",
    "last": "q",
    "instance": "i",
    "decode_instance": "i",
    "track": "i",
}
"""Numbers of every request and their types; ``track``, ``first`` and ``last`` of its first run of tokens."""
_FEW = {
    "extra_tokens": 0,
    "npu_hit": 0,
    "storage_hit": 0,
    "preemptions": 0,
    "recomputed_tokens": 0,
    "handed_over_ns": -1,
    "cut_tokens": 0,
    "load_began_ns": -1,
    "load_ended_ns": -1,
}
"""Numbers that mostly are what they say here, and are kept where not."""
_USUAL = tuple(_FEW.values())
_few_of = attrgetter(*_FEW)
_NO_TRACK = -1
_ROWS = 512
"""Rows that go to their columns together."""


class RequestLog(Sequence[RequestRecord]):
    """Records in the order in which they were added, or by request once sorted."""

    __slots__ = ("_each", "_few", "_more_runs", "_rest", "_rows")

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        self._each = {name: Column(kind) for name, kind in _EACH.items()}
        self._rows: list[tuple[int, ...]] = []
        """The latest rows of these columns, which get them together."""
        self._few: dict[str, dict[int, int]] = {name: {} for name in _FEW}
        self._more_runs: dict[int, list[tuple[int, int, int]]] = {}
        """Row → runs of tokens after the first."""
        self._rest: dict[int, tuple[Any, Any]] = {}
        """Row → ``prefill_step`` and ``away``."""
        for record in records:
            self.append(record)

    def append(self, record: RequestRecord) -> None:
        """Keep a record as it is now."""
        row, runs = len(self), record.token_steps
        track, first, last = runs[0] if runs else (_NO_TRACK, 0, 0)
        if len(runs) > 1:
            self._more_runs[row] = runs[1:]
        self._rows.append(
            (
                record.request,
                record.arrival_ns,
                record.queued_ns,
                record.scheduled_ns,
                record.first_token_ns,
                record.end_ns,
                record.front_end_ns,
                first,
                last,
                record.instance,
                record.decode_instance,
                track,
            )
        )
        if len(self._rows) >= _ROWS:
            self._columns()
        few = _few_of(record)
        if few != _USUAL:
            for (name, usual), value in zip(_FEW.items(), few, strict=True):
                if value != usual:
                    self._few[name][row] = value
        if record.prefill_step is not None or record.away is not None:
            self._rest[row] = record.prefill_step, record.away

    def _columns(self) -> dict[str, Column]:
        """The numbers of every request."""
        if self._rows:
            for column, values in zip(self._each.values(), zip(*self._rows, strict=True), strict=True):
                column.extend(values)
            self._rows.clear()
        return self._each

    def clear(self) -> None:
        """Forget all of them."""
        self.__init__()  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._each["request"]) + len(self._rows)

    @overload
    def __getitem__(self, row: int) -> RequestRecord: ...
    @overload
    def __getitem__(self, row: slice) -> list[RequestRecord]: ...
    def __getitem__(self, row: int | slice) -> RequestRecord | list[RequestRecord]:
        if isinstance(row, slice):
            start, stop, stride = row.indices(len(self))
            if stride != 1:
                return [self[at] for at in range(start, stop, stride)]
            return list(self._between(start, stop))
        at = row if row >= 0 else row + len(self)
        if not 0 <= at < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        return self._record(at, *(column[at] for column in self._columns().values()))

    def __iter__(self) -> Iterator[RequestRecord]:
        return self._between(0, len(self))

    def _between(self, start: int, stop: int) -> Iterator[RequestRecord]:
        for at in range(start, stop, PACKED):
            end = min(at + PACKED, stop)
            columns = [column.between(at, end).tolist() for column in self._columns().values()]
            for row, values in enumerate(zip(*columns, strict=True), at):
                yield self._record(row, *values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))

    def _record(
        self,
        row: int,
        request: int,
        arrival_ns: int,
        queued_ns: int,
        scheduled_ns: int,
        first_token_ns: int,
        end_ns: int,
        front_end_ns: int,
        first: int,
        last: int,
        instance: int,
        decode_instance: int,
        track: int,
    ) -> RequestRecord:
        record = RequestRecord(
            request,
            instance,
            arrival_ns,
            queued_ns,
            scheduled_ns,
            first_token_ns,
            end_ns,
            decode_instance=decode_instance,
            front_end_ns=front_end_ns,
        )
        if track != _NO_TRACK:
            record.token_steps.append((track, first, last))
            record.token_steps += self._more_runs.get(row, ())
        for name, kept in self._few.items():
            if row in kept:
                setattr(record, name, kept[row])
        if row in self._rest:
            record.prefill_step, away = self._rest[row]
            record.away = away and [*away]
        return record

    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """One number of records ``start`` to ``stop - 1``, of all by default; a copy."""
        end = len(self) if stop is None else min(stop, len(self))
        if name in _FEW:
            kept, usual = self._few[name], _FEW[name]
            if kept and end - start < len(self):
                return np.array([kept.get(row, usual) for row in range(start, end)], dtype=np.int64)
            column = np.full(end - start, usual, dtype=np.int64)
            if kept:
                rows = np.fromiter(kept, np.int64, len(kept))
                column[rows] = np.fromiter(kept.values(), np.int64, len(kept))
            return column
        return self._columns()[name].between(start, end)

    def total(self, name: str) -> int:
        """The exact sum of a number that is mostly 0."""
        return sum(self._few[name].values())

    def runs(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(track, first, last) of the first run of tokens of records ``start`` to ``stop - 1``, of all by
        default; a track below 0 where there is none."""
        end = len(self) if stop is None else stop
        columns = self._columns()
        track, first, last = (columns[name].between(start, end) for name in ("track", "first", "last"))
        return track, first, last

    @property
    def later_runs(self) -> dict[int, list[tuple[int, int, int]]]:
        """Row → the runs of tokens after its first, where there are any."""
        return self._more_runs

    def in_order(self) -> RequestLog:
        """Sorted by request: itself if it is."""
        requests = self._columns()["request"].array()
        if (requests[1:] >= requests[:-1]).all():
            return self
        rows = np.argsort(requests, kind="stable")
        place = np.empty_like(rows)
        place[rows] = np.arange(len(rows))
        ordered = RequestLog()
        for name, column in self._each.items():
            ordered._each[name].extend(column.array()[rows])
        for name, kept in self._few.items():
            ordered._few[name] = {int(place[row]): value for row, value in kept.items()}
        ordered._more_runs = dict(sorted((int(place[row]), runs) for row, runs in self._more_runs.items()))
        ordered._rest = {int(place[row]): rest for row, rest in self._rest.items()}
        return ordered
