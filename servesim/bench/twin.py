"""A simulation that follows a running vLLM: its traffic and its host times, read from the server's counters.

Counters say how many requests came in every interval, and histograms how long their prompts and answers were.
From these a workload is made that is alike in rate, lengths and share of cached tokens, though no request is
the same. Two host times are fitted so that the means of inter-token latency and TTFT come out as counted.
"""

from __future__ import annotations

import json
import math
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.bench.endpoint import LABEL, cache_facts
from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.results.result import Result
    from servesim.specs.hardware import EngineSpec

_SAMPLE = re.compile(r"^vllm:([a-z_]+)(?:\{(.*)\})? ([-+0-9.eE]+|NaN|[+-]Inf)(?: \d+)?$")
_MOST_PAGE_BYTES = 32 << 20
_ROUNDS = 12
_MOST_HOST_US = 200_000.0


@dataclass(slots=True, frozen=True)
class Scrape:
    """The counters of a server at one time, each summed over its engines."""

    time_s: float
    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]]
    """Histogram → upper edge of a bucket → observations up to it."""
    text: str
    """The page itself."""


def parse_scrape(time_s: float, text: str) -> Scrape:
    """A page in Prometheus's text format, of which only vLLM's metrics count.

    Raises:
        InputError: there is none of them on it.
    """
    values: defaultdict[str, float] = defaultdict(float)
    buckets: defaultdict[str, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found[1], dict(LABEL.findall(found[2] or "")), float(found[3])
        if name.endswith("_bucket") and "le" in labels:
            buckets[name.removesuffix("_bucket")][float(labels["le"])] += value
        elif name != "cache_config_info":
            values[name] += value
    if not values:
        raise InputError(
            "no metric of vLLM is on the page; give the address of a server, such as http://host:8000"
        )
    return Scrape(time_s, dict(values), {name: dict(each) for name, each in buckets.items()}, text)


def scrape(address: str, api_key: str | None = None) -> Scrape:
    """The counters of the server at an address, now.

    Raises:
        InputError: it does not answer, or is no vLLM.
    """
    url = f"{address.rstrip('/')}/metrics"
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as page:
            raw = page.read(_MOST_PAGE_BYTES)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"{url}: cannot be read: {error}") from error
    return parse_scrape(time.time(), raw.decode("utf-8", "replace"))


