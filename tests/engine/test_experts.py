from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.experts import expert_routing, rank_loads
from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.cost.expert_stage import ExpertRouting

POLICIES = ("BALANCED", "RR", "RAND", "ZIPF")


def routing(policy: str, experts: int = 8, k: int = 2, ranks: int = 2, seed: int = 42) -> ExpertRouting:
    model: Any = SimpleNamespace(num_experts=experts, num_experts_per_tok=k)
    return expert_routing(policy, model, ranks, seed)


def test_ranks_hold_consecutive_experts() -> None:
    loads = rank_loads(np.array([[3, 0, 1, 0, 0, 0, 0, 2]]), 2, 2)
    assert loads.tokens.tolist() == [[2.0, 1.0]]
    assert loads.activated.tolist() == [[2.0, 1.0]]
    assert all((e * 3 // 12) == e // 4 for e in range(12))  # consecutive is `expert * ranks // experts`


def test_balanced_ranks_touch_the_expected_experts() -> None:
    loads = routing("BALANCED").loads(3, [0, 5], wave=1)
    # 8 · (1 - (3/4)³) = 4.625 experts, half of them on each rank.
    assert loads.tokens.tolist() == [[1.5, 1.5]] * 2
    assert loads.activated.tolist() == [[2.3125, 2.3125]] * 2


def test_round_robin_goes_on_in_the_next_layer() -> None:
    loads = routing("RR").loads(3, [0, 1, 2], wave=9)
    # Experts 0-5, then 6, 7, 0-3, then 4-7, 0, 1.
    assert loads.tokens.tolist() == [[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]
    assert loads.activated.tolist() == [[4.0, 2.0], [4.0, 2.0], [2.0, 4.0]]
    assert routing("RR").loads(8, [0], wave=0).tokens.tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("policy", ["RAND", "ZIPF"])
def test_draws_depend_on_seed_wave_and_layer_and_on_nothing_else(policy: str) -> None:
    first = routing(policy, 64, 4, 16)
    wanted = first.loads(50, [3], wave=7).tokens.tolist()
    first.loads(9, [0, 1, 2], wave=1)
    assert first.loads(50, [3], wave=7).tokens.tolist() == wanted
    assert routing(policy, 64, 4, 16).loads(50, [3], wave=7).tokens.tolist() == wanted
    others = [
        routing(policy, 64, 4, 16, seed=43).loads(50, [3], wave=7),
        first.loads(50, [3], wave=8),
        first.loads(50, [4], wave=7),
    ]
    assert all(other.tokens.tolist() != wanted for other in others)


def test_random_experts_are_equally_popular() -> None:
    loads = routing("RAND", experts=12, k=3, ranks=12).loads(40_000, [0, 1], wave=0)
    assert loads.tokens * 3 == pytest.approx(np.full((2, 12), 10_000), rel=0.05)


def test_random_draws_touch_the_expected_number_of_experts() -> None:
    drawn, expected = routing("RAND", 128, 8, 1), routing("BALANCED", 128, 8, 1)
    for tokens in (1, 5, 20, 60):
        mean = drawn.loads(tokens, list(range(300)), wave=0).activated.mean()
        assert mean == pytest.approx(expected.loads(tokens, [0], 0).activated[0, 0], rel=0.02)


def test_zipf_prefers_other_experts_in_every_layer() -> None:
    zipf = routing("ZIPF", experts=16, k=1, ranks=16)
    counts = np.stack([zipf.loads(20_000, [0, 1, 2], wave=wave).tokens for wave in range(3)])
    popularity = 1 / np.arange(1, 17)
    for layers in counts:
        for layer in layers:
            assert np.sort(layer)[::-1] == pytest.approx(20_000 * popularity / popularity.sum(), rel=0.15)
    favourites = counts.argmax(axis=2)
    assert (favourites == favourites[0]).all()
    assert len(set(favourites[0].tolist())) > 1


def test_drawing_again_is_drawing_from_those_left() -> None:
    """Two of three experts with popularity 1, 1/2, 1/3: P(1 and 2) = 6/11 · 3/5 + 3/11 · 6/8, by hand."""
    zipf = routing("ZIPF", experts=3, k=2, ranks=3)
    tokens = 60_000
    chosen = np.sort(zipf.loads(tokens, [0], wave=0).tokens[0] * 2)[::-1] / tokens
    pairs = {
        (0, 1): 6 / 11 * 3 / 5 + 3 / 11 * 6 / 8,
        (0, 2): 6 / 11 * 2 / 5 + 2 / 11 * 6 / 9,
        (1, 2): 3 / 11 * 2 / 8 + 2 / 11 * 3 / 9,
    }
    expected = [sum(p for pair, p in pairs.items() if expert in pair) for expert in range(3)]
    assert chosen == pytest.approx(expected, abs=0.01)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_policy_gives_out_every_token_and_no_expert_twice(data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(POLICIES))
    ranks = data.draw(st.integers(1, 6))
    experts = ranks * data.draw(st.integers(1, 8))
    k = data.draw(st.integers(1, experts))
    tokens, layers = data.draw(st.integers(1, 200)), data.draw(st.lists(st.integers(0, 90), min_size=1))
    loads = routing(policy, experts, k, ranks).loads(tokens, layers, data.draw(st.integers(0, 2**64 - 1)))
    assert loads.tokens.shape == loads.activated.shape == (len(layers), ranks)
    assert loads.tokens.sum(axis=1) == pytest.approx(np.full(len(layers), tokens))
    assert (loads.activated <= experts / ranks + 1e-9).all()
    if policy != "BALANCED":
        assert (loads.activated <= loads.tokens * k + 1e-9).all()
        assert (loads.tokens * k <= loads.activated * tokens + 1e-9).all()  # nobody chose one twice
        assert (loads.activated.sum(axis=1) >= k).all()


def test_a_token_may_choose_every_expert() -> None:
    for policy in ("RAND", "ZIPF"):
        assert routing(policy, 4, 4, 2).loads(5, [0], 0).tokens.tolist() == [[2.5, 2.5]]


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], ExpertRouting]:
    def make(policy: Any) -> ExpertRouting:
        module = ModuleType("own_policies")
        module.policy = policy  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "own_policies", module)
        return routing("own_policies:policy")

    return make


