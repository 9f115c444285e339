from __future__ import annotations

import numpy as np

from serving.latency.cudagraph import padded_tokens


def test_small_steps_run_as_the_next_captured_size() -> None:
    tokens = np.array([1, 2, 3, 5, 8, 9, 249, 256, 257, 273, 497, 512, 513, 1000])
    assert padded_tokens(tokens).tolist() == [1, 2, 4, 8, 8, 16, 256, 256, 272, 288, 512, 512, 513, 1000]


def test_padding_never_takes_tokens_away_nor_more_than_sixteen() -> None:
    tokens = np.arange(1, 1025)
    added = padded_tokens(tokens) - tokens
    assert added.min() == 0
    assert added.max() == 15
    assert (added[512:] == 0).all()
