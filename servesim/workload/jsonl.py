"""JSON lines workloads: every line a request or a session.

A request line is ``{"input_toks", "output_toks", "arrival_time_ns"}`` with optional ``input_tok_ids``,
``output_tok_ids`` (or ``hash_ids`` and ``tokens_per_hash``), ``model``, ``priority``, ``max_tokens``,
``cache_salt``, ``lora`` and ``n``. A session line is ``{"arrival_time_ns", "sub_requests": [...]}`` with
optional ``session_id`` and ``model``, and each sub-request ``{"input_toks", "output_toks"}`` with optional
``tool_duration_ns`` and those of a request but ``n``.
Requests are numbered in file order, sub-requests in their place. A sub-request is released when its
predecessor has ended and the predecessor's ``tool_duration_ns`` has passed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

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
    from collections.abc import Iterable

    from servesim.workload.formats import Loading

_SHARED_KEYS = ("input_tok_ids", "output_tok_ids", "model", "priority", "max_tokens", "cache_salt", "lora")
_HASH_KEYS = ("hash_ids", "tokens_per_hash", "hashed_toks")
REQUEST_KEYS = ("input_toks", "output_toks", "arrival_time_ns", "n", *_SHARED_KEYS, *_HASH_KEYS)
SESSION_KEYS = ("session_id", "arrival_time_ns", "sub_requests", "model")
SUB_REQUEST_KEYS = ("input_toks", "output_toks", "tool_duration_ns", *_SHARED_KEYS, *_HASH_KEYS)
MAX_PRIORITY = 2**31 - 1
_OWN_ID = 1 << 61
"""From here on ids stand for the text of one prompt without ids."""
MAX_SEQUENCES = 1024
"""Most answers that one request may ask for."""

_request_keys = frozenset(REQUEST_KEYS)
_plain_keys = frozenset(REQUEST_KEYS[:3])
_session_keys = frozenset(SESSION_KEYS)
_sub_request_keys = frozenset(SUB_REQUEST_KEYS)


def load_jsonl(source: str, lines: Iterable[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload of numbered JSON lines; InputError names the line and the field that is wrong."""
    reader = EntryReader()
    workload = collect(source, lines, reader.requests, num_reqs=loading.num_reqs, lenient=loading.lenient)
    _name_sessions(workload, reader.session_ids)
    return workload


class EntryReader:
    """Turns lines into requests and remembers the session ids that were used."""

    __slots__ = ("session_ids",)

    def __init__(self) -> None:
        self.session_ids: set[str] = set()

    def requests(self, line: bytes, first: int) -> list[Request]:
        """The requests of one line, numbered from `first`; EntryError says what is wrong with it."""
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            entry = _salvage(line, error)
        if type(entry) is not dict:
            raise EntryError(f"{shown(entry)} is not an entry; must be a JSON object")
        if "sub_requests" in entry:
            return self._session(entry, first)
        if not entry.keys() <= _request_keys:
            if "session_id" in entry:
                raise EntryError(
                    "sub_requests: is missing; a line with session_id needs a list of sub_requests"
                )
            raise unknown_key(entry, REQUEST_KEYS)
        request = _request(entry, first, "", None)
        request.arrival_ns = whole_number(
            _required(entry, "arrival_time_ns"), "arrival_time_ns", 0, MAX_TIME_NS
        )
        return [request] if entry.get("n") is None else _sequences(request, entry["n"])

    def _session(self, entry: dict[str, Any], first: int) -> list[Request]:
        if not entry.keys() <= _session_keys:
            raise unknown_key(entry, SESSION_KEYS)
        arrival_ns = whole_number(_required(entry, "arrival_time_ns"), "arrival_time_ns", 0, MAX_TIME_NS)
        subs = entry["sub_requests"]
        if type(subs) is not list or not subs:
            found = "is empty" if subs == [] else f"{shown(subs)} is not a list"
            raise EntryError(f"sub_requests: {found}; must be a list of at least one sub-request")
        model = None if entry.get("model") is None else text(entry["model"], "model")
        # "": it gets its name when the whole file is read
        session_id = "" if entry.get("session_id") is None else session_name(entry["session_id"])
        if session_id and session_id in self.session_ids:
            raise EntryError(
                f"session_id: {session_id!r} was used on an earlier line; must differ for every session"
            )

        requests: list[Request] = []
        tool_ns = 0  # the tool that runs between the previous sub-request and this one
        for position, sub in enumerate(subs):
            where = f"sub_requests[{position}]."
            if type(sub) is not dict:
                raise EntryError(f"{where[:-1]}: {shown(sub)} is not an object; must be a sub-request")
            if not sub.keys() <= _sub_request_keys:
                raise unknown_key(sub, SUB_REQUEST_KEYS, where)
            request = _request(sub, first + position, where, model)
            request.arrival_ns = arrival_ns
            request.session_id = session_id
            request.sub_request = position
            if position:
                request.predecessor = first + position - 1
                request.tool_ns = tool_ns
            duration = sub.get("tool_duration_ns")
            tool_ns = (
                0 if duration is None else whole_number(duration, f"{where}tool_duration_ns", 0, MAX_TIME_NS)
            )
            requests.append(request)
        if session_id:  # only now: a line that was skipped uses up no name
            self.session_ids.add(session_id)
        return requests


