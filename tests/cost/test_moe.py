from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.memory.traffic import expected_distinct_experts
from tests.cost.bundles import Toy

if TYPE_CHECKING:
    from pathlib import Path

MOE = {(1, 2): 10.0, (2, 2): 12.0, (2, 4): 20.0, (100, 2): 208.0, (100, 4): 216.0}


def test_one_token_touches_its_own_experts_and_many_touch_all() -> None:
    assert expected_distinct_experts(np.array([1, 2, 3, 10**6]), 4, 2).tolist() == [2.0, 3.0, 3.5, 4.0]
    assert expected_distinct_experts(np.array([1, 7]), 4, 4).tolist() == [4.0, 4.0]
    tokens = np.arange(1, 3000)
    assert expected_distinct_experts(tokens, 128, 8) == pytest.approx(128 * (1 - (1 - 8 / 128) ** tokens))


def test_the_expert_layer_runs_in_place_of_the_mlp(root: Path) -> None:
    timer = Toy(moe=MOE).timer(root, experts=4)
    assert [term.name for term in timer.layers.blocks + timer.layers.once] == [
        "qkv_proj",
        "o_proj",
        "moe",
        "embedding",
        "final_layernorm",
    ]
    moe = timer.layers.blocks[2]
    # one token: 2 experts, 10 µs; two tokens: 3 of 4 experts, half-way from 12 to 20.
    assert moe.us(np.array([1, 2])).tolist() == [10.0, 16.0]
    assert moe.calls == 2
    assert moe.origin(2) == "profiled at 2 tokens, 3.0 experts in tp1/moe.csv"


def test_ranks_that_share_experts_do_an_equal_part_of_the_work(root: Path) -> None:
    toy = Toy(moe=MOE, tp=2)
    moe = toy.timer(root, experts=4).layers.blocks[2]
    # 4 tokens on 4·(1 - 1/16) = 3.75 experts, shared by two: 2 tokens on 1.875, held at the smallest row.
    assert moe.us(np.array([4])).tolist() == [12.0]
    assert "equal work of one of 2 ranks" in moe.origin(4)


def test_a_table_measured_with_sliced_experts_is_taken_as_it_is(root: Path) -> None:
    folder = Toy(moe=MOE, tp=2).write(root)
    (folder / "tp2" / "moe.csv").write_text("tokens,activated_experts,time_us\n1,1,3.0\n1,4,6.0\n")
    moe = Toy(tp=2).timer(root, experts=4).layers.blocks[2]
    assert moe.us(np.array([1])).tolist() == [4.0]
    assert moe.origin(1) == "profiled at 1 tokens, 2.0 experts in tp2/moe.csv"
