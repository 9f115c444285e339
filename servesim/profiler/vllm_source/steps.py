"""One engine step made to measure: the scheduler's output for a batch that no scheduler ever met."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class StepRequest:
    """A request of the step: tokens it has in the cache, and tokens to compute."""

    computed: int
    scheduled: int

    @property
    def blocks(self) -> int:
        return -(-(self.computed + self.scheduled) // BLOCK_SIZE)

    @property
    def prompt_tokens(self) -> int:
        """A chunk is part of its prompt; a decode's one token is its first after the prompt."""
        return self.computed if self.scheduled == 1 and self.computed else self.computed + self.scheduled


def requests_of(chunk: int, history: int, decodes: list[tuple[int, int]]) -> list[StepRequest]:
    """The requests of an attention batch: the decodes, then the chunk."""
    found = [StepRequest(kv, 1) for count, kv in decodes for _ in range(count)]
    return [*found, StepRequest(history, chunk)] if chunk else found


def filled(cls: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of the engine from the values we know; fields of other versions keep their defaults.

    Raises:
        NotSupportedError: this version requires a field that we know nothing about.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    missing = dataclasses.MISSING
    unknown = [
        name
        for name, field in fields.items()
        if name not in values and field.default is missing and field.default_factory is missing
    ]
    if unknown:
        raise NotSupportedError(
            f"--source vllm: this version's {cls.__name__} requires {', '.join(unknown)}, which servesim "
            "does not know; "
            "vLLM 0.19 to 0.24 are supported"
        )
    return cls(**{name: value for name, value in values.items() if name in fields})


class StepMaker:
    """Makes scheduler outputs; every step's requests are new ones and the last step's are finished."""

    def __init__(self, output_module: Any, sampling_params: Any, num_blocks: int, groups: int = 1) -> None:
        """
        Args:
            output_module: vLLM's module with SchedulerOutput, NewRequestData and CachedRequestData.
            sampling_params: how every request samples.
            num_blocks: KV blocks of the engine; block 0 is the engine's own.
            groups: KV cache groups.
        """
        self._types, self._sampling, self._groups = output_module, sampling_params, groups
        self._num_blocks = num_blocks
        self._next_block = 1
        self._next_id = 0
        self._running: list[str] = []

    def output(self, requests: list[StepRequest]) -> Any:
        """The scheduler output of one step. Blocks are other ones every time, as far as there are enough.

        Raises:
            NotSupportedError: the engine's types are not what they were in the versions we know.
        """
        names = [f"servesim-{self._next_id + i}" for i in range(len(requests))]
        self._next_id += len(requests)
        new = [self._new(name, request) for name, request in zip(names, requests, strict=True)]
        scheduled = {name: request.scheduled for name, request in zip(names, requests, strict=True)}
        finished, self._running = set(self._running), names
        return filled(
            self._types.SchedulerOutput,
            {
                "scheduled_new_reqs": new,
                "scheduled_cached_reqs": self._types.CachedRequestData.make_empty(),
                "num_scheduled_tokens": scheduled,
                "total_num_scheduled_tokens": sum(scheduled.values()),
                "scheduled_spec_decode_tokens": {},
                "scheduled_encoder_inputs": {},
                "num_common_prefix_blocks": [0] * self._groups,
                "finished_req_ids": finished,
                "free_encoder_mm_hashes": [],
                "structured_output_request_ids": {},
                "grammar_bitmask": None,
                "kv_connector_metadata": None,
            },
        )

    def _new(self, name: str, request: StepRequest) -> Any:
        tokens = [1 + i % 64 for i in range(request.prompt_tokens)]
        blocks = self._take(request.blocks)
        return filled(
            self._types.NewRequestData,
            {
                "req_id": name,
                "prompt_token_ids": tokens,
                "mm_features": [],
                "sampling_params": self._sampling,
                "pooling_params": None,
                "block_ids": tuple(list(blocks) for _ in range(self._groups)),
                "num_computed_tokens": request.computed,
                "lora_request": None,
            },
        )

    def _take(self, count: int) -> list[int]:
        if self._next_block + count > self._num_blocks:
            self._next_block = 1
        first = self._next_block
        self._next_block += count
        return list(range(first, first + count))