def test_a_policy_of_ones_own(custom: Callable[[Any], ExpertRouting]) -> None:
    calls = []

    def first_two(tokens: int, layer: int, experts: int, experts_per_token: int, rng: Any) -> list[int]:
        calls.append((tokens, layer, experts, experts_per_token, rng.integers(2**60)))
        return [tokens] * experts_per_token + [0] * (experts - experts_per_token)

    loads = custom(first_two).loads(5, [0, 3], wave=1)
    assert loads.tokens.tolist() == [[5.0, 0.0]] * 2
    assert loads.activated.tolist() == [[2.0, 0.0]] * 2
    assert [call[:4] for call in calls] == [(5, 0, 8, 2), (5, 3, 8, 2)]
    assert calls[0][4] != calls[1][4]
    custom(first_two).loads(5, [3], wave=1)
    assert calls[2] == calls[1]


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([1] * 8, "numbers from 1 to 1 that add up to 8"),
        ([9, 1, 0, 0, 0, 0, 0, 0], "numbers from 0 to 9 that add up to 10"),
        ([6, -1, 5, 0, 0, 0, 0, 0], "numbers from -1 to 6"),
        ([2.5] * 4 + [0.0] * 4, r"type float64"),
        ([5, 5], r"shape \(2,\)"),
        (None, "NoneType"),
        ([[1], [2, 3]], "list of shape"),
    ],
)
def test_what_a_policy_returns_is_checked(
    custom: Callable[[Any], ExpertRouting], said: Any, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as error:
        custom(lambda *_: said).loads(5, [0], wave=0)
    assert "own_policies:policy returned" in str(error.value)
    assert "must be 8 whole numbers" in str(error.value)
    assert "0 to 5 each, 10 together" in str(error.value)


def test_a_policy_that_cannot_be_loaded_is_told() -> None:
    for name in ("no_such_module:f", "math:no_such_function"):
        with pytest.raises(InputError, match=f"{name} cannot be loaded"):
            routing(name)
    with pytest.raises(InputError, match="math:pi is not callable"):
        routing("math:pi")
