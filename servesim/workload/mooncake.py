"""Traces of lengths and hash ids, JSON lines: ``input_length``, ``output_length``, ``hash_ids`` and a time.

Three published forms:

- Mooncake: ``timestamp`` in ms, a hash id for 512 tokens;
- its form for sessions, which benchmark clients replay: ``session_id``, where the first line of a session
  has a ``timestamp`` and later ones the ``delay`` in ms after the answer to the one before (0 if not given);
- the traces of a cloud (Qwen-Bailian): ``timestamp`` in s, a hash id for 16 tokens, and ``chat_id``,
  ``parent_chat_id``, ``type``, ``turn`` that are not used, for every line has its own time.

A hash id names its tokens together with everything before them, so that equal ids mean an equal prefix. The
token ids themselves were not published, and are not made up: the hash ids are kept as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import (
    MAX_TIME_NS,
    MAX_TOKENS,
    EntryError,
    collect,
    session_name,
    shown,
    text,
    token_ids,
    unknown_key,
    whole_number,
)
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.workload.formats import Loading

TOKENS_PER_HASH = 512
TOKENS_PER_CHAT_HASH = 16
MAX_HASH_ID = 2**52
MAX_TOKENS_PER_HASH = 2**16
_CHAT_KEYS = ("chat_id", "parent_chat_id", "type", "turn")
ALIASES = {
    "input_tokens": "input_length",
    "isl": "input_length",
    "output_tokens": "output_length",
    "osl": "output_length",
    "created_time": "timestamp",
    "delay_ms": "delay",
}
"""Other names that clients take for the same keys."""
KEYS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay", "model", *_CHAT_KEYS)
_OWN_ID = 2**62  # token ids from here on are made up, see `hashes`
_MS, _S = 1_000_000, 1_000_000_000


def load_mooncake(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload of such a trace; its earliest request arrives at 0.

    The turns of a session may stand anywhere behind its first; they are put beside it, and a session is one
    entry for `loading.num_reqs`.
    """
    return load_with_sessions(source, lines, HashReader(), loading)


def load_with_sessions(
    source: str, lines: Iterator[tuple[int, bytes]], reader: HashReader, loading: Loading
) -> Workload:
    """The workload of a reader that links the turns of sessions, wherever they stand in the file."""
    workload = collect(source, lines, reader.requests, num_reqs=loading.num_reqs, lenient=loading.lenient)
    if loading.num_reqs and reader.sessions:  # the turns behind the last entry that is taken
        later = (item for item in lines if reader.is_later_turn(item[1]))
        workload = collect(source, later, reader.requests, lenient=loading.lenient, onto=workload)
    bring_together(workload)
    start_at_zero(workload)
    return workload


class HashReader:
    """Turns lines into requests, and remembers the last request of every session."""

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
            if entry.get("delay") is None and entry.get("timestamp") is not None:
                raise EntryError(
                    f"delay: is missing; a later turn of session {session!r} has milliseconds after the "
                    "answer to the turn before, and no time of its own; without session_id every line keeps "
                    "its timestamp"
                )
            request.predecessor = before
            request.tool_ns = time_ns(entry.get("delay", 0), "delay", "milliseconds", _MS)
        elif chat:
            request.arrival_ns = time_ns(entry.get("timestamp"), "timestamp", "seconds", _S)
        else:
            request.arrival_ns = time_ns(entry.get("timestamp"), "timestamp", "milliseconds", _MS)
        if entry.get("model") is not None:
            request.model = text(entry["model"], "model")
        if entry.get("hash_ids"):
            per_hash = TOKENS_PER_CHAT_HASH if chat else TOKENS_PER_HASH
            set_hashes(request, entry["hash_ids"], per_hash, answers=chat)
        if session is not None:  # only now: a line that is left out is no turn
            self.sessions[session] = index
        return [request]

    def is_later_turn(self, line: bytes) -> bool:
        """Whether a line is of a session that has begun."""
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            return False
        name = entry.get("session_id") if isinstance(entry, dict) else None
        return isinstance(name, str | int) and str(name) in self.sessions


def _entry(line: bytes) -> dict[str, Any]:
    entry = json_object(line)
    if not entry.keys() <= set(KEYS):
        entry = {ALIASES.get(key, key): value for key, value in entry.items()}
    if not entry.keys() <= set(KEYS):
        raise unknown_key(entry, KEYS)
    return entry


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; EntryError where it is none."""
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise EntryError(f"column {error.pos + 1}: {error.msg}; must be a whole JSON object") from None
    if type(entry) is not dict:
        raise EntryError(f"{shown(entry)} is not an entry; must be a JSON object")
    return entry


def bring_together(workload: Workload) -> None:
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


def time_ns(value: object, field: str, unit: str, unit_ns: int) -> int:
    """A time >= 0 in ns; EntryError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EntryError(f"{field}: {shown(value)} is not a number; must be {unit} >= 0")
    if not 0 <= value <= MAX_TIME_NS / unit_ns:
        raise EntryError(f"{field}: {shown(value)} is not possible; must be {unit} >= 0")
    return round(value * unit_ns)


def set_hashes(request: Request, hash_ids: object, per_hash: int, *, answers: bool) -> None:
    """Give `request` its hash ids, each for `per_hash` tokens; EntryError where they cannot be its.

    `answers`: where the last hash id reaches beyond the prompt, it names the beginning of the answer too: a
    later prompt that has it repeats both.
    """
    if hash_ids == []:
        return
    covered = request.input_tokens + (request.output_tokens if answers else 0)
    most = -(-covered // per_hash)
    count = len(hash_ids) if isinstance(hash_ids, list) else 0
    hashes = token_ids(hash_ids, "hash_ids", count, "hash_ids")
    if count > most:
        raise EntryError(
            f"hash_ids: has {count} ids for {covered} tokens, {per_hash} to an id; must have at most {most}"
        )
    highest = min(MAX_HASH_ID, _OWN_ID // (per_hash + 1) - 1)
    if int(hashes.max()) > highest:
        raise EntryError(f"hash_ids: {hashes.max()} is too large; must be <= {highest}")
    request.hashes = np.array(hashes)  # a copy in one object: the ids of a million requests must fit
    request.tokens_per_hash = per_hash
    request.hashed_tokens = min(count * per_hash, covered)
