"""Requests in few bytes, for runs of very many."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from servesim.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

_COLUMNS = {"input_tokens": "_inputs", "output_tokens": "_outputs", "arrival_ns": "_arrivals"}
_USUAL = {"predecessor": -1}
"""What a request that says nothing more has there; 0 everywhere else."""


class PackedRequests(Sequence[Request]):
    """The requests of a workload: 16 bytes each, if they say no more than their lengths and an arrival.

    Who asks for one of those gets one that is made for them: what they change in it stays theirs. Requests
    that say more are kept as they are.
    """

    __slots__ = ("_arrivals", "_inputs", "_outputs", "_special")

    def __init__(self, requests: Iterable[Request]) -> None:
        self._inputs, self._outputs, self._arrivals = array("i"), array("i"), array("q")
        self._special: dict[int, Request] = {}
        for place, request in enumerate(requests):
            self._inputs.append(request.input_tokens)
            self._outputs.append(request.output_tokens)
            self._arrivals.append(request.arrival_ns)
            if request.index != place or _says_more(request):
                self._special[place] = request

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, place: int) -> Request: ...
    @overload
    def __getitem__(self, place: slice) -> list[Request]: ...
    def __getitem__(self, place: int | slice) -> Request | list[Request]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = place if place >= 0 else place + len(self)
        special = self._special.get(at) if self._special else None
        return special or Request(at, self._inputs[at], self._outputs[at], self._arrivals[at])

    def __iter__(self) -> Iterator[Request]:
        return map(self.__getitem__, range(len(self)))

    @property
    def special(self) -> Sequence[Request]:
        """Those that say more, in their order."""
        return list(self._special.values())

    def column(self, name: str) -> NDArray[np.int64]:
        """One number of every request, shape (requests,)."""
        if name in _COLUMNS:
            return np.array(getattr(self, _COLUMNS[name]), dtype=np.int64)
        if name == "index":
            column = np.arange(len(self), dtype=np.int64)
        else:
            column = np.full(len(self), _USUAL.get(name, 0), dtype=np.int64)
        for place, request in self._special.items():
            column[place] = getattr(request, name)
        return column


def _says_more(request: Request) -> bool:
    """Whether a request has more than lengths and an arrival."""
    return (
        request.input_ids is not None
        or request.output_ids is not None
        or request.session_id is not None
        or request.predecessor != -1
        or request.model is not None
        or request.hashes is not None
        or request.cache_salt is not None
        or request.lora is not None
        or bool(
            request.sub_request
            or request.tool_ns
            or request.tokens_per_hash
            or request.hashed_tokens
            or request.max_tokens
            or request.priority
        )
    )
