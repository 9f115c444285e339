"""Which KV blocks of a workload hold the same tokens after the same past: the identities of the prefix cache.

An engine such as vLLM names a full block by a hash chained over the hash of the block before it and the
block's token ids, prompt and generated tokens alike, with the request's salt and LoRA adapter. Two blocks are
the same block exactly when these and the whole token sequences up to their ends are equal. So nothing needs
to be hashed here: sorting the token sequences puts those with a common beginning next to each other, and
comparing neighbours finds how many leading blocks they share. The identity is exact, and the cost is a sort
and one array comparison a request.

Traces publish hashes in place of tokens. They are compared as they are: a hash stands for tokens that no
other hash has, so sequences of hashes begin alike for as many tokens as those they stand for.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from servesim.workload.request import Request, Workload

_OWN_ID = 2**62
"""From here on, tokens that no hash covers: each request has its own."""


@dataclass(slots=True)
class BlockIds:
    """Identities of the blocks that requests have in common, the numbers 0 … num_ids - 1.

    Equal numbers mean the same block. They are kept as the few ranges that they are: a request with a long
    prefix has thousands of blocks.
    """

    runs: list[tuple[range, ...]]
    num_ids: int
    block_size: int

    def of(self, index: int) -> list[int]:
        """The blocks of request `index`: entry k stands for its k-th block, for as long as at least one other
        request has the same block; the blocks after that are the request's own."""
        runs = self.runs[index]
        return list(chain.from_iterable(runs)) if runs else []

    @property
    def ids(self) -> list[list[int]]:
        """`of` every request."""
        return [self.of(index) for index in range(len(self.runs))]


def block_ids(workload: Workload, block_size: int, lookahead: int = 0) -> BlockIds:
    """The shared blocks of every request, of `block_size` tokens each.

    `lookahead`: tokens behind a block that have to be known and equal as well.

    A block counts when it is full and all its tokens are known: prompt and output where the output ids are
    given, else the prompt alone. A request without prompt ids has none.
    """
    runs: list[tuple[range, ...]] = [()] * len(workload.requests)
    num_ids = 0
    for group in _same_first_block(workload.special, block_size):
        num_ids = _number_group(group, (block_size, lookahead), runs, num_ids)
    return BlockIds(runs, num_ids, block_size)


def prompt_ids(request: Request) -> NDArray[np.int64] | None:
    """Token ids of the prompt, shape (input_tokens,), made up where hashes stand for them; None: unknown.

    What no hash covers gets an id that no other request has.
    """
    if request.hashes is None:
        return request.input_ids
    return _filled(_covered(request)[: request.input_tokens], request.input_tokens, request.index)


def answer_ids(request: Request) -> NDArray[np.int64] | None:
    """Token ids of the answer, shape (output_tokens,); see `prompt_ids`. None: unknown."""
    if request.hashes is None:
        return request.output_ids
    answered = _covered(request)[request.input_tokens :][: request.output_tokens]
    return _filled(answered, request.output_tokens, request.index) if len(answered) else None


def _covered(request: Request) -> NDArray[np.int64]:
    assert request.hashes is not None
    per_hash = request.tokens_per_hash
    ids: NDArray[np.int64] = (request.hashes[:, None] * per_hash + np.arange(per_hash)).ravel()
    return ids[: request.hashed_tokens]


def _filled(ids: NDArray[np.int64], tokens: int, index: int) -> NDArray[np.int64]:
    missing = tokens - len(ids)
    return np.concatenate((ids, np.full(missing, _OWN_ID + index, dtype=np.int64))) if missing else ids


