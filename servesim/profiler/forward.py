"""Reading what ``vllm bench forward --output-json`` writes: whole steps of exact batches, under CUDA graphs.

The file (vLLM 0.33, ``vllm/benchmarks/forward/main.py``) is a list with one object a case: ``case`` (its
name), ``requests`` (``query_len``, ``kv_len`` with the query, ``num_draft_tokens``, ``chunked``, as they were
drawn), ``median_us`` (of the slowest rank), and ``ranks``, what each process found. Timed is the forward of
the model alone: no output logits, no sampling, no host. The file names no model, no GPU and no version.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.cost.batch_shape import Shape
from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST = 1 << 31
_EQUAL = 0.01
"""Share by which the contexts of decodes may differ and count as equal: a table row has one."""
UNSTEADY_PERCENT = 2.0
"""Spread of a case's sample medians from which on it is told; vLLM warns from 0.5 on."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One case: a batch and how long the model's forward took."""

    name: str
    where: str
    """File and place in it, for messages."""
    us: float
    chunks: tuple[tuple[int, int], ...]
    """(tokens, tokens in the cache before) of every prompt or chunk."""
    contexts: tuple[int, ...]
    """Tokens in the cache before the step, of every decode."""
    ranks: int
    """Processes that took part."""
    spread_percent: float
    """Between the medians of its samples."""
    routing: str = ""
    """How tokens chose experts; ``real`` or ``balanced``."""

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(tokens for tokens, _ in self.chunks) + len(self.contexts)

    @property
    def shape(self) -> Shape:
        """The batch as a step is priced."""
        low, high = (min(self.contexts), max(self.contexts)) if self.contexts else (0, 0)
        return Shape(self.chunks, len(self.contexts), sum(self.contexts), low, high)

    @property
    def decodes_alike(self) -> bool:
        """Whether it is decodes alone, all of one context."""
        return not self.chunks and max(self.contexts) - min(self.contexts) <= _EQUAL * max(self.contexts)

    @property
    def prompts_alike(self) -> bool:
        """Whether it is prompts or chunks alone, all of one length and history."""
        return not self.contexts and len(set(self.chunks)) == 1

    @property
    def batch(self) -> str:
        """The batch in the words of ``--case``."""
        parts = []
        for (tokens, before), count in Counter(self.chunks).items():
            parts.append(f"{_times(count)}{tokens}" + (f"@{tokens + before}" if before else ""))
        if self.contexts:
            low, high = min(self.contexts) + 1, max(self.contexts) + 1
            parts.append(f"{_times(len(self.contexts))}1@{low}" + ("" if low == high else f" to {high}"))
        return ",".join(parts)


def _times(count: int) -> str:
    return f"{count}*" if count > 1 else ""


def read_forward(paths: Iterable[str], ranks: int) -> tuple[list[MeasuredStep], list[str]]:
    """(steps, what was left out and why) of the files; ``ranks``: processes of a tensor-parallel group.

    Raises:
        MissingFileError: a file is not there.
        InputError: a field is missing or has a value that cannot be; the message names it.
    """
    steps: list[MeasuredStep] = []
    left_out: list[str] = []
    seen: dict[tuple[Any, ...], str] = {}
    for path in paths:
        for index, entry in enumerate(_load(path)):
            found = _step(entry, f"{path}: [{index}]", ranks)
            if isinstance(found, str):
                left_out.append(found)
                continue
            batch = tuple(sorted(found.chunks)), tuple(sorted(found.contexts))
            if batch in seen:
                raise InputError(f"{found.where}: {found.name} is the same batch as {seen[batch]}; keep one")
            seen[batch] = found.where
            steps.append(found)
    return steps, left_out


def _load(path: str) -> list[Any]:
    try:
        entries = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(
            f"{path}: is not JSON ({error}); give what vllm bench forward --output-json wrote"
        ) from None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path}: must be a list with an object for every case, as vllm bench forward --output-json "
            "writes it"
        )
    return entries


def _step(entry: Any, where: str, ranks: int) -> MeasuredStep | str:
    """A case as a step; a text says why it cannot be used, though nothing is wrong with it."""
    entry = _object(entry, where)
    name = _field(entry, "case", where, str)
    requests = _field(entry, "requests", where, list)
    if not requests:
        raise InputError(f"{where}.requests: is empty; must be a list of at least one request")
    results = _field(entry, "ranks", where, list)
    if len(results) != ranks:
        raise InputError(
            f"{where}.ranks: has {len(results)} processes, and --tp says {ranks}; one process for each rank "
            "of a tensor-parallel group is read, pipelines and data-parallel groups are not"
        )
    median = _time(entry, "median_us", where)
    first = _object(results[0], f"{where}.ranks[0]")
    latency = _object(_field(first, "latency_us", f"{where}.ranks[0]", dict), f"{where}.ranks[0].latency_us")
    if _time(latency, "median", f"{where}.ranks[0].latency_us") != median:
        raise InputError(
            f"{where}.median_us: {median} is not ranks[0].latency_us.median; the file was changed"
        )
    if "pp_rank" in first:
        raise InputError(f"{where}.ranks[0].pp_rank: pipelines are not read; measure with one stage")
    if not _field(first, "finite", f"{where}.ranks[0]", bool):
        raise InputError(
            f"{where}.ranks[0].finite: the model's output was not finite; such a time is not used"
        )
    shapes = [_request(request, f"{where}.requests[{i}]") for i, request in enumerate(requests)]
    scope = _field(first, "timing_scope", f"{where}.ranks[0]", str)
    if scope != "target_only":
        return f"{name}: the drafter was timed too ({scope}); measure with --exclude-drafter"
    if any(drafts for _, _, drafts in shapes):
        return f"{name}: verifies drafts; steps without drafts are used"
    tokens = sum(query for query, _, _ in shapes)
    computed = _whole(first, "num_tokens", f"{where}.ranks[0]")
    if computed != tokens:
        return f"{name}: computed {computed} tokens, not {tokens} (a window was replayed); mark it with c"
    if any(query == 1 and not before for query, before, _ in shapes):
        return f"{name}: a prompt of one token is no step that is priced"
    spread = latency.get("sample_spread_pct", 0.0)
    return MeasuredStep(
        name,
        where,
        median,
        tuple((query, before) for query, before, _ in shapes if query > 1),
        tuple(before for query, before, _ in shapes if query == 1),
        ranks,
        float(spread) if isinstance(spread, int | float) else 0.0,
        str(first.get("routing") or ""),
    )


def _request(request: Any, where: str) -> tuple[int, int, int]:
    """(tokens, tokens in the cache before, drafts) of one request."""
    request = _object(request, where)
    query, whole = _whole(request, "query_len", where), _whole(request, "kv_len", where)
    if query < 1:
        raise InputError(f"{where}.query_len: {query} is not allowed; must be >= 1")
    if whole < query:
        raise InputError(f"{where}.kv_len: {whole} is not allowed; must be >= query_len, {query}")
    drafts = _whole(request, "num_draft_tokens", where) if "num_draft_tokens" in request else 0
    return query, whole - query, drafts


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object")
    return value


def _field(entry: dict[str, Any], key: str, where: str, kind: type) -> Any:
    if key not in entry:
        raise InputError(f"{where}.{key}: is missing; vllm bench forward writes it")
    if type(entry[key]) is not kind:
        words = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
        raise InputError(f"{where}.{key}: {str(entry[key])[:40]!r} is not allowed; must be {words[kind]}")
    return entry[key]


def _whole(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value < _MOST:
        told = "is missing" if value is None else f"{str(value)[:40]!r} is not allowed"
        raise InputError(f"{where}.{key}: {told}; must be a whole number >= 0")
    return value


def _time(entry: dict[str, Any], key: str, where: str) -> float:
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < 1e9:
        told = "is missing" if value is None else f"{str(value)[:40]!r} is not allowed"
        raise InputError(f"{where}.{key}: {told}; must be a time in microseconds above 0")
    return float(value)