def _request(entry: dict[str, Any], index: int, where: str, model: str | None) -> Request:
    """What requests and sub-requests have in common: lengths, ids, model; arrival_ns is left 0."""
    input_tokens = whole_number(_required(entry, "input_toks", where), f"{where}input_toks", 1, MAX_TOKENS)
    output_tokens = whole_number(_required(entry, "output_toks", where), f"{where}output_toks", 1, MAX_TOKENS)
    request = Request(index, input_tokens, output_tokens, 0, model=model)
    if entry.keys() <= _plain_keys:
        return request
    ids = entry.get("input_tok_ids")
    if ids is not None:
        request.input_ids = token_ids(ids, f"{where}input_tok_ids", input_tokens, "input_toks")
    ids = entry.get("output_tok_ids")
    if ids is not None:
        request.output_ids = token_ids(ids, f"{where}output_tok_ids", output_tokens, "output_toks")
    if entry.get("hash_ids") is not None:
        _set_hashes(request, entry, where)
    if entry.get("model") is not None:
        request.model = text(entry["model"], f"{where}model")
    if entry.get("max_tokens") is not None:
        request.max_tokens = whole_number(
            entry["max_tokens"], f"{where}max_tokens", output_tokens, MAX_TOKENS
        )
    if entry.get("cache_salt") is not None:
        request.cache_salt = text(entry["cache_salt"], f"{where}cache_salt")
    if entry.get("lora") is not None:
        request.lora = text(entry["lora"], f"{where}lora")
    if entry.get("priority") is not None:
        request.priority = whole_number(entry["priority"], f"{where}priority", -MAX_PRIORITY, MAX_PRIORITY)
    return request


def _sequences(request: Request, n: object) -> list[Request]:
    """``n`` requests in the place of one that asks for so many answers, as vLLM makes them.

    They have the prompt in common; of the answers only the first is known.
    """
    count = whole_number(n, "n", 1, MAX_SEQUENCES)
    if count > 1 and not request.has_ids:
        request.input_ids = np.full(request.input_tokens, _OWN_ID + request.index, dtype=np.int64)
    return [
        replace(request, index=request.index + number, output_ids=request.output_ids if not number else None)
        for number in range(count)
    ]


def _set_hashes(request: Request, entry: dict[str, Any], where: str) -> None:
    """Hash ids in place of token ids, ``tokens_per_hash`` each, for the first ``hashed_toks`` tokens."""
    from servesim.workload.mooncake import MAX_TOKENS_PER_HASH, set_hashes

    if request.input_ids is not None:
        raise EntryError(f"{where}hash_ids: stand in place of input_tok_ids; leave one of them out")
    per_hash = whole_number(
        _required(entry, "tokens_per_hash", where), f"{where}tokens_per_hash", 1, MAX_TOKENS_PER_HASH
    )
    set_hashes(request, entry["hash_ids"], per_hash, answers=True)
    if entry.get("hashed_toks") is not None:
        request.hashed_tokens = whole_number(
            entry["hashed_toks"], f"{where}hashed_toks", 1, request.hashed_tokens
        )


def _required(entry: dict[str, Any], key: str, where: str = "") -> object:
    try:
        return entry[key]
    except KeyError:
        raise EntryError(f"{where}{key}: is missing; must be an integer") from None


def _name_sessions(workload: Workload, taken: set[str]) -> None:
    """Call a session without an id ``session-<index of its first request>``, or the next such free name."""
    name = ""
    for request in workload.requests:
        if request.session_id != "":
            continue
        if request.sub_request == 0:
            name = f"session-{request.index}"
            while name in taken:
                name += "-"
            taken.add(name)
        request.session_id = name


def _salvage(line: bytes, error: orjson.JSONDecodeError) -> object:
    """What the line would mean if NaN, Infinity and huge integers were allowed, so that the field can be
    named.

    Raises EntryError with the place in the line when it is no JSON even then.
    """
    try:
        words = line.decode()
    except UnicodeDecodeError as wrong:
        raise EntryError(
            f"column {wrong.start + 1}: byte 0x{line[wrong.start]:02x} is not UTF-8; must be JSON in UTF-8"
        ) from None
    try:
        return json.loads(words)
    except (ValueError, RecursionError):
        raise EntryError(f"column {error.pos + 1}: {error.msg}; must be a whole JSON object") from None
