"""Steps of decodes alone are taken in a tight loop; its slow twin, a run step by step, makes the same ones.

More of the twins: tests/engine/test_properties.py, on drawn workloads, and tests/parity, on vLLM's own logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from servesim.engine.connector import Connector
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.specs.options import RuntimeOptions
from tests.engine.small_engine import LinearTimes, requests, run_small, small_member
from tests.engine.test_properties import everything
from tests.hand_made import OneInstance

if TYPE_CHECKING:
    from servesim.results.records import RunLog


class CountedLaunches(OneInstance):
    """Counts the steps that are launched one by one."""

    def __init__(self, times: LinearTimes) -> None:
        super().__init__(times)
        self.launched = 0

    def stages_ns(self, batches: Any) -> list[tuple[int, int]]:
        self.launched += 1
        return super().stages_ns(batches)


def launches(shapes: list[tuple[int, int, int]], depth: int, *, jump: bool, **how: Any) -> tuple[int, RunLog]:
    """Steps launched one by one by a run of these requests, and the run."""
    workload, times = requests(*shapes), CountedLaunches(LinearTimes(per_kv=2))
    member = small_member(workload, **how)
    log = Simulation([LoopPlan([member], times, depth=depth, jump=jump)], workload, RuntimeOptions()).run()
    return times.launched, log


@pytest.mark.parametrize("depth", [1, 2])
def test_a_glide_goes_through_the_ends_of_requests(depth: int) -> None:
    shapes = [(4, 5 + 3 * i, 0) for i in range(8)]  # prefilled together; an end every third step after that
    launched, log = launches(shapes, depth, jump=True)
    singly, stepped = launches(shapes, depth, jump=False)
    assert everything(log) == everything(stepped)
    assert singly == len(log.instances[0].steps) == 26
    assert launched <= depth


@pytest.mark.parametrize("depth", [1, 2])
def test_a_glide_goes_on_while_every_place_is_taken(depth: int) -> None:
    shapes = [(4, 20 + i, 0) for i in range(6)]
    launched, log = launches(shapes, depth, jump=True, max_num_seqs=3)
    singly, stepped = launches(shapes, depth, jump=False, max_num_seqs=3)
    assert everything(log) == everything(stepped)
    assert max(log.instances[0].steps.waiting) == 3
    assert launched < singly / 3


@pytest.mark.parametrize("depth", [1, 2])
def test_a_glide_ends_where_blocks_lack(depth: int) -> None:
    shapes = [(4, 30, 0)] * 4  # 16 blocks for 4 requests of up to 34 tokens, 9 blocks each
    _, log = launches(shapes, depth, jump=True, blocks=17)
    _, stepped = launches(shapes, depth, jump=False, blocks=17)
    assert everything(log) == everything(stepped)
    assert sum(record.preemptions for record in log.requests) > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_glide_admits_what_the_budget_lets_in(depth: int) -> None:
    shapes = [(1, 14 + 3 * i, 0) for i in range(5)] + [(1, 4, 0)] * 4  # five decodes take the whole budget
    _, log = launches(shapes, depth, jump=True, budget=5)
    _, stepped = launches(shapes, depth, jump=False, budget=5)
    assert everything(log) == everything(stepped)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_glide_ends_with_the_last_stop_token(depth: int) -> None:
    workload = requests((4, 3, 0), (4, 6, 0))
    for request in workload:
        request.max_tokens = 20  # nobody knows beforehand which token is the last
    jumped, stepped = (run_small(workload, jump=jump, depth=depth) for jump in (True, False))
    assert everything(jumped) == everything(stepped)


class Onlooker(Connector):
    """A connector that does nothing: with one, the scheduler takes no short way to an admission."""


@pytest.mark.parametrize("blocks", [1001, 12])
@pytest.mark.parametrize("whole", [True, False])
def test_whole_prompts_are_admitted_as_all_others(blocks: int, whole: bool) -> None:
    shapes = [(4 + 5 * (i % 3), 5 + i, 900 * i) for i in range(12)]
    how = {"blocks": blocks, "reserve_full_isl": whole, "budget": 16, "depth": 2}
    plain = run_small(requests(*shapes), **how)
    looked_on = run_small(requests(*shapes), connectors=[Onlooker()], **how)
    assert everything(plain) == everything(looked_on)
