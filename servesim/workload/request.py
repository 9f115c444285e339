"""A request and a workload, as plain data. Times are integer nanoseconds on the simulation clock."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, cast

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from servesim.workload.packed import PackedRequests


@dataclass(slots=True)
class Request:
    """One prompt and the number of tokens it generates.

    ``arrival_ns`` is the time at which the request enters the system. For a follow-up of a session
    (``predecessor`` >= 0) it is unknown beforehand: the request is released ``tool_ns`` after its predecessor
    ended.
    """

    index: int
    """Position in the workload: the request id of every output file."""
    input_tokens: int
    output_tokens: int
    arrival_ns: int
    input_ids: NDArray[np.int64] | None = None
    """Token ids of the prompt, shape (input_tokens,); None: the prompt shares no prefix with any other."""
    output_ids: NDArray[np.int64] | None = None
    session_id: str | None = None
    sub_request: int = 0
    predecessor: int = -1
    """Index of the request whose end releases this one, -1 for none."""
    tool_ns: int = 0
    """Time between the predecessor's end and this request's arrival."""
    model: str | None = None
    """Model the request asks for; None: any."""
    hashes: NDArray[np.int64] | None = None
    """In place of token ids: one id for every `tokens_per_hash` tokens from the start, shape (hashes,)."""
    tokens_per_hash: int = 0
    hashed_tokens: int = 0
    """Leading tokens of prompt and answer that the hashes stand for."""
    max_tokens: int = 0
    """Most tokens the client lets it generate; 0: those it generates. With more, its answer ends on its own
    account, by a stop token that no server can foresee."""
    cache_salt: str | None = None
    """Prompts share blocks only with those of the same salt."""
    lora: str | None = None
    """LoRA adapter that it is served with; None: the model alone."""
    priority: int = 0
    """Smaller numbers are served first, where the scheduling policy goes by priority."""

    @property
    def has_ids(self) -> bool:
        """Whether it is known what the prompt shares with others, from token ids or from hashes."""
        return self.input_ids is not None or self.hashes is not None


@dataclass(slots=True)
class Workload:
    """The requests of one run, ordered by index."""

    requests: list[Request] = field(default_factory=list)
    source: str = ""
    """File or generator the requests came from, for messages and summaries."""
    skipped: int = 0
    """Entries left out: bad ones by lenient loading, conversations without an answer."""
    drawn_arrivals: bool = False
    """Whether the arrivals are random numbers of a seed given while loading."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @property
    def lookup(self) -> Callable[[int], Request]:
        """Gives the request of an index."""
        return self.requests.__getitem__

    def pack(self) -> None:
        """Keep the requests in few bytes from now on, where most say no more than lengths and an arrival; see
        :class:`~servesim.workload.packed.PackedRequests`. For those who change none of them any more."""
        from servesim.workload.packed import PackedRequests

        packed = PackedRequests(self.requests)
        if 2 * len(packed.special) < len(packed):
            self.requests = cast("list[Request]", packed)  # reads as a list does

    @property
    def special(self) -> Sequence[Request]:
        """Requests that may say more than their lengths and an arrival: all others say no more."""
        return getattr(self.requests, "special", self.requests)

    def column(self, name: str) -> NDArray[np.int64]:
        """One number of every request, shape (requests,)."""
        import numpy as np

        if not isinstance(self.requests, list):
            packed: PackedRequests = self.requests
            return packed.column(name)
        values = (getattr(request, name) for request in self.requests)
        return np.fromiter(values, np.int64, len(self.requests))

    def first(self, entries: int) -> Workload:
        """The first ``entries`` entries, a session being one; the requests are the same objects."""
        heads = 0
        for place, request in enumerate(self.requests):
            heads += request.predecessor < 0
            if heads > entries:  # the requests of a session follow its head
                return replace(self, requests=self.requests[:place])
        return self
