"""Synthetic workloads: drawn lengths and arrivals, prompts with shared prefixes, sessions of many turns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.workload.arrivals import ARRIVALS, arrivals_ns, check_rate
from servesim.workload.entries import REQUEST_BYTES, MemoryBudget
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """What a synthetic workload looks like. Lengths and times are distributions in text form."""

    num_reqs: int
    """Entries: requests, or sessions when `sessions`."""
    rate: float
    """Entries per second; inf: all arrive at 0."""
    arrival: str = "poisson"
    cv: float = 2.0
    """Coefficient of variation of the gaps of gamma arrivals."""
    burst_size: int = 10
    input_len: str = "lognormal:512:512:4:8192"
    """New prompt tokens of a request or a turn, shared prefix not counted."""
    output_len: str = "lognormal:256:256:4:4096"
    prefix_groups: int = 0
    """Number of shared prefixes; 0: none."""
    prefix_len: str = "fixed:256"
    """Tokens of each shared prefix."""
    prefix_share: float = 1.0
    """Share of the entries that begin with one of the prefixes."""
    sessions: bool = False
    turns: str = "uniform:2:6"
    tool_time: str = "lognormal:2:2:0:60"
    """Seconds between the end of a turn and the arrival of the next."""
    ids: bool = True
    """Whether token ids are written: without them nothing is shared."""
    vocab_size: int = 32_000
    seed: int = 42


def synthesise(spec: SynthSpec) -> Workload:
    """The workload that `spec` describes; always the same for the same spec. InputError for an impossible
    one.

    Output ids are drawn for sessions only: there the next prompt contains them, elsewhere nothing could.
    """
    _check(spec)
    # One stream for each kind of draw: changing, say, the arrivals leaves lengths and tokens as they were.
    arrival_rng, length_rng, group_rng, turn_rng, token_rng = (
        np.random.Generator(np.random.PCG64(seed)) for seed in np.random.SeedSequence(spec.seed).spawn(5)
    )
    MemoryBudget("this workload").take(spec.num_reqs * REQUEST_BYTES)
    arrivals = arrivals_ns(
        spec.arrival, spec.num_reqs, spec.rate, arrival_rng, cv=spec.cv, burst_size=spec.burst_size
    )
    turns, tool_ns = _turns(spec, turn_rng)
    total = int(turns.sum())
    budget = MemoryBudget("this workload")
    budget.take(total * REQUEST_BYTES)
    input_lengths = parse_distribution(spec.input_len, "--input-len").draw_whole(total, length_rng)
    output_lengths = parse_distribution(spec.output_len, "--output-len").draw_whole(total, length_rng)
    tokens = _Tokens(spec, group_rng, token_rng, budget)

    workload = Workload(source=f"synthetic, seed {spec.seed}")
    turn = 0
    for entry in range(spec.num_reqs):
        prefix = tokens.prefix_of(entry)
        context = len(prefix)
        past = prefix
        for position in range(int(turns[entry])):
            index = len(workload.requests)
            context += int(input_lengths[turn])
            request = Request(index, context, int(output_lengths[turn]), int(arrivals[entry]))
            context += request.output_tokens
            if spec.ids:
                budget.take(8 * (context if spec.sessions else request.input_tokens))
                request.input_ids = np.concatenate((past, tokens.draw(int(input_lengths[turn]))))
            if spec.sessions:
                request.session_id = f"s{entry}"
                request.sub_request = position
                if position:
                    request.predecessor = index - 1
                    request.tool_ns = int(tool_ns[turn - 1])
                if request.input_ids is not None:
                    request.output_ids = tokens.draw(request.output_tokens)
                    past = np.concatenate((request.input_ids, request.output_ids))
            workload.requests.append(request)
            turn += 1
    return workload


def _check(spec: SynthSpec) -> None:
    whole = {"--num-reqs": spec.num_reqs, "--vocab-size": spec.vocab_size, "--burst-size": spec.burst_size}
    for flag, value in whole.items():
        if not 1 <= value < 2**31:
            raise InputError(f"{flag}: {value} is not possible; must be >= 1")
    if spec.arrival not in ARRIVALS:
        raise InputError(f"--arrival: {spec.arrival!r} is not known; must be one of {', '.join(ARRIVALS)}")
    check_rate(spec.rate)
    if spec.prefix_groups < 0:
        raise InputError(f"--prefix-groups: {spec.prefix_groups} is not possible; must be >= 0")
    if spec.prefix_groups and not spec.ids:
        raise InputError("--prefix-groups: shared prefixes need token ids; leave --no-ids out")
    if not 0 <= spec.prefix_share <= 1:
        raise InputError(f"--prefix-share: {spec.prefix_share} is not possible; must be from 0 to 1")
    if spec.seed < 0:
        raise InputError(f"--seed: {spec.seed} is not possible; must be >= 0")


def _turns(spec: SynthSpec, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Turns of each entry, shape (num_reqs,), and tool time in ns after each turn, shape (all turns,)."""
    if not spec.sessions:
        return np.ones(spec.num_reqs, dtype=np.int64), np.zeros(spec.num_reqs, dtype=np.int64)
    turns = parse_distribution(spec.turns, "--turns").draw_whole(spec.num_reqs, rng)
    MemoryBudget("this workload").take(int(turns.sum()) * REQUEST_BYTES)
    seconds: Distribution = parse_distribution(spec.tool_time, "--tool-time", whole=False, least=0)
    tool_us = np.rint(seconds.draw(int(turns.sum()), rng) * 1e6).astype(np.int64)
    return turns, tool_us * 1000


