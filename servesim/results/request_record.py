"""What happened to one request."""

from __future__ import annotations

from operator import attrgetter

FIELDS = (
    "request",
    "instance",
    "arrival_ns",
    "queued_ns",
    "scheduled_ns",
    "first_token_ns",
    "end_ns",
    "token_steps",
    "extra_tokens",
    "npu_hit",
    "storage_hit",
    "preemptions",
    "recomputed_tokens",
    "decode_instance",
    "front_end_ns",
    "handed_over_ns",
    "cut_tokens",
    "load_began_ns",
    "load_ended_ns",
    "prefill_step",
    "away",
)
"""What is known of a request."""
_all_of = attrgetter(*FIELDS)


class RequestRecord:
    """What happened to one finished request. Times in ns on the simulation clock."""

    __slots__ = (*FIELDS,)

    def __init__(
        self,
        request: int,
        instance: int,
        arrival_ns: int,
        queued_ns: int,
        scheduled_ns: int,
        first_token_ns: int,
        end_ns: int,
        token_steps: list[tuple[int, int, int]] | None = None,
        extra_tokens: int = 0,
        npu_hit: int = 0,
        storage_hit: int = 0,
        preemptions: int = 0,
        recomputed_tokens: int = 0,
        decode_instance: int = -1,
        front_end_ns: int = 0,
        handed_over_ns: int = -1,
        cut_tokens: int = 0,
        load_began_ns: int = -1,
        load_ended_ns: int = -1,
        prefill_step: tuple[int, int] | None = None,
        away: list[tuple[int, int, int]] | None = None,
    ) -> None:
        self.request = request
        """Index of the request in the workload."""
        self.instance = instance
        """Instance that took the request in (the prefill side when prefill and decode are separate)."""
        self.arrival_ns = arrival_ns
        self.queued_ns = queued_ns
        """Step boundary at which the engine took the request in."""
        self.scheduled_ns = scheduled_ns
        """Start of scheduling of the first step that worked on the request."""
        self.first_token_ns = first_token_ns
        self.end_ns = end_ns
        self.token_steps: list[tuple[int, int, int]] = [] if token_steps is None else token_steps
        """(track, first, last): runs of consecutive entries, ``last`` included, of a track of
        :class:`servesim.results.records.RunLog`; each is the time of one token, or of several that came
        together (:attr:`extra_tokens`)."""
        self.extra_tokens = extra_tokens
        """Tokens that came together with another one: accepted drafts."""
        self.npu_hit = npu_hit
        """Prompt tokens found in the NPU's prefix cache at first admission."""
        self.storage_hit = storage_hit
        """Prompt tokens recalled from a lower tier at first admission."""
        self.preemptions = preemptions
        self.recomputed_tokens = recomputed_tokens
        self.decode_instance = decode_instance
        """Instance that decoded the request; equals ``instance`` unless prefill and decode are separate."""
        self.front_end_ns = front_end_ns
        """What of its latency it spent between the client and the engine, before it was queued."""
        self.handed_over_ns = handed_over_ns
        """When it was queued at another instance that decodes it; -1 where there is none."""
        self.cut_tokens = cut_tokens
        """Tokens that its answer lacks, since the context was full."""
        self.load_began_ns = load_began_ns
        """When it got blocks for KV that was then read while it waited; -1 if it never did."""
        self.load_ended_ns = load_ended_ns
        """When that KV was there."""
        self.prefill_step = prefill_step
        """(track, entry) of the token that the prefill side ended with, where another instance decodes."""
        self.away = away
        """(instance, step while which it was preempted, time in ns at which it was admitted again, -1
        before)."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestRecord) and _all_of(self) == _all_of(other)

    def __repr__(self) -> str:
        values = zip(FIELDS, _all_of(self), strict=True)
        return f"RequestRecord({', '.join(f'{name}={value!r}' for name, value in values)})"

    def note_load(self, began_ns: int, ended_ns: int) -> None:
        """It waited for KV with blocks in hand, before its first admission."""
        self.load_began_ns, self.load_ended_ns = began_ns, ended_ns

    def note_cut(self, tokens: int) -> None:
        """Its answer is shorter by so many tokens."""
        self.cut_tokens = tokens

    def note_lost(self, step: int) -> None:
        """It is preempted while step ``step`` is scheduled."""
        self.preemptions += 1
        where = self.instance if self.handed_over_ns < 0 else self.decode_instance
        self.away = [*(self.away or ()), (where, step, -1)]

    def note_back(self, now_ns: int) -> None:
        """It is admitted again."""
        if self.away:
            self.away[-1] = (*self.away[-1][:2], now_ns)

    def add_output(self, track: int, step: int, tokens: int) -> None:
        """Note ``tokens`` tokens that came together with the entry ``step`` of ``track``."""
        runs = self.token_steps
        if runs and runs[-1][2] == step - 1:
            runs[-1] = (track, runs[-1][1], step)
        else:
            runs.append((track, step, step))
        self.extra_tokens += tokens - 1

    def hand_over(self, instance: int, now_ns: int) -> None:
        """Go on at ``instance``, which gives the user the first token once more."""
        if self.token_steps:
            self.prefill_step = self.token_steps[-1][0], self.token_steps[-1][2]
        self.token_steps.clear()
        self.decode_instance, self.handed_over_ns = instance, now_ns
