"""Steps made to measure, from types that look like the engine's."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from servesim.errors import NotSupportedError
from servesim.profiler.vllm_source.steps import StepMaker, StepRequest, filled, requests_of


@dataclass
class NewRequestData:
    req_id: str
    prompt_token_ids: list[int]
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    of_a_later_version: int = 7


@dataclass
class CachedRequestData:
    @classmethod
    def make_empty(cls) -> CachedRequestData:
        return cls()


@dataclass
class SchedulerOutput:
    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]
    later: dict[str, Any] = field(default_factory=dict)


ENGINE = SimpleNamespace(
    NewRequestData=NewRequestData, CachedRequestData=CachedRequestData, SchedulerOutput=SchedulerOutput
)


def test_a_decode_has_its_prompt_behind_it() -> None:
    decode, chunk = requests_of(32, 100, [(1, 40)])
    assert (decode, decode.prompt_tokens, decode.blocks) == (StepRequest(40, 1), 40, 3)
    assert (chunk, chunk.prompt_tokens, chunk.blocks) == (StepRequest(100, 32), 132, 9)
    assert StepRequest(0, 1).prompt_tokens == 1


def test_a_step_schedules_what_it_should_and_ends_the_last_one() -> None:
    maker = StepMaker(ENGINE, None, num_blocks=100)
    first = maker.output(requests_of(32, 64, [(3, 40)]))
    assert first.total_num_scheduled_tokens == 35
    assert [new.num_computed_tokens for new in first.scheduled_new_reqs] == [40, 40, 40, 64]
    assert first.finished_req_ids == set()
    second = maker.output(requests_of(0, 0, [(1, 16)]))
    assert second.finished_req_ids == set(first.num_scheduled_tokens)


def test_blocks_of_a_step_are_shared_with_nobody() -> None:
    maker = StepMaker(ENGINE, None, num_blocks=20)
    for _ in range(10):
        taken = [
            block
            for new in maker.output(requests_of(0, 0, [(3, 16)])).scheduled_new_reqs
            for block in new.block_ids[0]
        ]
        assert len(set(taken)) == 6
        assert min(taken) >= 1
        assert max(taken) < 20


def test_a_required_field_that_is_not_known_is_told() -> None:
    @dataclass
    class Newer:
        req_id: str
        flux: int

    with pytest.raises(NotSupportedError, match="Newer requires flux"):
        filled(Newer, {"req_id": "a"})
