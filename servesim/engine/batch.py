"""One step's work, reduced to the integers that decide how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.engine.decode_set import by_order
from servesim.engine.request_state import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from servesim.engine.decode_set import DecodeSet
    from servesim.engine.request_state import RequestState


class Outputs:
    """With speculative decoding: whom a batch gives tokens, and whom it serves."""

    __slots__ = ("sampled", "served", "serves_prefill")

    def __init__(self) -> None:
        self.sampled: list[tuple[RequestState, int, bool]] = []
        """(request, its drafts, whether they are padding) of everything that the batch gives output for."""
        self.served = False
        """Whether a request takes part that ran before."""
        self.serves_prefill = False
        """Whether one takes part that ran before without its prompt being computed."""

    def serve(self, *, prefill: bool) -> None:
        """A request takes part that ran before; ``prefill``: its prompt is being computed."""
        self.served = True
        self.serves_prefill |= prefill


class Batch:
    """What one step computes and which requests it finishes. KV lengths are counted before the step, in
    tokens."""

    __slots__ = (
        "after",
        "awaited_by",
        "chunks",
        "draft_tokens",
        "end_ns",
        "entries",
        "finishing",
        "hit_tokens",
        "kv_lengths",
        "kv_max",
        "kv_min",
        "kv_sum",
        "lookup_tokens",
        "num_decodes",
        "outputs",
        "preempted",
        "recalled_tokens",
        "recalls",
        "recomputed_tokens",
        "step",
        "track_step",
        "travelling",
    )

    def __init__(self, step: int, end_ns: int = 0, kv_lengths: list[int] | None = None) -> None:
        self.step: int = step
        """Index of the step in its instance's step log."""
        self.end_ns: int = end_ns
        self.travelling: DecodeSet | None = None
        """In a pipeline: the decoding requests that travel with this batch."""
        self.track_step: int = 0
        """Index of this batch on their track."""
        self.after: Batch | None = None
        """In a pipeline: the batch in flight whose tokens the first stage has to wait for."""
        self.awaited_by: Sequence[RequestState] = ()
        """Requests preempted while this batch, with a token of theirs, was in flight."""
        self.chunks: Sequence[tuple[int, int]] = ()
        """(tokens, history) of every request with more than one scheduled token."""
        self.num_decodes: int = 0
        """Requests that compute one token, and perhaps drafts behind it."""
        self.draft_tokens: int = 0
        """Those drafts, of all requests together."""
        self.outputs: Outputs | None = None
        """With speculative decoding: what a later look at the batch needs."""
        self.kv_sum: int = 0
        self.kv_min: int = 0
        self.kv_max: int = 0
        self.kv_lengths: list[int] | None = kv_lengths
        """KV length of every decode, kept only where each matters on its own."""
        self.finishing: Sequence[RequestState] = ()
        """Requests whose last token this step produces."""
        self.preempted: Sequence[RequestState] = ()
        """Requests preempted while the step was scheduled."""
        self.hit_tokens: int = 0
        self.lookup_tokens: int = 0
        """Like ``hit_tokens`` of requests that were never admitted before, as vLLM counts its hit rate."""
        self.recomputed_tokens: int = 0
        """Computed once more, after a preemption."""
        self.recalled_tokens: int = 0
        """Those of ``hit_tokens`` that come from the lower tier."""
        self.recalls: Sequence[int] = ()
        """Bytes that each request admitted in this step needs from the lower tier before the step can run."""
        self.entries: list[tuple[int, int]] | None = None
        """(request, tokens) of everything in the step, kept only where somebody asks for it."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.num_decodes or self.chunks)

    def end_with(self, states: Iterable[RequestState]) -> None:
        """These requests get their last token in this step."""
        self.finishing = sorted(states, key=by_order)
        for state in self.finishing:
            if not state.stops:
                state.phase = Phase.DRAINING

    def add_request(self, tokens: int, history: int) -> None:
        """Add ``tokens`` new tokens of a request that has ``history`` computed ones."""
        if tokens > 1:
            self.chunks = [*self.chunks, (tokens, history)]
        else:
            self.add_decodes(1, history, history, history)
            if self.kv_lengths is not None:
                self.kv_lengths.append(history)

    def add_verification(self, tokens: int, history: int) -> None:
        """Add the newest token of a request with ``history`` computed ones, and drafts: ``tokens`` in all."""
        self.add_decodes(1, history, history, history)
        self.add_drafts(tokens - 1)

    def add_drafts(self, tokens: int) -> None:
        """Let the decodes verify ``tokens`` drafts, all together."""
        self.draft_tokens += tokens

    def note_again(self, lost: int, done: int, reach: int) -> None:
        """Count what of a request's tokens ``done`` to ``reach`` - 1 had been computed before: the first
        ``lost``."""
        self.recomputed_tokens += max(min(reach, lost) - done, 0)

    def add_decodes(self, count: int, kv_sum: int, kv_min: int, kv_max: int) -> None:
        """Add ``count`` requests of one token each."""
        if self.num_decodes:
            kv_min, kv_max = min(kv_min, self.kv_min), max(kv_max, self.kv_max)
        self.kv_min, self.kv_max = kv_min, kv_max
        self.num_decodes += count
        self.kv_sum += kv_sum
