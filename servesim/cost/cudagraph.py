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


def capture_limit(max_num_seqs: int, max_num_batched_tokens: int, per_request: int = 1) -> int:
    """Tokens of the largest step that runs as a captured graph; ``per_request``: those of a decode."""
    return min(2 * max_num_seqs * per_request, max_num_batched_tokens, LARGEST_GRAPH)


def padded_tokens(
    tokens: NDArray[np.int64], limit: int = LARGEST_GRAPH, per_request: int = 1
) -> NDArray[np.int64]:
    """Tokens that dense layers compute for steps of ``tokens`` scheduled tokens, element by element.

    ``limit`` is the engine's :func:`capture_limit`, ``per_request`` the tokens of a decode.
    """
    sizes = capture_sizes(limit, per_request)
    slots = np.searchsorted(sizes, np.minimum(tokens, sizes[-1]))
    return np.where(tokens <= sizes[-1], sizes[slots], tokens)


@lru_cache(maxsize=64)
def capture_sizes(limit: int, per_request: int = 1) -> NDArray[np.int64]:
    """Sizes of the captured graphs, rising.

    With speculative decoding each is rounded up to whole requests, ``per_request`` tokens each (vLLM 0.24,
    ``adjust_cudagraph_sizes_for_spec_decode``).
    """
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, LARGEST_GRAPH + 1, 16)]
    if per_request > 1:
        sizes = sorted({-(-size // per_request) * per_request for size in sizes})
        limit = max(limit, per_request)
    return np.array([size for size in sizes if size <= limit], dtype=np.int64)
