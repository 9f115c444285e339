"""The numbers of finished requests, as columns or a few rows at a time.

The whole table takes 136 bytes a request, more than the records it is made from. So only those make it who
ask for :attr:`servesim.results.result.Result.requests`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.results.csv import NUMERIC_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.results.stats import TokenGaps
    from servesim.workload.request import Workload

REQUEST_DTYPE = np.dtype([(name.replace(" ", "_"), np.int64) for name in NUMERIC_COLUMNS])
ROWS_AT_ONCE = 1 << 16

_OF_RECORD = {
    "instance_id": "instance",
    "request_id": "request",
    "arrival": "arrival_ns",
    "end_time": "end_ns",
    "queued": "queued_ns",
    "npu_hit": "npu_hit",
    "storage_hit": "storage_hit",
    "preemptions": "preemptions",
}
"""Field -> what a record calls it."""
_ASKED = {"input": "input_tokens", "sub_request": "sub_request"}
"""Field -> what the request in the workload calls it."""


class RequestTable:
    """Fields of :data:`REQUEST_DTYPE` of every finished request, ordered by request id: ``table["TTFT"]``."""

    __slots__ = ("_asked", "_gaps", "_workload")

    def __init__(self, gaps: TokenGaps, workload: Workload) -> None:
        self._gaps = gaps
        self._workload = workload
        self._asked: dict[str, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._gaps.records)

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """One field of all of them, shape (requests,)."""
        return self._field(name, 0, len(self))

    def rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Rows ``start`` to ``stop - 1``, all by default, of dtype :data:`REQUEST_DTYPE`."""
        end = len(self) if stop is None else min(stop, len(self))
        rows = np.empty(max(end - start, 0), dtype=REQUEST_DTYPE)
        for name in REQUEST_DTYPE.names or ():
            rows[name] = self._field(name, start, end)
        return rows

    def parts(self) -> Iterator[NDArray[np.void]]:
        """All rows, :data:`ROWS_AT_ONCE` at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.rows(start, start + ROWS_AT_ONCE)

    def _field(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        def of_record(column: str) -> NDArray[np.int64]:
            return self._gaps.records.column(column, start, stop)

        if name in _OF_RECORD:
            return of_record(_OF_RECORD[name])
        if name in _ASKED:
            if name not in self._asked:
                self._asked[name] = self._workload.column(_ASKED[name])
            return self._asked[name][of_record("request")]
        match name:
            case "decode_instance":
                decodes = of_record("decode_instance")
                return np.where(decodes < 0, of_record("instance"), decodes)
            case "queuing_delay":
                return of_record("scheduled_ns") - of_record("front_end_ns") - of_record("arrival_ns")
            case "latency":
                return of_record("end_ns") - of_record("arrival_ns")
            case "TTFT":
                return of_record("first_token_ns") - of_record("arrival_ns")
            case "output":
                return self._gaps.tokens(start, stop)
            case "TPOT":
                tokens = self._gaps.tokens(start, stop)
                span = of_record("end_ns") - of_record("first_token_ns")
                return np.where(tokens > 1, span // np.maximum(tokens - 1, 1), 0)
            case "prefix_hit":
                return of_record("npu_hit") + of_record("storage_hit")
        raise KeyError(name)
