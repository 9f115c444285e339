"""CUDA-graph padding: small steps run as the next larger captured batch size.

vLLM captures its graphs at 1, 2, 4, then every 8 tokens to 256 and every 16 to 512, but no larger than twice
``max_num_seqs`` or than ``max_num_batched_tokens``, and pads a step up to one of them; steps beyond the
largest run at their own size (vLLM 0.24, ``VllmConfig._set_cudagraph_sizes``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_GRAPH = 512
"""Largest captured size of an engine whose limits allow it."""


def capture_limit(max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Tokens of the largest step that runs as a captured graph."""
    return min(2 * max_num_seqs, max_num_batched_tokens, LARGEST_GRAPH)


def padded_tokens(tokens: NDArray[np.int64], limit: int = LARGEST_GRAPH) -> NDArray[np.int64]:
    """Tokens that dense layers compute for steps of ``tokens`` scheduled tokens, element by element.

    ``limit`` is the engine's :func:`capture_limit`.
    """
    sizes = capture_sizes(limit)
    slots = np.searchsorted(sizes, np.minimum(tokens, sizes[-1]))
    return np.where(tokens <= sizes[-1], sizes[slots], tokens)


@lru_cache(maxsize=64)
def capture_sizes(limit: int) -> NDArray[np.int64]:
    """Sizes of the captured graphs, rising."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, LARGEST_GRAPH + 1, 16)]
    return np.array([size for size in sizes if size <= limit], dtype=np.int64)
