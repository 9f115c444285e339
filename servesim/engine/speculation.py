"""Speculative decoding inside an instance: drafts are scheduled behind what is known, then verified.

A request whose prompt is computed is *verifying*: a step computes its newest token and up to
``num_speculative_tokens`` drafts behind it. What the step's output accepts becomes known; for the rest the
request goes back, ``computed`` and all. With asynchronous scheduling the next step is scheduled before that
output: everything in flight then counts as computed (``pending``), as if all drafts were accepted, and what
was rejected is taken back when the output is there. This is what vLLM's scheduler does with
``num_computed_tokens``, ``num_output_placeholders`` and ``spec_token_ids``.

Which drafts are accepted is no affair of scheduling: an :class:`Acceptance` says it for a request and the
number of tokens known of it, so that neither batching nor preemption changes the answer.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from servesim.engine.request_state import Phase
from servesim.results.records import SpeculationLog
from servesim.slotted import dataclass
from servesim.specs.vllm_versions import LOOKAHEAD_HASHES, SLOTS_BY_REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.engine.batch import Batch
    from servesim.engine.request_state import RequestState
    from servesim.memory.kv_cache import BlockTable
    from servesim.specs.speculative import SpeculativeSpec
    from servesim.specs.vllm_versions import VllmVersion

_WORD = (1 << 64) - 1


def _by_admission(sampled: tuple[RequestState, int, bool]) -> int:
    return sampled[0].order


class EngineLimits(Protocol):
    """The settings of an engine that speculation depends on."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def async_scheduling(self) -> bool: ...


class Acceptance(Protocol):
    """How the drafts of requests fare."""

    def drafts(self, request: int, known: int) -> int:
        """Drafts that are proposed once ``known`` tokens of a request are known, prompt included."""

    def accepted(self, request: int, known: int) -> int:
        """How many drafts in a row are right behind the first ``known`` tokens of a request."""


@dataclass(slots=True, frozen=True)
class DrawnAcceptance:
    """Acceptance by position: one random number for each verification, from a seed.

    ``rates[i]`` is the share of verifications that accept at least ``i + 1`` drafts, which is how vLLM counts
    per position. Draws of requests and positions are independent of each other.
    """

    rates: tuple[float, ...]
    seed: int = 0

    def drafts(self, request: int, known: int) -> int:
        """See :class:`Acceptance`: as many as there are positions."""
        del request, known
        return len(self.rates)

    def accepted(self, request: int, known: int) -> int:
        """See :class:`Acceptance`."""
        draw = uniform(self.seed, request, known)
        for position, rate in enumerate(self.rates):
            if draw >= rate:
                return position
        return len(self.rates)


