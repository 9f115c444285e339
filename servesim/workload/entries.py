"""Checks of the values found in a workload file, and the loop that turns its entries into a workload.

An entry is one request or one session: a line of a JSON lines file, a row of a CSV file, an item of a list.
"""

from __future__ import annotations

from array import array
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from servesim.errors import InputError
from servesim.specs.reading import LIMIT_VARIABLE, input_limit_bytes
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from numpy.typing import NDArray

Item = TypeVar("Item")

MAX_TOKENS = 2**31 - 1
"""Longest prompt or output that is taken for meant."""
MAX_MADE_IDS = 2**24
"""Longest prompt whose token ids are made up from hash ids: more than any model's context."""
REQUEST_BYTES = 200
"""About what a request takes in memory, beside 8 bytes for every token id."""
MAX_TIME_NS = 2**53
"""Latest time: 104 days, and the last integer that survives every tool that reads JSON numbers as doubles."""


class MemoryBudget:
    """The memory that the requests of one workload may take, and what is left of it."""

    __slots__ = ("_left", "_source")

    def __init__(self, source: str) -> None:
        self._source = source
        self._left = input_limit_bytes()

    def take(self, amount: int, place: str = "") -> None:
        """Count ``amount`` bytes that are going to be taken; ``place`` follows the source in a message.

        Raises:
            InputError: there are not so many left.
        """
        self._left -= amount
        if self._left < 0:
            limit_mib = input_limit_bytes() >> 20
            raise InputError(
                f"{self._source}{place}: the requests so far take more than {limit_mib:,} MiB "
                f"of memory; take fewer with --num-reqs, or raise the limit with the environment variable "
                f"{LIMIT_VARIABLE}"
            )


class EntryError(Exception):
    """One entry is wrong; the text names the field, what was found and what is allowed, without the place."""


_SHARED: dict[int, int] = {}
_MOST_SHARED = 1 << 16


def whole_number(value: object, field: str, low: int, high: int) -> int:
    """`value` if it is an integer (no bool, no float) in [low, high]; EntryError otherwise."""
    if type(value) is int and low <= value <= high:
        # one object for all that say the same; a workload says a few thousand lengths a million times
        return _SHARED.setdefault(value, value) if value < _MOST_SHARED else value
    if type(value) is not int:
        raise EntryError(f"{field}: {shown(value)} is not an integer; must be an integer >= {low}")
    if value < low:
        raise EntryError(f"{field}: {shown(value)} is too small; must be >= {low}")
    raise EntryError(f"{field}: {shown(value)} is too large; must be <= {high}")


def token_ids(value: object, field: str, count: int, count_field: str) -> NDArray[np.int64]:
    """Token ids, shape (count,), from a JSON list of `count` non-negative integers; EntryError otherwise."""
    if type(value) is not list:
        raise EntryError(f"{field}: {shown(value)} is not a list; must be a list of {count} token ids")
    if len(value) != count:
        raise EntryError(f"{field}: has {len(value)} ids but {count_field} is {count}; the two must agree")
    if set(map(type, value)) != {int}:
        at, odd = next((at, odd) for at, odd in enumerate(value) if type(odd) is not int)
        raise EntryError(f"{field}[{at}]: {shown(odd)} is not an integer; must be a token id >= 0")
    try:
        ids: NDArray[np.int64] = np.frombuffer(array("q", value), dtype=np.int64)
    except OverflowError:
        at, odd = next((at, odd) for at, odd in enumerate(value) if not -(2**63) <= odd < 2**63)
        raise EntryError(f"{field}[{at}]: {shown(odd)} is too large; must be <= {2**63 - 1}") from None
    if int(ids.min()) < 0:
        at = int((ids < 0).argmax())
        raise EntryError(f"{field}[{at}]: {ids[at]} is too small; must be a token id >= 0")
    return ids


def text(value: object, field: str) -> str:
    """`value` if it is a text that is not empty; EntryError otherwise."""
    if type(value) is str and value:
        return value
    raise EntryError(f"{field}: {shown(value)} is not a name; must be a text that is not empty")


def session_name(value: object) -> str:
    """A session's own name, a text or a whole number; EntryError otherwise."""
    return str(value) if type(value) is int else text(value, "session_id")


def unknown_key(keys: Iterable[str], allowed: Collection[str], where: str = "") -> EntryError:
    """The error for the first of `keys` that is not allowed, with the nearest allowed key."""
    key = next(key for key in keys if key not in allowed)
    near = get_close_matches(key, allowed, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"allowed keys are {', '.join(allowed)}"
    return EntryError(f"{where}{shorten(key)}: is not a known key; {advice}")


def shown(value: object) -> str:
    """`value` as it stands in JSON, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, float):
        return "NaN" if value != value else repr(value).replace("inf", "Infinity")
    if isinstance(value, int) and abs(value) >= 10**40:  # str() of a huge int is slow, or refused
        return "a huge integer"
    return shorten(repr(value))


def shorten(words: str, width: int = 60) -> str:
    """`words` cut to `width` characters."""
    return words if len(words) <= width else words[: width - 1] + "…"


def collect(
    source: str,
    items: Iterable[tuple[int, Item]],
    parse: Callable[[Item, int], list[Request]],
    *,
    num_reqs: int = 0,
    lenient: bool = False,
    place: str = ":",
    onto: Workload | None = None,
) -> Workload:
    """Parse numbered items into a workload, in their order.

    `parse(item, first_index)` gives the requests of one entry, none where it is to be left out, or raises
    EntryError, which becomes an InputError at `source` + `place` + number, or leaves the entry out when
    `lenient`. What is left out is counted in `Workload.skipped`. At most `num_reqs` entries are taken (0:
    all), where later turns of a session are no entries; what follows is not even read. Raises InputError too
    when the requests take more memory than `input_limit_bytes`. `onto`: a workload to add to.
    """
    workload = Workload(source=source) if onto is None else onto
    requests = workload.requests
    budget = MemoryBudget(source)
    entries = 0
    number = 0
    for number, item in items:
        try:
            found = parse(item, len(requests))
        except EntryError as error:
            if not lenient:
                raise InputError(
                    f"{source}{place}{number}: {error}; correct it, or leave bad entries out with --lenient"
                ) from None
            workload.skipped += 1
            continue
        if not found:
            workload.skipped += 1
            continue
        requests += found
        budget.take(sum(map(_memory_bytes, found)), f"{place}{number}")
        entries += found[0].predecessor < 0
        if num_reqs and entries == num_reqs:
            break
    if not requests:
        why = f"all {workload.skipped} entries are left out" if workload.skipped else "holds no request"
        raise InputError(f"{source}: {why}; a workload needs at least one request")
    return workload


def _memory_bytes(request: Request) -> int:
    if request.input_ids is None and request.output_ids is None and request.hashes is None:
        return REQUEST_BYTES
    arrays = (request.input_ids, request.output_ids, request.hashes)
    return REQUEST_BYTES + sum(ids.nbytes for ids in arrays if ids is not None)
