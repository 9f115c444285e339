"""Requests that wait with blocks in hand for KV, in cases where an instance could come to a halt."""

from __future__ import annotations

from typing import Any

import pytest

from servesim.bench.kv_loads import parse_loads
from servesim.bench.scheduler_log import SchedulerLog
from servesim.bench.step_formula import StepFormula
from servesim.engine.kv_loads import LateFrees
from servesim.errors import InputError, RunError
from servesim.memory.block_pool import BlockPool
from tests.golden.golden_file import Golden
from tests.parity.replay import replay

MS = 1_000_000


def urgent_behind_a_holder(version: str) -> SchedulerLog:
    """Request 0 holds 3 of 8 blocks and its KV is read; then a more urgent one comes that needs 6."""
    settings: dict[str, Any] = {
        "num_gpu_blocks": 9,
        "block_size": 4,
        "max_model_len": 40,
        "async_scheduling": False,
        "scheduling_policy": "priority",
        "kv_loads": "async:0.5:50000:0/2",
    }
    formula = StepFormula.from_us(9000, 25, 10, 0).as_dict()
    entries = [
        {"prompt": 24, "output": 2, "arrival": 0, "priority": 1},
        {"prompt": 24, "output": 2, "arrival": 20 * MS, "priority": 0},
    ]
    header = {"vllm": version, "settings": settings, "formula": formula}
    return replay(Golden("by hand", "", entries, SchedulerLog(header)))


def test_holders_of_blocks_come_first_since_0_33() -> None:
    log = urgent_behind_a_holder("0.33.0")
    assert [list(step.sched) for step in log.steps] == [[0], [0], [1], [1]]
    assert log.steps[0].start == 50 * MS
    assert log.steps[0].hits == {0: 12}


def test_before_0_33_they_may_halt_an_instance() -> None:
    with pytest.raises(RunError, match=r"1 of them hold 3 of 8 blocks for KV that was read.*--kv-load step"):
        urgent_behind_a_holder("0.28.0")


def test_blocks_come_back_with_the_last_step_scheduled() -> None:
    pool, late = BlockPool(9), LateFrees(spares=True)
    blocks = pool.take(3)
    late.note_scheduled(5)
    late.keep(blocks, 0, 0)
    assert not late.end(4, pool)
    assert (late.pending, pool.num_free) == (True, 5)
    assert late.end(5, pool)
    assert (late.pending, pool.num_free) == (False, 8)


@pytest.mark.parametrize(
    "text", ["", "async", "async:0.5", "sync:0.5:9:0", "async:1.5:9:0", "sync:0.5/0", "late:1:9:0", "sync:x"]
)
def test_loads_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--kv-loads"):
        parse_loads(text)


def test_a_share_is_of_whole_blocks_and_a_step_computes_a_token() -> None:
    half, whole, in_step = (parse_loads(text) for text in ("async:0.5:1:0", "async:1:1:0/3", "sync:1"))
    assert half.there(0, 100, 100, 16) == 48
    assert whole.there(3, 33, 33, 16) == 33
    assert whole.there(4, 33, 33, 16) == 0
    assert in_step.there(0, 32, 32, 16) == 31
    assert whole.read_ns(33) == 1000