def watch(
    address: str,
    for_s: float,
    every_s: float,
    api_key: str | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> list[Scrape]:
    """Scrape a server every so often for a while; ``tell`` is called with the scrapes made and to be made."""
    count = max(int(for_s / every_s), 1) + 1
    start, found = time.monotonic(), []
    for number in range(count):
        time.sleep(max(start + number * every_s - time.monotonic(), 0))
        found.append(scrape(address, api_key))
        if tell is not None:
            tell(number + 1, count)
    return found


def load_scrapes(path: str) -> list[Scrape]:
    """Scrapes from a file: JSON lines with ``time_s`` and ``text``, as :func:`save_scrapes` writes them.

    Raises:
        InputError: the file or a line of it is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"{path}: there is no such file; give a recording of metrics, or an address http://…"
        )
    found = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                found.append(parse_scrape(float(entry["time_s"]), entry["text"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}:{number}: {error}; a line has time_s and text (a page of /metrics), as JSON"
                ) from error
    return found


@dataclass(slots=True, frozen=True)
class Traffic:
    """What a server did between its first and last scrape."""

    duration_s: float
    arrivals: NDArray[np.int64]
    """Requests that came in every interval."""
    edges_s: NDArray[np.float64]
    """Ends of the intervals, from 0 on, shape (intervals + 1,)."""
    prompts: Mapping[float, float]
    """Upper edge of a bucket → requests with such a prompt."""
    outputs: Mapping[float, float]
    mean_prompt: float
    mean_output: float
    hit_share: float
    """Of the prompt tokens, those found in the prefix cache."""
    mean_ttft_ms: float
    mean_itl_ms: float
    running: NDArray[np.float64]
    """At every scrape."""
    waiting: NDArray[np.float64]
    kv_usage: NDArray[np.float64]
    tokens_per_s: NDArray[np.float64]
    """Generated in every interval."""
    facts: Mapping[str, Any]
    """Engine arguments that the metrics tell; see :func:`servesim.bench.endpoint.cache_facts`."""


def traffic(scrapes: Sequence[Scrape], source: str) -> Traffic:
    """The traffic between scrapes.

    Raises:
        InputError: there are fewer than three scrapes, or nothing ended between them.
    """
    if len(scrapes) < 3:
        raise InputError(f"{source}: {len(scrapes)} scrapes are not enough; give three or more")
    first, last = scrapes[0], scrapes[-1]
    times = np.array([each.time_s for each in scrapes])
    if (np.diff(times) <= 0).any():
        raise InputError(f"{source}: the times of the scrapes do not rise")

    def rise(name: str) -> float:
        grown = last.values.get(name, 0.0) - first.values.get(name, 0.0)
        if grown < 0:
            raise InputError(f"{source}: vllm:{name} falls, so the server was started anew; watch it again")
        return grown

    def mean(name: str) -> float:
        number = rise(f"{name}_count")
        return rise(f"{name}_sum") / number if number else math.nan

    def series(name: str) -> NDArray[np.float64]:
        return np.array([each.values.get(name, 0.0) for each in scrapes])

    if not rise("request_generation_tokens_count"):
        raise InputError(
            f"{source}: no request ended between the scrapes; watch a busy server, or for longer"
        )
    running, waiting = series("num_requests_running"), series("num_requests_waiting")
    inside = series("request_success_total") + running + waiting
    queries = rise("prefix_cache_queries_total")
    return Traffic(
        duration_s=float(times[-1] - times[0]),
        arrivals=np.maximum(np.rint(np.diff(inside)), 0).astype(np.int64),
        edges_s=times - times[0],
        prompts=_between(first, last, "request_prompt_tokens"),
        outputs=_between(first, last, "request_generation_tokens"),
        mean_prompt=mean("request_prompt_tokens"),
        mean_output=mean("request_generation_tokens"),
        hit_share=rise("prefix_cache_hits_total") / queries if queries else 0.0,
        mean_ttft_ms=1000 * mean("time_to_first_token_seconds"),
        mean_itl_ms=1000 * mean("inter_token_latency_seconds"),
        running=running,
        waiting=waiting,
        kv_usage=series("kv_cache_usage_perc"),
        tokens_per_s=np.diff(series("generation_tokens_total")) / np.diff(times),
        facts=cache_facts(last.text),
    )


def _between(first: Scrape, last: Scrape, name: str) -> dict[float, float]:
    """Observations in every bucket of a histogram, between two scrapes."""
    before, after = first.buckets.get(name, {}), last.buckets.get(name, {})
    below, found = 0.0, {}
    for edge in sorted(after):
        up_to = after[edge] - before.get(edge, 0.0)
        found[edge] = max(up_to - below, 0.0)
        below = up_to
    return found


def draw_lengths(
    buckets: Mapping[float, float], mean: float, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """``count`` lengths as often in every bucket as counted, with the mean that was counted.

    Within a bucket their logarithms are even; then all are stretched alike until the mean is right.
    """
    edges = sorted(buckets)
    weights = np.array([buckets[edge] for edge in edges])
    if not weights.sum():
        return np.full(count, max(round(mean), 1), dtype=np.int64)
    lower = np.array([1.0, *edges[:-1]])
    upper = np.array(
        [edge if math.isfinite(edge) else 2 * low for edge, low in zip(edges, lower, strict=True)]
    )
    place = rng.choice(len(edges), count, p=weights / weights.sum())
    low, high = lower[place], np.maximum(upper[place], lower[place])
    lengths = low * (high / low) ** rng.random(count)
    for _ in range(4):  # rounding up to 1 moves the mean a little
        lengths = np.maximum(lengths * mean / lengths.mean(), 1.0)
    whole: NDArray[np.int64] = np.rint(lengths).astype(np.int64)
    return whole


def workload_like(seen: Traffic, seed: int, most_tokens: int | None = None) -> Workload:
    """A workload that is alike in rate, lengths and share of cached tokens.

    A prompt begins with tokens that all have in common, as many of its own as were found in the cache.

    Args:
        seen: what the server did.
        seed: of lengths and arrivals.
        most_tokens: longest prompt and answer together.
    """
    rng = np.random.default_rng(seed)
    count = int(seen.arrivals.sum())
    starts, ends = np.repeat(seen.edges_s[:-1], seen.arrivals), np.repeat(seen.edges_s[1:], seen.arrivals)
    arrivals_s = np.sort(starts + rng.random(count) * (ends - starts))
    prompts = draw_lengths(seen.prompts, seen.mean_prompt, count, rng)
    outputs = draw_lengths(seen.outputs, seen.mean_output, count, rng)
    if most_tokens is not None:
        prompts = np.clip(prompts, 1, most_tokens - 1)
        outputs = np.minimum(outputs, most_tokens - prompts)
    common = np.arange(int(prompts.max(initial=1)) + 1, dtype=np.int64)
    requests = []
    for index in range(count):
        length = int(prompts[index])
        ids = None
        if seen.hit_share > 0:
            shared = min(round(length * seen.hit_share), length)
            own = np.arange(length - shared, dtype=np.int64) + (index + 1) * 1_000_000_000
            ids = np.concatenate((common[:shared], own))
        requests.append(Request(index, length, int(outputs[index]), int(arrivals_s[index] * 1e9), ids))
    return Workload(requests, source="traffic of a running server", drawn_arrivals=True)


@dataclass(slots=True, frozen=True)
class Fit:
    """Host times with which a simulation has the server's means."""

    engine: EngineSpec
    result: Result
    """The simulation with them."""
    simulations: int


def fit(seen: Traffic, run: Callable[[EngineSpec], Result]) -> Fit:
    """Find the time of the host for every step, and from the client to the engine and back.

    Args:
        seen: what the server did.
        run: simulates its traffic with these host times.

    Raises:
        InputError: the server counted no inter-token latency.
    """
    from servesim.specs.hardware import EngineSpec

    if math.isnan(seen.mean_itl_ms):
        raise InputError("the server counted no inter-token latency, so no host time can be fitted")
    low, high, simulations = 0.0, 1000.0, 0

    def tried(step_us: float, front_us: float = 0.0) -> tuple[EngineSpec, Result]:
        nonlocal simulations
        simulations += 1
        engine = EngineSpec(
            decode_step_overhead_us=step_us, prefill_step_overhead_us=step_us, front_end_us=front_us
        )
        return engine, run(engine)

    engine, result = tried(low)
    if _mean_itl_ms(result) < seen.mean_itl_ms:
        while _mean_itl_ms(tried(high)[1]) < seen.mean_itl_ms and high < _MOST_HOST_US:
            low, high = high, 2 * high
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            engine, result = tried(middle)
            if abs(_mean_itl_ms(result) / seen.mean_itl_ms - 1) < 0.002:
                break
            low, high = (middle, high) if _mean_itl_ms(result) < seen.mean_itl_ms else (low, middle)
    left_ms = seen.mean_ttft_ms - float(result.summary["mean_ttft_ms"])
    if left_ms > 0:
        engine, result = tried(engine.decode_step_overhead_us, 1000 * left_ms)
    return Fit(engine, result, simulations)


def _mean_itl_ms(result: Result) -> float:
    return float(result.summary["mean_itl_ms"])


def followed(seen: Traffic, result: Result) -> list[tuple[str, float, float, float]]:
    """How well a simulation follows the server: (what, the server's mean, the simulation's, mean distance).

    Counted at the same times; running and waiting requests, share of the KV cache, tokens per second.
    """
    live = {
        "running requests": seen.running,
        "waiting requests": seen.waiting,
        "KV cache in use": seen.kv_usage,
        "tokens per second": seen.tokens_per_s,
    }
    twin = {name: np.zeros(len(values)) for name, values in live.items()}
    for instance in result.log.instances:
        steps = instance.steps
        ends = steps.column("end_ns") / 1e9
        if not len(ends):
            continue
        place = np.searchsorted(steps.column("start_ns") / 1e9, seen.edges_s, side="right") - 1
        during = (place >= 0) & (seen.edges_s <= ends[place])
        share = instance.capacity.usable_blocks * len(result.log.instances)
        twin["running requests"] += np.where(during, steps.column("running")[place], 0)
        twin["waiting requests"] += np.where(during, steps.column("waiting")[place], 0)
        twin["KV cache in use"] += np.where(during, steps.column("kv_blocks_used")[place], 0) / share
    tracks = result.log.tracks()
    runs = [run for record in result.log.requests for run in record.token_steps]
    times = [tracks[track].between(first, last + 1) for track, first, last in runs]
    made, _ = np.histogram(np.concatenate([np.zeros(0), *times]) / 1e9, seen.edges_s)
    twin["tokens per second"] = made / np.diff(seen.edges_s)
    # the simulation begins empty; the server did not
    first = len(seen.edges_s) // 5
    return [
        (
            name,
            float(values[first:].mean()),
            float(twin[name][first:].mean()),
            float(np.abs(twin[name][first:] - values[first:]).mean()),
        )
        for name, values in live.items()
    ]


def save_scrapes(path: str | Path, scrapes: Sequence[Scrape]) -> None:
    """Write pages of ``/metrics`` with their times, for :func:`load_scrapes`."""
    from servesim.results.atomic import atomic_write

    with atomic_write(path) as file:
        for each in scrapes:
            file.write(json.dumps({"time_s": each.time_s, "text": each.text}).encode() + b"\n")
