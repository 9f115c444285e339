"""LoRA adapters as a limit of admission, where the goldens (tests/parity) cannot show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from servesim.errors import RunError
from tests.engine.small_engine import requests, run_small

if TYPE_CHECKING:
    from servesim.results.records import RunLog


def run_adapted(adapters: str, *shapes: tuple[int, int, int], **limits: Any) -> RunLog:
    """A run of requests with these adapters, a letter each; ``-``: none."""
    workload = requests(*shapes)
    for request, name in zip(workload, adapters, strict=True):
        request.lora = None if name == "-" else name
    return run_small(workload, **limits)


def test_a_request_without_a_slot_is_passed_over() -> None:
    shapes = [(8, 3, 0)] * 4
    log = run_adapted("ab-a", *shapes, max_loras=1)
    assert [record.scheduled_ns for record in log.requests] == [0, log.requests[0].end_ns, 0, 0]
    both = run_adapted("ab-a", *shapes, max_loras=2)
    assert [record.scheduled_ns for record in both.requests] == [0, 0, 0, 0]


def test_those_passed_over_keep_their_order() -> None:
    log = run_adapted("abcb", *[(8, 3, 0)] * 4, max_loras=1)
    a, b, c, d = (record.scheduled_ns for record in log.requests)
    assert a < b == d < c


def test_a_request_whose_last_token_is_in_flight_keeps_its_slot() -> None:
    """Since 0.33; before, its slot was free a step earlier."""
    kept, free = (
        run_adapted("ab", (8, 3, 0), (8, 3, 0), depth=2, max_loras=1, counts_all_loras=counts)
        for counts in (True, False)
    )
    assert kept.requests[1].scheduled_ns > free.requests[1].scheduled_ns


def test_too_many_adapters_in_a_step_end_the_run() -> None:
    """Before 0.33: a held prompt's slot is taken by another, and vLLM fails an assertion when it goes on."""
    shapes = (4, 40, 0), (200, 3, 0), (1, 20, 1500)
    limits: dict[str, Any] = {"budget": 64, "prefill_interval": 4, "max_loras": 1}
    with pytest.raises(RunError, match=r"2 LoRA adapters meet in one step.*--max-loras is 1"):
        run_adapted("-ab", *shapes, counts_all_loras=False, **limits)
    run_adapted("-ab", *shapes, counts_all_loras=True, **limits)
