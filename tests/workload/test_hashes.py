"""Shared blocks, by hand and against an obvious twin."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.workload.formats import load_workload
from servesim.workload.hashes import answer_ids, block_ids, prompt_ids
from servesim.workload.request import Request, Workload
from tests.recorded import recorded_path


def workload_of(*tokens: tuple[list[int] | None, list[int] | None]) -> Workload:
    """Requests with these prompt and output ids."""
    requests = []
    for index, (prompt, output) in enumerate(tokens):
        request = Request(index, len(prompt or [0]), len(output or [0]), 0)
        request.input_ids = None if prompt is None else np.array(prompt, dtype=np.int64)
        request.output_ids = None if output is None else np.array(output, dtype=np.int64)
        requests.append(request)
    return Workload(requests)


def twin(workload: Workload, block_size: int) -> list[list[tuple[int, ...]]]:
    """Slow and obvious: a block is the tuple of all tokens up to its end, kept if another request has it."""
    chains = []
    for request in workload:
        tokens: list[int] = []
        prompt, answer = prompt_ids(request), answer_ids(request)
        if prompt is not None:
            tokens += prompt.tolist()
            if answer is not None:
                tokens += answer.tolist()
        ends = range(block_size, len(tokens) + 1, block_size)
        chains.append([tuple(tokens[:end]) for end in ends])
    owners = Counter(block for chain in chains for block in chain)
    return [[block for block in chain if owners[block] > 1] for chain in chains]


def same_identities(workload: Workload, block_size: int) -> None:
    found = block_ids(workload, block_size)
    expected = twin(workload, block_size)
    assert [len(ids) for ids in found.ids] == [len(chain) for chain in expected]
    pairs = {
        pair for ids, chain in zip(found.ids, expected, strict=True) for pair in zip(ids, chain, strict=True)
    }
    assert len(pairs) == len({number for number, _ in pairs}) == len({block for _, block in pairs})
    assert {number for number, _ in pairs} == set(range(found.num_ids))


def test_two_prompts_share_the_blocks_before_they_differ() -> None:
    found = block_ids(workload_of(([1, 2, 3, 4, 5, 6], None), ([1, 2, 3, 4, 9, 9], None)), 2)
    assert found.ids == [[0, 1], [0, 1]]
    assert found.num_ids == 2


def test_equal_tokens_after_another_past_are_another_block() -> None:
    assert block_ids(workload_of(([1, 1, 7, 7], None), ([2, 2, 7, 7], None)), 2).ids == [[], []]


def test_a_block_that_is_not_full_is_never_shared() -> None:
    assert block_ids(workload_of(([1, 2, 3], None), ([1, 2, 3], None)), 2).ids == [[0], [0]]
    assert block_ids(workload_of(([1, 2, 3], None), ([1, 2, 3], None)), 4).ids == [[], []]


def test_generated_tokens_count_like_prompt_tokens() -> None:
    """The second turn of a chat has the first turn's prompt and answer at its beginning."""
    found = block_ids(workload_of(([1, 2, 3], [4, 5, 6]), ([1, 2, 3, 4, 5, 6, 7], None)), 2)
    assert found.ids == [[0, 1, 2], [0, 1, 2]]


def test_a_prompt_shorter_than_a_block_is_completed_by_its_output() -> None:
    assert block_ids(workload_of(([1], [2, 3, 4]), ([1, 2, 3, 4, 5], None)), 4).ids == [[0], [0]]


def test_requests_without_ids_share_nothing() -> None:
    assert block_ids(workload_of((None, None), (None, [1, 2]), ([1, 2], None)), 2).ids == [[], [], []]


def test_branches_of_one_prefix_have_their_own_numbers() -> None:
    found = block_ids(
        workload_of(
            ([1, 2, 3], None), ([1, 2, 4], None), ([1, 2, 3], None), ([1, 2, 4, 5], None), ([1], None)
        ),
        1,
    )
    a, b, c, d, e = found.ids
    assert a == c
    assert b == d
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert e == a[:1]
    assert found.num_ids == 4


def test_an_empty_workload_has_no_blocks() -> None:
    found = block_ids(Workload(), 16)
    assert (found.ids, found.num_ids, found.block_size) == ([], 0, 16)


few_tokens = st.lists(st.sampled_from([0, 1, 255, 256, 2**40]), min_size=1, max_size=12)
one_request = st.tuples(st.none() | few_tokens, st.none() | few_tokens)


@given(st.lists(one_request, max_size=12), st.integers(1, 5))
def test_identities_equal_those_of_the_twin(
    tokens: list[tuple[list[int] | None, list[int] | None]], block_size: int
) -> None:
    same_identities(workload_of(*tokens), block_size)


hashed = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 12), st.booleans())


@given(st.lists(hashed, max_size=12), st.integers(1, 5), st.sampled_from([1, 3, 4]))
def test_hashes_share_what_their_tokens_would(
    prompts: list[tuple[list[int], int, bool]], block_size: int, per_hash: int
) -> None:
    requests = []
    for index, (hashes, tokens, answers) in enumerate(prompts):
        request = Request(index, tokens, 3, 0, hashes=np.array(hashes), tokens_per_hash=per_hash)
        request.hashed_tokens = min(len(hashes) * per_hash, tokens + (3 if answers else 0))
        requests.append(request)
    same_identities(Workload(requests), block_size)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=20), st.integers(1, 7))
def test_identities_hold_for_prefixes_of_one_text(cuts: list[int], block_size: int) -> None:
    text = list(range(41))
    same_identities(workload_of(*((text[: cut + 1], None) for cut in cuts)), block_size)


@pytest.mark.parametrize("block_size", [16, 32])
def test_identities_of_a_recorded_workload_equal_those_of_the_twin(block_size: int) -> None:
    path = recorded_path("workloads", "sharegpt-llama-3.1-8b-300-sps10.jsonl.gz")
    workload = load_workload(path, num_reqs=60)
    same_identities(workload, block_size)


def test_prompts_of_different_adapters_share_nothing() -> None:
    same = list(range(40))
    workload = workload_of((same, None), (same, None), (same, None), (same, None))
    for request, lora in zip(workload, ("a", "b", "a", None), strict=True):
        request.lora = lora
    assert block_ids(workload, 16).ids == [[0, 1], [], [0, 1], []]
    workload.requests[2].cache_salt = "tenant"
    assert block_ids(workload, 16).ids == [[], [], [], []]


def test_prompts_of_different_salts_share_nothing() -> None:
    same = list(range(40))
    workload = workload_of((same, None), (same, None), (same, None), (same, None))
    for request, salt in zip(workload, ("a", "b", "a", None), strict=True):
        request.cache_salt = salt
    assert block_ids(workload, 16).ids == [[0, 1], [], [0, 1], []]