def _same_first_block(requests: Sequence[Request], block_size: int) -> Iterator[list[Request]]:
    """Groups of two or more requests that begin with the same full block; the others share nothing.

    With hashes, a group begins with the same hash.
    """
    groups: dict[tuple[str | None, str | None, bytes | tuple[int, int]], list[Request]] = {}
    for request in requests:
        if request.hashes is not None:
            first = request.tokens_per_hash, int(request.hashes[0])
            groups.setdefault((request.cache_salt, request.lora, first), []).append(request)
            continue
        if request.input_ids is None:
            continue
        head = request.input_ids[:block_size]
        if len(head) < block_size:
            head = _known_tokens(request)[:block_size]
        if len(head) == block_size:
            groups.setdefault((request.cache_salt, request.lora, head.tobytes()), []).append(request)
    return (group for group in groups.values() if len(group) > 1)


def _known_tokens(request: Request) -> NDArray[np.int64]:
    """Token ids of the prompt and, where they are known, of the output."""
    assert request.input_ids is not None
    if request.output_ids is None:
        return request.input_ids
    return np.concatenate((request.input_ids, request.output_ids))


def _known_hashes(request: Request) -> NDArray[np.int64]:
    """The hashes that cover tokens, each times (tokens_per_hash + 1) plus the tokens that it covers.

    So the hash at the end of a short prompt is another symbol than the same hash in full, and sorts before
    it, as the shorter of two sequences does.
    """
    assert request.hashes is not None
    per_hash = request.tokens_per_hash
    tokens = request.hashed_tokens
    symbols = request.hashes[: -(-tokens // per_hash)] * (per_hash + 1) + per_hash
    symbols[-1] -= len(symbols) * per_hash - tokens
    return symbols


def _number_group(
    group: list[Request], size: tuple[int, int], runs: list[tuple[range, ...]], num_ids: int
) -> int:
    """Fill `runs` for the requests of one group with numbers from `num_ids` on; returns the next free number.

    In sorted order a request's longest match among all before it is with the one just before it. So it takes
    over that one's numbers for the blocks the two have in common, and blocks it shares only with later ones
    get new numbers.
    """
    block_size, lookahead = size
    per_hash = group[0].tokens_per_hash
    if group[0].hashes is None:
        # any total order of the bytes will do, as long as equal beginnings come to lie together
        keys = sorted((_known_tokens(request).tobytes(), request.index) for request in group)
        dtype = np.dtype(np.int64)
    else:  # here short ends must come to lie before what they are the beginning of
        dtype = np.dtype(">i8")
        keys = sorted((_known_hashes(request).astype(dtype).tobytes(), request.index) for request in group)
    common = [0]
    for (a, _), (b, _) in pairwise(keys):
        one, other = np.frombuffer(a, dtype=dtype), np.frombuffer(b, dtype=dtype)
        tokens = _common_tokens(one, other, per_hash) if per_hash else _common_length(one, other)
        common.append(max(tokens - lookahead, 0) // block_size)
    common.append(0)
    before: tuple[range, ...] = ()
    for place, (_, index) in enumerate(keys):
        with_previous, with_next = common[place], common[place + 1]
        new = max(with_next - with_previous, 0)
        before = _first(before, with_previous)
        if new:
            before = (*before, range(num_ids, num_ids + new))
        num_ids += new
        runs[index] = before
    return num_ids


def _first(runs: tuple[range, ...], count: int) -> tuple[range, ...]:
    """The first `count` numbers of some ranges, again as ranges."""
    taken = []
    for run in runs:
        if count <= 0:
            break
        taken.append(run[:count])
        count -= len(run)
    return runs if len(taken) == len(runs) and count >= 0 else tuple(taken)


def _common_length(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Entries at the beginning of both sequences that are equal."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _common_tokens(a: NDArray[np.int64], b: NDArray[np.int64], per_hash: int) -> int:
    """Tokens at the beginning of both sequences of `_known_hashes` that are equal."""
    whole = _common_length(a, b)
    tokens = whole * per_hash
    if whole and len(a) == len(b) == whole:
        return tokens - per_hash + int(a[-1]) % (per_hash + 1)
    if whole < min(len(a), len(b)):
        (hash_a, in_a), (hash_b, in_b) = (divmod(int(each[whole]), per_hash + 1) for each in (a, b))
        tokens += min(in_a, in_b) if hash_a == hash_b else 0
    return tokens
