"""What bounds a step of the scheduler: limits, and which steps compute prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servesim.engine.batch import Batch


class SchedulerLimits:
    """What bounds a step."""

    __slots__ = (
        "caps_lone_prefill",
        "chunked_prefill",
        "counts_all_loras",
        "counts_all_victims",
        "deferred_first",
        "long_prefill_token_threshold",
        "max_loras",
        "max_num_batched_tokens",
        "max_num_seqs",
        "prefill_interval",
        "reserve_full_isl",
        "serves_on",
        "shared_tokens",
        "skip_prefill",
        "watermark_blocks",
    )

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        long_prefill_token_threshold: int = 0,
        caps_lone_prefill: bool = True,
        shared_tokens: int = 0,
        chunked_prefill: bool = True,
        reserve_full_isl: bool = True,
        watermark_blocks: int = 0,
        prefill_interval: int = 1,
        skip_prefill: bool = False,
        serves_on: bool = True,
        counts_all_victims: bool = True,
        max_loras: int = 0,
        counts_all_loras: bool = True,
        deferred_first: bool = False,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.long_prefill_token_threshold = long_prefill_token_threshold
        """Most tokens of one request's prefill in one step; 0: no limit."""
        self.caps_lone_prefill = caps_lone_prefill
        """Whether the threshold binds while a single request is waiting or running."""
        self.shared_tokens = shared_tokens
        """Tokens of a step whose fair share for every waiting or running request the threshold does not go
        below; 0: it stays what it is."""
        self.chunked_prefill = chunked_prefill
        self.reserve_full_isl = reserve_full_isl
        """Admit a request only if all its known tokens fit the free blocks."""
        self.watermark_blocks = watermark_blocks
        """Blocks that stay free when a request is admitted while others run."""
        self.prefill_interval = prefill_interval
        """Steps from one that computes prompts to the next, as long as requests decode and none has to
        wait."""
        self.skip_prefill = skip_prefill
        """The KV of all known tokens but the last is there as soon as a request is admitted."""
        self.serves_on = serves_on
        """Whether the others are still served in a step in which a request had to preempt itself."""
        self.counts_all_victims = counts_all_victims
        """Whether the one whose turn it is keeps its turn when a request before it that was not served is
        preempted; if not, it is passed over."""
        self.max_loras = max_loras
        """Most LoRA adapters at once; 0: requests have none."""
        self.counts_all_loras = counts_all_loras
        """Whether running requests keep their adapters' slots in steps that they sit out."""
        self.deferred_first = deferred_first
        """Whether waiting requests that were passed over go before those that are preempted later."""


class PrefillCadence:
    """Which steps compute prompts where vLLM's ``prefill_schedule_interval`` is above 1."""

    __slots__ = ("_executed", "_interval", "_last", "_saturated", "holds", "prefills")

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._executed = 0
        """Steps that computed anything."""
        self._last = -interval
        """The last of them that computed a prompt."""
        self._saturated = False
        """Whether the last step that could have admitted all waiting requests left some: no step is held
        then."""
        self.holds = False
        """Whether the present step computes no prompts."""
        self.prefills = False
        """Whether it computes one."""

    def note_prefill(self) -> None:
        """The present step prefills."""
        self.prefills = True

    def begin(self, decodes: bool) -> None:
        """A step is scheduled; ``decodes``: some running request has computed its prompt."""
        early = self._executed + 1 - self._last < self._interval
        self.holds = decodes and early and not self._saturated
        self.prefills = False

    def admitted(self, waiting: int) -> None:
        """The step has admitted what it could and left so many."""
        if not self.holds:
            self._saturated = waiting > 0

    def end(self, batch: Batch) -> None:
        """The step is scheduled."""
        if not batch.is_empty:
            self._executed += 1
        if self.prefills:
            self._last = self._executed

    def skip(self, steps: int) -> None:
        """So many steps went by in which nothing waited and nothing but decodes was computed."""
        self._executed += steps
        self._saturated = False
