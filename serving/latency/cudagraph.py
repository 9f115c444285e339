"""CUDA-graph padding: small steps run as the next larger captured batch size.

vLLM captures its decode graphs at 1, 2, 4, then every 8 tokens to 256 and every 16 to 512, and pads a step of
at most 512 tokens up to one of them; larger steps run at their own size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CAPTURE_SIZES = np.array([1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)], dtype=np.int64)


def padded_tokens(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens that dense layers compute for steps of ``tokens`` scheduled tokens, element by element."""
    slots = np.searchsorted(CAPTURE_SIZES, np.minimum(tokens, CAPTURE_SIZES[-1]))
    return np.where(tokens <= CAPTURE_SIZES[-1], CAPTURE_SIZES[slots], tokens)