def uniform(seed: int, request: int, known: int) -> float:
    """A number in [0, 1) that the arguments decide (SplitMix64, Steele, Lea and Flood, 2014)."""
    word = (seed * 0x9E3779B97F4A7C15 + request * 0xBF58476D1CE4E5B9 + known + 1) & _WORD
    word = (word * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return (word ^ (word >> 31)) / 2.0**64


@dataclass(slots=True)
class Speculation:
    """What one instance's scheduler goes by while it speculates."""

    num_tokens: int
    """Drafts of a request, at most."""
    acceptance: Acceptance
    asynchronous: bool
    """Whether a step is scheduled before the output of the one before is known."""
    lookahead: int = 0
    """KV slots that the drafter fills behind the tokens of a step."""
    reserve: int = 0
    """Tokens of a step's budget that are kept for the drafter from the start."""
    slots: int = 0
    """Tokens of a step's budget that each scheduled request takes for the drafter."""
    drops_last_hit: bool = False
    """Whether the last cached block of a prefix is computed again, for the drafter's sake."""
    hash_lookahead: int = 0
    """Tokens behind a block that its identity covers, for the drafter's sake."""
    notes_output: bool = False
    """Whether the prefix cache takes note of accepted tokens at once in synchronous scheduling too."""
    pads_admitted: bool = False
    """Whether a request that is admitted with one token to compute gets drafts of no worth, so that a step of
    decodes alone keeps its shape."""
    pads_cached: bool = False
    """Whether it also does where nothing else runs, if part of it is cached; and goes without where its
    context has no room for them."""
    max_model_len: int = (1 << 31) - 1
    log: SpeculationLog = field(default_factory=SpeculationLog)

    # ------------------------------------------------------------------ scheduling

    def wanted(self, state: RequestState) -> int:
        """Tokens of a verifying request that a step could compute; 0 if it is sure to end without."""
        pending = state.pending
        if pending and state.computed + 2 - pending >= state.total_tokens:
            return 0
        wanted = state.known + pending + state.drafts - state.computed
        return min(wanted, self.max_model_len - state.computed - 1)

    def reach(self, tokens: int) -> int:
        """KV slots for the first ``tokens`` tokens of a request and what the drafter writes behind them."""
        return min(tokens + self.lookahead, self.max_model_len)

    def most_reach(self, total: int) -> int:
        """KV slots that a request of ``total`` tokens may need at its end, drafts in flight among them."""
        return min(total - 1 + 2 * self.num_tokens + self.lookahead, self.max_model_len)

    def note(self, state: RequestState, tokens: int) -> int:
        """The leading tokens that the prefix cache may know by once the first ``tokens`` are scheduled."""
        state.noted = max(min(tokens, state.known - self.hash_lookahead), state.noted)
        return state.noted

    def padded(self, batch: Batch, done: int, left: int) -> int:
        """Tokens for a request admitted with one to compute behind ``done``; 0: it has to wait."""
        tokens, outputs = 1 + self.num_tokens, batch.outputs
        assert outputs is not None
        alike = outputs.served or (self.pads_cached and done)
        if not self.pads_admitted or outputs.serves_prefill or not alike:
            return 1
        if done + tokens + self.pads_cached > self.max_model_len:
            return int(self.pads_cached)
        return tokens if tokens <= left else 0

    def serve(self, batch: Batch, state: RequestState, tokens: int) -> None:
        """A running request takes part in a batch with ``tokens`` tokens: a chunk of its prompt, which is put
        into the batch elsewhere, or its newest token and drafts behind it."""
        assert batch.outputs is not None
        batch.outputs.serve(prefill=state.phase is not Phase.VERIFY)
        if state.phase is not Phase.VERIFY:
            return
        if batch.entries is not None:
            batch.entries.append((state.request.index, tokens))
        batch.add_verification(tokens, state.computed)
        drafts = state.computed + tokens - state.known - state.pending
        state.computed += tokens
        self._expect(batch, state, drafts, padding=False)

    def sample(self, batch: Batch, state: RequestState, padding: int) -> None:
        """The prompt of a request is computed by a batch, with ``padding`` drafts of no worth behind it."""
        state.phase = Phase.VERIFY
        self._expect(batch, state, padding, padding=padding > 0)

    def _expect(self, batch: Batch, state: RequestState, drafts: int, *, padding: bool) -> None:
        """Expect output for a request from a batch: one token, and what is accepted of ``drafts``."""
        assert batch.outputs is not None
        batch.outputs.sampled.append((state, drafts, padding))
        state.drafts = 0
        if self.asynchronous:
            state.pending += 1 + drafts
            state.drafts = self.num_tokens

    def preempt(self, state: RequestState) -> tuple[int, int]:
        """Forget what was scheduled of a victim.

        Returns:
            Its leading tokens that were computed, and those that the prefix cache knows by.
        """
        noted = state.noted
        state.drafts = state.pending = state.noted = 0
        return min(state.computed, state.known), noted

    # ------------------------------------------------------------------ output

    def commit(self, batch: Batch, publish: Callable[[BlockTable, int], None]) -> list[RequestState]:
        """Take in the output of a batch that has ended; returns the requests that got their last token.

        ``publish`` lets others hit the full blocks among the first tokens of a request.
        """
        ended = []
        log, drafted, right = self.log, 0, 0
        assert batch.outputs is not None
        for state, drafts, padding in sorted(batch.outputs.sampled, key=_by_admission):
            if state.phase is Phase.FINISHED:
                continue  # it had its last token when this batch was in flight
            accepted = 0
            if drafts:
                if not padding:
                    accepted = min(self.acceptance.accepted(state.request.index, state.known), drafts)
                drafted += drafts
                right += accepted
                log.note_verification(accepted, self.num_tokens)
            new = min(accepted + 1, state.total_tokens - state.known)
            state.known += new
            state.record.add_output(state.track, batch.step, new)
            if state.phase is not Phase.WAITING:  # else preempted meanwhile: it starts over, the tokens count
                self._go_back(state, drafts - accepted, new)
                publish(state.table, state.noted)
            if state.known == state.total_tokens:
                ended.append(state)
        log.draft_tokens.append(drafted)
        log.accepted_tokens.append(right)
        return ended

    def _go_back(self, state: RequestState, rejected: int, new: int) -> None:
        """``rejected`` drafts of a request were wrong, and ``new`` tokens more are known of it."""
        state.computed -= rejected
        if self.asynchronous:
            state.pending -= rejected + new
        else:
            state.drafts = min(self.acceptance.drafts(state.request.index, state.known), self.num_tokens)
        if self.asynchronous or self.notes_output:
            self.note(state, state.known - 1)


def speculation_of(
    spec: SpeculativeSpec,
    options: EngineLimits,
    version: VllmVersion,
    seed: int = 0,
    log: SpeculationLog | None = None,
) -> Speculation:
    """What a scheduler of this version of vLLM goes by, with drafts that fare as ``spec`` says."""
    slots = int(spec.method == "draft_model")  # its input keeps one token more than the target's
    by_request = SLOTS_BY_REQUEST.holds(version)
    hashed_ahead = LOOKAHEAD_HASHES.holds(version)
    return Speculation(
        spec.num_tokens,
        DrawnAcceptance(spec.rates, seed),
        asynchronous=options.async_scheduling,
        lookahead=spec.num_tokens if spec.has_layers else 0,
        reserve=slots if by_request else slots * options.max_num_seqs,
        slots=slots if by_request else 0,
        drops_last_hit=spec.reads_hidden_states and not hashed_ahead,
        hash_lookahead=hash_lookahead(spec, version),
        notes_output=hashed_ahead,
        pads_admitted=by_request,
        pads_cached=hashed_ahead,
        max_model_len=options.max_model_len,
        log=log or SpeculationLog(),
    )


def hash_lookahead(spec: SpeculativeSpec | None, version: VllmVersion) -> int:
    """Tokens behind a block that its identity covers."""
    return int(spec is not None and spec.reads_hidden_states and LOOKAHEAD_HASHES.holds(version))
