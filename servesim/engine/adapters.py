"""The slots for LoRA adapters on the GPU, as far as they limit whom the scheduler serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.engine.request_state import Phase
from servesim.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim.engine.decode_set import DecodeSet
    from servesim.engine.request_state import RequestState


class AdapterSlots:
    """Which adapters have slots in the present step. A waiting request whose adapter finds none is passed
    over."""

    __slots__ = ("_counts_all", "_held", "_most")

    def __init__(self, most: int, counts_all: bool) -> None:
        """
        Args:
            most: adapters at once (vLLM's ``max_loras``), at least 1.
            counts_all: whether running requests keep their adapters' slots in steps that they sit out.
        """
        self._most = most
        self._counts_all = counts_all
        self._held: set[str] = set()

    def begin(self) -> None:
        """A step is scheduled."""
        self._held = set()

    def has_room(self, state: RequestState) -> bool:
        """Whether the adapters of the present step leave a slot for this request's."""
        lora = state.request.lora
        return lora is None or lora in self._held or len(self._held) < self._most

    def note(self, state: RequestState) -> None:
        """A request that the decode set does not hold is served in the present step."""
        if state.request.lora is not None:
            self._held.add(state.request.lora)

    def note_running(self, running: Iterable[RequestState], decodes: DecodeSet) -> None:
        """Take down the adapters of running requests; those of prompts and drafts are there already.

        Raises:
            RunError: they are too many.
        """
        if not self._counts_all:
            running = [s for s in running if s.phase is Phase.DECODE and s.home is decodes]
        self._held.update(s.request.lora for s in running if s.request.lora is not None)
        if len(self._held) > self._most:
            raise RunError(
                f"{len(self._held)} LoRA adapters meet in one step, and --max-loras is {self._most}: "
                "requests that sat out a step come back to one whose slots are taken. vLLM stops here as "
                "well, with an assertion (scheduled_loras); raise --max-loras"
            )
