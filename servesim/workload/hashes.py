"""Which KV blocks of a workload hold the same tokens after the same past: the identities of the prefix cache.

An engine such as vLLM names a full block by a hash chained over the hash of the block before it and the
block's token ids, prompt and generated tokens alike. Two blocks are the same block exactly when the whole
token sequences up to their ends are equal. So nothing needs to be hashed here: sorting the token sequences
puts those with a common beginning next to each other, and comparing neighbours finds how many leading blocks
they share. The identity is exact, and the cost is a sort and one array comparison a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.workload.request import Request, Workload


@dataclass(slots=True)
class BlockIds:
    """Identities of the blocks that requests have in common.

    `ids[i]` belongs to request i: entry k stands for its k-th block, for as long as at least one other
    request has the same block; the blocks after that are the request's own. Equal numbers mean the same
    block. The numbers are 0 … num_ids - 1.
    """

    ids: list[list[int]]
    num_ids: int
    block_size: int


def block_ids(workload: Workload, block_size: int) -> BlockIds:
    """The shared blocks of every request, of `block_size` tokens each.

    A block counts when it is full and all its tokens are known: prompt and output where the output ids are
    given, else the prompt alone. A request without prompt ids has none.
    """
    ids: list[list[int]] = [[] for _ in workload.requests]
    num_ids = 0
    for group in _same_first_block(workload.requests, block_size):
        num_ids = _number_group(group, block_size, ids, num_ids)
    return BlockIds(ids, num_ids, block_size)


def _same_first_block(requests: list[Request], block_size: int) -> Iterator[list[Request]]:
    """Groups of two or more requests that begin with the same full block; the others share nothing."""
    groups: dict[bytes, list[Request]] = {}
    for request in requests:
        if request.input_ids is None:
            continue
        head = request.input_ids[:block_size]
        if len(head) < block_size:
            head = _known_tokens(request)[:block_size]
        if len(head) == block_size:
            groups.setdefault(head.tobytes(), []).append(request)
    return (group for group in groups.values() if len(group) > 1)


def _known_tokens(request: Request) -> NDArray[np.int64]:
    """Token ids of the prompt and, where they are known, of the output."""
    assert request.input_ids is not None
    if request.output_ids is None:
        return request.input_ids
    return np.concatenate((request.input_ids, request.output_ids))


def _number_group(group: list[Request], block_size: int, ids: list[list[int]], num_ids: int) -> int:
    """Fill `ids` for the requests of one group with numbers from `num_ids` on; returns the next free number.

    In sorted order a request's longest match among all before it is with the one just before it. So it takes
    over that one's numbers for the blocks the two have in common, and blocks it shares only with later ones
    get new numbers.
    """
    # any total order of the bytes will do, as long as equal beginnings come to lie together
    tokens = sorted(
        ((_known_tokens(request).tobytes(), request.index) for request in group),
    )
    arrays = [np.frombuffer(raw, dtype=np.int64) for raw, _ in tokens]
    common = [0, *(_common_blocks(a, b, block_size) for a, b in pairwise(arrays)), 0]
    before: list[int] = []
    for place, (_, index) in enumerate(tokens):
        with_previous, with_next = common[place], common[place + 1]
        new = max(with_next - with_previous, 0)
        before = before[:with_previous] + list(range(num_ids, num_ids + new))
        num_ids += new
        ids[index] = before
    return num_ids


def _common_blocks(a: NDArray[np.int64], b: NDArray[np.int64], block_size: int) -> int:
    """Full blocks at the beginning of both sequences that are equal."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return (first if length and differ[first] else length) // block_size
