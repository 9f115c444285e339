"""Traces of lengths and hash ids, JSON lines: ``input_length``, ``output_length``, ``hash_ids`` and a time.

Three published forms:

- Mooncake: ``timestamp`` in ms, a hash id for 512 tokens;
- its form for sessions, which benchmark clients replay: ``session_id``, where the first line of a session has
  a ``timestamp`` and every later one the ``delay`` in ms after the answer to the one before;
- the traces of a cloud: ``timestamp`` in s, a hash id for 16 tokens, and ``chat_id``, ``parent_chat_id``,
  ``type``, ``turn`` that are not used, for every line has its own time.

A hash id names its tokens together with everything before them, so that equal ids mean an equal prefix. The
token ids themselves were not published; any that are equal exactly where the hash ids are will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import (
    MAX_MADE_IDS,
    MAX_TIME_NS,
    MAX_TOKENS,
    EntryError,
    collect,
    session_name,
    shown,
    token_ids,
    unknown_key,
    whole_number,
)
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TOKENS_PER_HASH = 512
TOKENS_PER_CHAT_HASH = 16
MAX_HASH_ID = 2**52
_CHAT_KEYS = ("chat_id", "parent_chat_id", "type", "turn")
KEYS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay", *_CHAT_KEYS)
_MS, _S = 1_000_000, 1_000_000_000


def load_mooncake(
    source: str, lines: Iterator[tuple[int, bytes]], *, num_reqs: int = 0, lenient: bool = False
) -> Workload:
    """The workload of such a trace; its earliest request arrives at 0.

    The turns of a session may stand anywhere behind its first; they are put beside it, and a session is one
    entry for `num_reqs`.
    """
    reader = _Reader()
    workload = collect(source, lines, reader.requests, num_reqs=num_reqs, lenient=lenient)
    if num_reqs and reader.sessions:  # the turns behind the last entry that is taken
        later = (item for item in lines if _is_turn_of(item[1], reader.sessions))
        workload = collect(source, later, reader.requests, lenient=lenient, onto=workload)
    _bring_together(workload)
    start_at_zero(workload)
    return workload


class _Reader:
    """Turns lines into requests, and remembers the last request of every session."""

    __slots__ = ("sessions",)

    def __init__(self) -> None:
        self.sessions: dict[str, int] = {}

    def requests(self, line: bytes, index: int) -> list[Request]:
        """The request of one line, as number `index`."""
        entry = _entry(line)
        chat = any(key in entry for key in _CHAT_KEYS)
        session = None if entry.get("session_id") is None else session_name(entry["session_id"])
        input_tokens = whole_number(entry.get("input_length"), "input_length", 1, MAX_TOKENS)
        output_tokens = whole_number(entry.get("output_length"), "output_length", 1, MAX_TOKENS)
        request = Request(index, input_tokens, output_tokens, 0, session_id=session)
        before = -1 if session is None else self.sessions.get(session, -1)
        if before >= 0:
            if entry.get("delay") is None:
                raise EntryError(
                    f"delay: is missing; a later turn of session {session!r} needs the milliseconds after "
                    "the answer to the turn before"
                )
            request.predecessor = before
            request.tool_ns = _time_ns(entry["delay"], "delay", "milliseconds", _MS)
        elif chat:
            request.arrival_ns = _time_ns(entry.get("timestamp"), "timestamp", "seconds", _S)
        else:
            request.arrival_ns = _time_ns(entry.get("timestamp"), "timestamp", "milliseconds", _MS)
        if entry.get("hash_ids"):
            _set_ids(request, entry["hash_ids"], TOKENS_PER_CHAT_HASH if chat else TOKENS_PER_HASH)
        if session is not None:  # only now: a line that is left out is no turn
            self.sessions[session] = index
        return [request]


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise EntryError(f"column {error.pos + 1}: {error.msg}; must be a whole JSON object") from None
    if type(entry) is not dict:
        raise EntryError(f"{shown(entry)} is not an entry; must be a JSON object")
    if not entry.keys() <= set(KEYS):
        raise unknown_key(entry, KEYS)
    return entry


def _is_turn_of(line: bytes, sessions: dict[str, int]) -> bool:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    name = entry.get("session_id") if isinstance(entry, dict) else None
    return isinstance(name, str | int) and str(name) in sessions


def _bring_together(workload: Workload) -> None:
    """Put the turns of a session behind its first, and number the requests again."""
    requests = workload.requests
    if all(request.session_id is None for request in requests):
        return
    turns: dict[int, list[Request]] = {}
    head: list[int] = []
    for request in requests:  # a predecessor stands before its successor
        head.append(request.index if request.predecessor < 0 else head[request.predecessor])
        turns.setdefault(head[-1], []).append(request)
    requests[:] = [request for group in turns.values() for request in group]
    for index, request in enumerate(requests):
        if request.predecessor >= 0:
            before = requests[index - 1]
            request.predecessor, request.sub_request = index - 1, before.sub_request + 1
            request.arrival_ns = before.arrival_ns
        request.index = index


def _time_ns(value: object, field: str, unit: str, unit_ns: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EntryError(f"{field}: {shown(value)} is not a number; must be {unit} >= 0")
    if not 0 <= value <= MAX_TIME_NS / unit_ns:
        raise EntryError(f"{field}: {shown(value)} is not possible; must be {unit} >= 0")
    return round(value * unit_ns)


def _set_ids(request: Request, hash_ids: object, per_hash: int) -> None:
    """Token ids for the prompt: `per_hash` of their own for every hash id.

    Tokens that no hash id covers get an id that no other request has. Where the last short hash id reaches
    beyond the prompt, it names the beginning of the answer too: a later prompt that has it repeats both.
    """
    input_tokens, index = request.input_tokens, request.index
    most = -(-input_tokens // per_hash)
    count = len(hash_ids) if isinstance(hash_ids, list) else 0
    hashes = token_ids(hash_ids, "hash_ids", count, "hash_ids")
    if count > most:
        raise EntryError(
            f"hash_ids: has {count} ids but input_length is {input_tokens}; must have at most {most}"
        )
    if int(hashes.max()) > MAX_HASH_ID:
        raise EntryError(f"hash_ids: {hashes.max()} is too large; must be <= {MAX_HASH_ID}")
    if input_tokens > MAX_MADE_IDS:
        raise EntryError(
            f"input_length: {input_tokens} is too large for a prompt with hash_ids; must be <= {MAX_MADE_IDS}"
        )
    own_id = 2**62 + index
    covered = (hashes[:, None] * per_hash + np.arange(per_hash)).ravel()
    request.input_ids = _filled(covered[:input_tokens], input_tokens, own_id)
    answered = covered[input_tokens : input_tokens + request.output_tokens]
    if per_hash == TOKENS_PER_CHAT_HASH and len(answered) and request.output_tokens <= MAX_MADE_IDS:
        request.output_ids = _filled(answered, request.output_tokens, own_id)


def _filled(ids: NDArray[np.int64], tokens: int, own_id: int) -> NDArray[np.int64]:
    """`ids` made `tokens` long with an id that no other request has."""
    missing = tokens - len(ids)
    return np.concatenate((ids, np.full(missing, own_id, dtype=np.int64))) if missing else ids
