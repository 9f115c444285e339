"""Traces of agents, in the form of the KV-cache tester: a conversation is one JSON object.

``{"id", "models", "block_size", "hash_id_scope": "local", "requests": [...]}``, where a request is ``{"t":
s, "type": "n" or "s", "model", "in", "out", "hash_ids", "api_time": s, "think_time": s}`` or a sub-agent
``{"t", "type": "subagent", "agent_id", "requests": [...]}`` with requests of its own. A file holds one
object, or one a line.

A conversation becomes a session whose requests follow each other after the recorded pause: from the end of
the request before (``t`` + ``api_time``) to its own ``t``. A sub-agent becomes a session of its own that
begins at its recorded time. So the conversation does not wait for its sub-agents, but for as long as it
waited in the recording. Conversations have no common clock: each begins at 0, and a request rate sets when
each begins.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from servesim.workload.bench_result import whole_document
from servesim.workload.entries import MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.mooncake import MAX_TOKENS_PER_HASH, json_object, set_hashes, time_ns
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.workload.formats import Loading

_S = 1_000_000_000
_CALLS = ("n", "s")


def load_agents(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The workload of such traces; a conversation with all its sub-agents is one entry."""
    first = next(lines)
    if first[1].strip() == b"{":
        document = whole_document(source, [first, *lines])
        items: Iterator[tuple[int, Any]] = iter([(1, document)])
    else:
        items = chain([first], lines)
    return collect(source, items, _Reader().requests, num_reqs=loading.num_reqs, lenient=loading.lenient)


class _Reader:
    """Turns conversations into requests; the hash ids of each are numbered anew, for they are its own."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._names: set[str] = set()

    def requests(self, item: bytes | dict[str, Any], index: int) -> list[Request]:
        """All requests of one conversation."""
        trace = json_object(item) if isinstance(item, bytes) else item
        name = trace.get("id")
        name = str(name) if isinstance(name, (str, int)) else f"agent-{index}"
        if name in self._names:
            raise EntryError(f"id: {name!r} was used by an earlier conversation; must differ")
        per_hash = whole_number(trace.get("block_size"), "block_size", 1, MAX_TOKENS_PER_HASH)
        entries = trace.get("requests")
        if not isinstance(entries, list) or not entries:
            raise EntryError("requests: must be a list of at least one request")
        common = trace.get("hash_id_scope") == "global"
        chains: list[tuple[str, list[dict[str, Any]]]] = [(name, [])]
        for number, entry in enumerate(entries):
            where = f"requests[{number}]"
            if not isinstance(entry, dict):
                raise EntryError(f"{where}: {shown(entry)} is not an object; must be a request")
            if entry.get("type") == "subagent":
                chains.append((f"{name}/{entry.get('agent_id', number)}#{number}", _calls_of(entry, where)))
            elif entry.get("type") in _CALLS:
                chains[0][1].append(entry)
            else:
                raise EntryError(f'{where}.type: {shown(entry.get("type"))} must be "n", "s" or "subagent"')
        made: list[Request] = []
        for session, calls in chains:
            scope = -1 if common else len(self._names)
            self._chain(made, index, session, calls, per_hash, scope)
        self._names.add(name)
        return made

    def _chain(
        self,
        made: list[Request],
        first: int,
        session: str,
        calls: list[dict[str, Any]],
        per_hash: int,
        scope: int,
    ) -> None:
        ended_s = begun_ns = 0.0
        for place, call in enumerate(sorted(calls, key=lambda call: _seconds(call, "t"))):
            start_s = _seconds(call, "t")
            request = Request(
                first + len(made),
                whole_number(call.get("in"), "in", 1, MAX_TOKENS),
                whole_number(call.get("out"), "out", 1, MAX_TOKENS),
                0,
                session_id=session,
                sub_request=place,
            )
            if place:
                request.predecessor = request.index - 1
                request.arrival_ns = int(begun_ns)
                request.tool_ns = time_ns(max(start_s - ended_s, 0.0), "t", "seconds", _S)
            else:
                begun_ns = request.arrival_ns = time_ns(start_s, "t", "seconds", _S)
            ended_s = start_s + _seconds(call, "api_time", 0.0)
            if call.get("hash_ids"):
                set_hashes(request, self._numbered(call["hash_ids"], scope), per_hash, answers=False)
            made.append(request)

    def _numbered(self, hash_ids: object, scope: int) -> object:
        if not isinstance(hash_ids, list) or not all(type(each) is int for each in hash_ids):
            return hash_ids  # told as what it is by who takes it
        numbers = self._numbers
        return [numbers.setdefault((scope, each), len(numbers)) for each in hash_ids]


def _calls_of(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The requests of a sub-agent, at times of the conversation: some recordings count from its beginning."""
    calls = entry.get("requests")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise EntryError(f"{where}.requests: must be a list of requests")
    begun = _seconds(entry, "t")
    return [
        call | {"t": begun + _seconds(call, "t")} if _seconds(call, "t") < begun else call for call in calls
    ]


def _seconds(entry: dict[str, Any], key: str, default: float | None = None) -> float:
    value = entry.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EntryError(f"{key}: {shown(value)} is not a number; must be seconds")
    return float(value)