class _Tokens:
    """Draws token ids, and deals out the shared prefixes."""

    def __init__(
        self,
        spec: SynthSpec,
        group_rng: np.random.Generator,
        token_rng: np.random.Generator,
        budget: MemoryBudget,
    ) -> None:
        self._vocab_size = spec.vocab_size
        self._rng = token_rng
        self._none = np.empty(0, dtype=np.int64)
        self._prefixes = [self._none]
        self._group = np.zeros(spec.num_reqs, dtype=np.int64)  # 0: no prefix, g: prefix g
        if spec.prefix_groups:
            budget.take(spec.prefix_groups * REQUEST_BYTES)
            lengths = parse_distribution(spec.prefix_len, "--prefix-len").draw_whole(
                spec.prefix_groups, group_rng
            )
            budget.take(8 * int(lengths.sum()))
            self._prefixes += [self.draw(int(length)) for length in lengths]
            shares = group_rng.random(spec.num_reqs) < spec.prefix_share
            self._group = np.where(shares, 1 + whole_below(spec.prefix_groups, spec.num_reqs, group_rng), 0)

    def prefix_of(self, entry: int) -> NDArray[np.int64]:
        return self._prefixes[int(self._group[entry])]

    def draw(self, count: int) -> NDArray[np.int64]:
        return whole_below(self._vocab_size, count, self._rng)


def check_output(path: str | Path) -> None:
    """InputError unless `path` ends as a workload file must."""
    if not str(path).endswith((".jsonl", ".jsonl.gz")):
        raise InputError(
            f"{path}: a workload is written as JSON lines; the name must end in .jsonl or .jsonl.gz"
        )


def write_jsonl(workload: Workload, path: str | Path) -> None:
    """Write `workload` as JSON lines to `path`, packed when it ends in ``.gz``; all of it or nothing."""
    import gzip

    from servesim.results.atomic import atomic_write

    check_output(path)
    with atomic_write(path) as handle:
        if str(path).endswith(".gz"):
            # neither name nor time goes in: the same workload gives the same bytes
            with gzip.GzipFile(filename="", fileobj=handle, mode="wb", mtime=0) as packed:
                packed.writelines(json_lines(workload))
        else:
            handle.writelines(json_lines(workload))


def json_lines(workload: Workload) -> Iterator[bytes]:
    """The lines of a JSON lines file with this workload; `jsonl.load_jsonl` gives the same workload back."""
    import orjson

    requests = workload.requests
    at = 0
    while at < len(requests):
        first = requests[at]
        end = at + 1
        while end < len(requests) and requests[end].predecessor == end - 1:
            end += 1
        if first.session_id is None:
            entry = _fields(first) | {"arrival_time_ns": first.arrival_ns}
            entry |= _ids(first)
        else:
            subs = []
            for place in range(at, end):
                sub = _fields(requests[place])
                if place + 1 < end:
                    sub["tool_duration_ns"] = requests[place + 1].tool_ns
                subs.append(sub | _ids(requests[place]))
            entry = {
                "session_id": first.session_id,
                "arrival_time_ns": first.arrival_ns,
                "sub_requests": subs,
            }
        yield orjson.dumps(entry) + b"\n"
        at = end


def _fields(request: Request) -> dict[str, object]:
    fields: dict[str, object] = {"input_toks": request.input_tokens, "output_toks": request.output_tokens}
    if request.model is not None:
        fields["model"] = request.model
    if request.priority:
        fields["priority"] = request.priority
    if request.max_tokens:
        fields["max_tokens"] = request.max_tokens
    if request.cache_salt is not None:
        fields["cache_salt"] = request.cache_salt
    if request.lora is not None:
        fields["lora"] = request.lora
    return fields


