"""Several tokens a step: what is drawn, what is taken back, and what becomes of the log.

That the engine schedules drafts as vLLM does is shown by the goldens (tests/parity).
"""

from __future__ import annotations

import pytest

from servesim.engine.batch import Batch, Outputs
from servesim.engine.request_state import Phase, RequestState
from servesim.engine.speculation import DrawnAcceptance, Speculation, uniform
from servesim.memory.kv_cache import BlockTable
from servesim.results.records import RequestRecord
from servesim.workload.request import Request


def new_state(prompt: int, output: int) -> RequestState:
    return RequestState(Request(0, prompt, output, 0), 0, 0, BlockTable([], 0))


def batch_of_step(step: int) -> Batch:
    batch = Batch(step)
    batch.outputs = Outputs()
    return batch


def speculation(*rates: float, asynchronous: bool = False) -> Speculation:
    return Speculation(len(rates), DrawnAcceptance(rates), asynchronous=asynchronous)


def test_the_rates_come_out_by_position() -> None:
    drawn = DrawnAcceptance((0.8, 0.5, 0.5, 0.0), seed=3)
    counts = [drawn.accepted(request, known) for request in range(50) for known in range(200)]
    shares = [sum(count > position for count in counts) / len(counts) for position in range(4)]
    assert shares == pytest.approx([0.8, 0.5, 0.5, 0.0], abs=0.02)


def test_draws_depend_on_seed_request_and_place_alone() -> None:
    few = range(9)
    assert len({uniform(seed, request, known) for seed in few for request in few for known in few}) == 729
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_rejected_drafts_are_computed_again(asynchronous: bool) -> None:
    """Three drafts, two of them right: four tokens are computed, three stay."""
    own = speculation(1.0, 1.0, 0.0, asynchronous=asynchronous)
    state = new_state(prompt=10, output=20)
    first, second = batch_of_step(0), batch_of_step(1)
    state.computed = 10
    own.sample(first, state, 0)
    own.commit(first, lambda *_: None)
    assert (state.phase, state.known, state.computed, state.drafts) == (Phase.VERIFY, 11, 10, 3)
    assert own.wanted(state) == 4
    own.serve(second, state, 4)
    assert (second.num_decodes, second.draft_tokens, second.kv_sum) == (1, 3, 10)
    own.commit(second, lambda *_: None)
    assert (state.known, state.computed, state.pending) == (14, 13, 0)
    assert (own.log.num_drafts, own.log.accepted_per_position) == (1, [1, 1, 0])
    assert (list(own.log.draft_tokens), list(own.log.accepted_tokens)) == ([0, 3], [0, 2])
    assert (state.record.token_steps, state.record.extra_tokens) == ([(0, 0, 1)], 2)


def test_an_answer_is_cut_off_behind_its_last_token() -> None:
    own = speculation(1.0, 1.0)
    state = new_state(prompt=4, output=2)
    state.computed, state.known, state.drafts, state.phase = 4, 5, 2, Phase.VERIFY
    batch = batch_of_step(0)
    own.serve(batch, state, own.wanted(state))
    assert own.commit(batch, lambda *_: None) == [state]
    assert (state.known, state.record.extra_tokens) == (6, 0)


def test_what_is_in_flight_of_a_victim_still_counts() -> None:
    own = speculation(1.0, asynchronous=True)
    state = new_state(prompt=4, output=9)
    state.computed, state.known, state.drafts, state.phase = 4, 5, 1, Phase.VERIFY
    batch = batch_of_step(0)
    own.serve(batch, state, own.wanted(state))
    state.computed, _ = own.preempt(state)
    state.phase = Phase.WAITING
    own.commit(batch, lambda *_: None)
    assert (state.known, state.computed, state.pending, state.drafts) == (7, 5, 0, 0)


def test_tokens_that_come_together_are_one_output() -> None:
    record = RequestRecord(0, 0, 0, 0, 0, -1, -1)
    for step, tokens in ((3, 1), (4, 3), (6, 2)):
        record.add_output(0, step, tokens)
    assert record.token_steps == [(0, 3, 4), (0, 6, 6)]
    assert record.extra_tokens == 3
