"""Synthetic workloads that are like a given one: lengths, burstiness, shared prefixes and shape of sessions.

Whole entries are drawn from the file, a session with all its turns, so that whatever belongs together stays
together: prompt and output length, turns and the pauses between them. The gaps between arrivals are drawn
in stretches of neighbours, so that bursts stay bursts. Prefixes that entries of the file share are shared
by as large a part of the drawn ones; what only one entry has is new in every draw, and so is not shared by
drawing it twice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.workload.arrivals import arrivals_ns, check_rate
from servesim.workload.entries import MAX_TIME_NS, REQUEST_BYTES, MemoryBudget
from servesim.workload.generators import whole_below
from servesim.workload.hashes import block_ids
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENS_PER_ID = 16
"""Tokens that a made identity stands for: prefixes are shared in steps of so many."""
_OWN = 2**40
"""From here on, identities of one drawn entry."""


def synthesise_like(
    model: Workload,
    *,
    num_reqs: int | None = None,
    rate: float | None = None,
    duration_s: float | None = None,
    seed: int = 42,
) -> Workload:
    """A workload like ``model``, always the same for the same model and seed.

    Args: model: what to learn from. num_reqs: entries (a session is one) to make; None: as many as the
    model has, or as ``duration_s`` holds. rate: entries per second on average; None: the model's own.
    duration_s: length of the arrivals in s, in place of ``num_reqs``. seed: of every random choice.

    Raises:
        InputError: something asked for is not possible.
    """
    if num_reqs is not None and duration_s is not None:
        raise InputError(
            "--duration: says how many entries there are, as --num-reqs does; leave one of them out"
        )
    entries = _entries(model)
    arrival_rng, entry_rng = (
        np.random.Generator(np.random.PCG64(each)) for each in np.random.SeedSequence(seed).spawn(2)
    )
    gaps_s = _gaps_s(entries)
    own_rate = 1 / gaps_s.mean() if len(gaps_s) and gaps_s.any() else None
    count = _count(len(entries), num_reqs, duration_s, rate or own_rate)
    arrivals = _arrivals_ns(gaps_s, own_rate, count, rate, arrival_rng)
    drawn = whole_below(len(entries), count, entry_rng)
    budget = MemoryBudget("this workload")
    prefixes = _Prefixes(model, entries)
    made = Workload(source=f"like {model.source}, seed {seed}", drawn_arrivals=True)
    for number, (which, arrival_ns) in enumerate(zip(drawn.tolist(), arrivals.tolist(), strict=True)):
        first = len(made.requests)
        for place, request in enumerate(entries[which]):
            budget.take(REQUEST_BYTES + 8 * (request.input_tokens // TOKENS_PER_ID if request.has_ids else 0))
            copy = replace(
                request,
                index=first + place,
                arrival_ns=arrival_ns,
                predecessor=first + place - 1 if place else -1,
                session_id=None if request.session_id is None else f"s{number}",
                input_ids=None,
                output_ids=None,
                hashes=None,
            )
            prefixes.give(copy, request, number)
            made.requests.append(copy)
    return made


def _entries(model: Workload) -> list[list[Request]]:
    """Sessions, and requests without one, by arrival."""
    entries: list[list[Request]] = []
    for request in model.requests:
        if request.predecessor < 0:
            entries.append([request])
        else:
            entries[-1].append(request)
    return sorted(entries, key=lambda entry: entry[0].arrival_ns)


def _gaps_s(entries: list[list[Request]]) -> NDArray[np.float64]:
    times = np.array([entry[0].arrival_ns for entry in entries], dtype=np.float64)
    gaps: NDArray[np.float64] = np.diff(times) / 1e9
    return gaps


def _count(there: int, num_reqs: int | None, duration_s: float | None, rate: float | None) -> int:
    if num_reqs is not None:
        if not 1 <= num_reqs < 2**31:
            raise InputError(f"--num-reqs: {num_reqs} is not possible; must be >= 1")
        return num_reqs
    if duration_s is None:
        return there
    if not 0 < duration_s <= MAX_TIME_NS / 1e9:
        raise InputError(f"--duration: {duration_s} s is not possible; must be > 0")
    if rate is None or math.isinf(rate):
        raise InputError("--duration: needs a finite rate, and the file has none; give one with --rate")
    return max(round(rate * duration_s) + 1, 1)


def _arrivals_ns(
    gaps_s: NDArray[np.float64],
    own_rate: float | None,
    count: int,
    rate: float | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Arrival times in ns, ascending from 0.

    The gaps of the file come in stretches of about the root of their number, from places that are drawn:
    what follows what within a stretch is kept, and with it how bursty the file is at that scale. They are
    stretched by one factor so that their mean is that of the rate wanted.
    """
    if rate is not None:
        check_rate(rate)
    if own_rate is None:  # all at once: there is no pattern to learn
        return arrivals_ns("poisson", count, math.inf if rate is None else rate, rng)
    if rate is not None and math.isinf(rate):
        return np.zeros(count, dtype=np.int64)
    length = max(math.isqrt(len(gaps_s)), 1)
    starts = whole_below(len(gaps_s), -(-max(count - 1, 1) // length), rng)
    places = (starts[:, None] + np.arange(length)).ravel()[: count - 1] % len(gaps_s)
    gaps = gaps_s[places]
    wanted = own_rate if rate is None else rate
    mean = gaps.mean() if len(gaps) else 0.0
    if mean:
        gaps = gaps / (mean * wanted)
    if float(gaps.sum()) * 1e9 > MAX_TIME_NS:
        raise InputError(f"--rate: {wanted} req/s spreads {count} entries over more than {MAX_TIME_NS} ns")
    found: NDArray[np.int64] = np.cumsum(np.rint(np.concatenate(([0.0], gaps)) * 1e6).astype(np.int64)) * 1000
    return found


class _Prefixes:
    """Gives drawn requests identities in place of tokens, so that they share what the model's entries
    share."""

    def __init__(self, model: Workload, entries: list[list[Request]]) -> None:
        self._known = block_ids(model, TOKENS_PER_ID)
        owner = np.full(self._known.num_ids, -1, dtype=np.int64)
        common = np.zeros(self._known.num_ids, dtype=bool)
        for number, entry in enumerate(entries):
            for request in entry:
                ids = np.array(self._known.of(request.index), dtype=np.int64)
                common[ids[(owner[ids] >= 0) & (owner[ids] != number)]] = True
                owner[ids] = number
        self._common = common
        self._fresh = _OWN
        self._number = -1
        self._renamed: dict[int, int] = {}

    def give(self, copy: Request, request: Request, number: int) -> None:
        """Set the hashes of a drawn request of entry ``number``; those only its entry has are new."""
        if not request.has_ids:
            copy.tokens_per_hash = copy.hashed_tokens = 0
            return
        if number != self._number:
            self._number, self._renamed = number, {}
        ids = self._known.of(request.index)
        names = [one if self._common[one] else self._own(one) for one in ids]
        if not names:  # it shares nothing: an identity of its own says that as well
            self._fresh += 1
            names = [self._fresh]
        copy.hashes = np.array(names, dtype=np.int64)
        copy.tokens_per_hash = TOKENS_PER_ID
        tokens = request.input_tokens + request.output_tokens
        copy.hashed_tokens = min(len(names) * TOKENS_PER_ID, tokens)

    def _own(self, one: int) -> int:
        if one not in self._renamed:
            self._fresh += 1
            self._renamed[one] = self._fresh
        return self._renamed[one]
