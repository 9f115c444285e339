from __future__ import annotations

import numpy as np

from servesim.cost.cudagraph import capture_limit, padded_tokens


def test_small_steps_run_as_the_next_captured_size() -> None:
    tokens = np.array([1, 2, 3, 5, 8, 9, 249, 256, 257, 273, 497, 512, 513, 1000])
    assert padded_tokens(tokens).tolist() == [1, 2, 4, 8, 8, 16, 256, 256, 272, 288, 512, 512, 513, 1000]


def test_padding_never_takes_tokens_away_nor_more_than_sixteen() -> None:
    tokens = np.arange(1, 1025)
    added = padded_tokens(tokens) - tokens
    assert added.min() == 0
    assert added.max() == 15
    assert (added[512:] == 0).all()


def test_few_sequences_leave_large_steps_uncaptured() -> None:
    assert capture_limit(128, 2048) == 256
    assert capture_limit(256, 2048) == 512
    assert capture_limit(2**31 - 1, 8192) == 512
    assert capture_limit(128, 100) == 100
    tokens = np.array([5, 250, 256, 257, 400])
    assert padded_tokens(tokens, capture_limit(128, 2048)).tolist() == [8, 256, 256, 257, 400]


def test_one_sequence_captures_one_and_two_tokens() -> None:
    assert padded_tokens(np.array([1, 2, 3, 4]), capture_limit(1, 2048)).tolist() == [1, 2, 3, 4]