def _ids(request: Request) -> dict[str, object]:
    if request.hashes is not None:
        return {
            "hash_ids": request.hashes.tolist(),
            "tokens_per_hash": request.tokens_per_hash,
            "hashed_toks": request.hashed_tokens,
        }
    ids = {"input_tok_ids": request.input_ids, "output_tok_ids": request.output_ids}
    return {key: value.tolist() for key, value in ids.items() if value is not None}


_MOST = 2**31 - 1  # a lognormal one has no upper bound of its own
FORMS = "fixed:VALUE, uniform:LOW:HIGH or lognormal:MEAN:STD[:MIN:MAX]"


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution of non-negative numbers, cut off to [low, high].

    `mean` and `std` are those of the numbers themselves, not of their logarithms, and before the cut. Kind
    is fixed, uniform, lognormal or normal; the last is not written as text.
    """

    kind: str
    mean: float
    std: float
    low: float
    high: float

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`count` independent numbers."""
        if self.kind == "fixed":
            return np.full(count, self.mean)
        if self.kind == "uniform":
            return self.low + (self.high - self.low) * rng.random(count)
        if self.kind == "normal":
            return np.clip(self.mean + self.std * normal(count, rng), self.low, self.high)
        # a lognormal of mean m and deviation s: sigma² = ln(1 + s²/m²), mu = ln m - sigma²/2
        sigma2 = math.log1p((self.std / self.mean) ** 2)
        drawn = np.exp(math.log(self.mean) - sigma2 / 2 + math.sqrt(sigma2) * normal(count, rng))
        clipped: NDArray[np.float64] = np.clip(drawn, self.low, self.high)
        return clipped

    def draw_whole(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` independent integers; a uniform one takes both ends equally often."""
        if self.kind == "uniform":
            low, high = math.ceil(self.low), math.floor(self.high)
            return low + whole_below(high - low + 1, count, rng)
        return np.rint(np.minimum(self.draw(count, rng), _MOST)).astype(np.int64)


def parse_distribution(words: str, what: str, *, whole: bool = True, least: float = 1) -> Distribution:
    """The distribution that `words` describe; `what` (``--input-len``) names it in InputErrors.

    Every number it can give is >= `least`; with `whole` the given values must be integers. A bare number is
    fixed.
    """
    kind, *figures = words.split(":") if ":" in words else ["fixed", words]
    values = [_number(figure, words, what) for figure in figures]
    match kind, values:
        case "fixed", [value]:
            found = Distribution(kind, value, 0.0, value, value)
        case "uniform", [low, high]:
            found = Distribution(kind, (low + high) / 2, 0.0, low, high)
        case "lognormal", [mean, std]:
            found = Distribution(kind, mean, std, least, math.inf)
        case "lognormal", [mean, std, low, high]:
            found = Distribution(kind, mean, std, low, high)
        case _:
            raise InputError(f"{what}: {words!r} is not a distribution; must be {FORMS}")
    bounds = [found.low] if found.high == math.inf else [found.low, found.high]
    if whole and any(bound != round(bound) for bound in bounds):
        raise InputError(f"{what}: {words!r} is not possible; its values must be integers")
    if found.low < least:
        raise InputError(f"{what}: {words!r} is not possible; no value may be below {least:g}")
    if found.low > found.high:
        raise InputError(f"{what}: {words!r} is not possible; the lower bound is above the upper one")
    if kind == "lognormal" and not (found.mean > 0 and found.std >= 0):
        raise InputError(f"{what}: {words!r} is not possible; the mean must be > 0 and the deviation >= 0")
    return found


def _number(figure: str, words: str, what: str) -> float:
    try:
        value = float(figure)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and abs(value) <= 2**31):
        raise InputError(f"{what}: {figure!r} in {words!r} is not a number up to {2**31}; must be {FORMS}")
    return value


def normal(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`count` standard normal numbers, by the Box-Muller transform.

    NumPy keeps the stream behind `random()` the same from version to version but not that of
    `standard_normal()`; a seed shall mean the same workload for good.
    """
    radius = np.sqrt(-2 * np.log1p(-rng.random(count)))
    numbers: NDArray[np.float64] = radius * np.cos(2 * np.pi * rng.random(count))
    return numbers


def whole_below(bound: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` independent integers in [0, bound), equally likely, from the same stream as `normal`."""
    return np.floor(rng.random(count) * bound).astype(np.int64)
