"""Mooncake traces: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

A hash id names 512 prompt tokens together with everything before them, so that equal ids mean an equal
prefix. The token ids themselves were not published; any that are equal exactly where the hash ids are will
do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import orjson

from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import (
    MAX_TIME_NS,
    MAX_TOKENS,
    EntryError,
    collect,
    shown,
    token_ids,
    unknown_key,
    whole_number,
)
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

TOKENS_PER_HASH = 512
MAX_HASH_ID = 2**52
KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


def load_mooncake(
    source: str, lines: Iterable[tuple[int, bytes]], *, num_reqs: int = 0, lenient: bool = False
) -> Workload:
    """The workload of a Mooncake trace; its earliest request arrives at 0."""
    workload = collect(source, lines, _requests, num_reqs=num_reqs, lenient=lenient)
    start_at_zero(workload)
    return workload


def _requests(line: bytes, index: int) -> list[Request]:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise EntryError(f"column {error.pos + 1}: {error.msg}; must be a whole JSON object") from None
    if type(entry) is not dict:
        raise EntryError(f"{shown(entry)} is not an entry; must be a JSON object")
    if not entry.keys() <= set(KEYS):
        raise unknown_key(entry, KEYS)
    input_tokens = whole_number(entry.get("input_length"), "input_length", 1, MAX_TOKENS)
    output_tokens = whole_number(entry.get("output_length"), "output_length", 1, MAX_TOKENS)
    request = Request(index, input_tokens, output_tokens, _arrival_ns(entry.get("timestamp")))
    if entry.get("hash_ids"):
        request.input_ids = _synthesised_ids(entry["hash_ids"], input_tokens, index)
    return [request]


def _arrival_ns(timestamp: object) -> int:
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)):
        raise EntryError(f"timestamp: {shown(timestamp)} is not a number; must be milliseconds >= 0")
    if not 0 <= timestamp <= MAX_TIME_NS / 1e6:
        raise EntryError(f"timestamp: {shown(timestamp)} is not possible; must be milliseconds >= 0")
    return round(timestamp * 1_000_000)


def _synthesised_ids(hash_ids: object, input_tokens: int, index: int) -> NDArray[np.int64]:
    """Token ids, shape (input_tokens,): 512 of their own for every hash id.

    Tokens that no hash id covers get an id that no other request has.
    """
    most = -(-input_tokens // TOKENS_PER_HASH)
    count = len(hash_ids) if isinstance(hash_ids, list) else 0
    hashes = token_ids(hash_ids, "hash_ids", count, "hash_ids")
    if count > most:
        raise EntryError(
            f"hash_ids: has {count} ids but input_length is {input_tokens}; must have at most {most}"
        )
    if int(hashes.max()) > MAX_HASH_ID:
        raise EntryError(f"hash_ids: {hashes.max()} is too large; must be <= {MAX_HASH_ID}")
    ids = (hashes[:, None] * TOKENS_PER_HASH + np.arange(TOKENS_PER_HASH)).ravel()[:input_tokens]
    uncovered = input_tokens - len(ids)
    if uncovered:
        ids = np.concatenate((ids, np.full(uncovered, 2**62 + index, dtype=np.int64)))
    return ids
