"""Workloads for the goldens and for random comparisons: small, seeded, each bent on one kind of trouble."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.golden_file import OUTPUT_STREAM

Entry = dict[str, Any]
"""A request as a golden stores it, see tests/golden/golden_file.py."""
MS = 1_000_000


def arrivals(rng: np.random.Generator, count: int, mean_gap_ms: float) -> list[int]:
    """Poisson arrivals in ns."""
    return [int(at) for at in np.cumsum(rng.exponential(mean_gap_ms * MS, count))]


def lengths(rng: np.random.Generator, count: int, low: int, high: int) -> list[int]:
    """Lengths in [low, high], spread evenly on a logarithmic scale."""
    drawn = np.exp(rng.uniform(np.log(low), np.log(high + 1), count))
    return [min(max(int(length), low), high) for length in drawn]


def unrelated(
    rng: np.random.Generator, count: int, gap_ms: float, prompt: tuple[int, int], output: tuple[int, int]
) -> list[Entry]:
    """Requests that share nothing."""
    rows = zip(
        arrivals(rng, count, gap_ms), lengths(rng, count, *prompt), lengths(rng, count, *output), strict=True
    )
    return [{"arrival": at, "prompt": [[i, 0, p]], "output": o} for i, (at, p, o) in enumerate(rows)]


def with_priorities(rng: np.random.Generator, entries: list[Entry], levels: int) -> list[Entry]:
    """The same requests with priorities of so many levels around 0."""
    return [{**entry, "priority": int(rng.integers(levels)) - levels // 2} for entry in entries]


def with_stops(rng: np.random.Generator, entries: list[Entry], share: float) -> list[Entry]:
    """The same requests, a share of which ends by a stop token."""
    stops = rng.random(len(entries)) < share
    more = rng.integers(1, 40, len(entries))
    return [
        {**entry, "limit": entry["output"] + int(beyond)} if stop else entry
        for entry, stop, beyond in zip(entries, stops, more, strict=True)
    ]


def with_loras(rng: np.random.Generator, entries: list[Entry], adapters: int, share: float) -> list[Entry]:
    """The same requests, a share of which asks for one of so many LoRA adapters."""
    asks = rng.random(len(entries)) < share
    names = rng.integers(adapters, size=len(entries))
    return [
        {**entry, "lora": f"adapter-{name}"} if ask else entry
        for entry, ask, name in zip(entries, asks, names, strict=True)
    ]


def without_ids(
    rng: np.random.Generator, count: int, gap_ms: float, prompt: tuple[int, int], output: tuple[int, int]
) -> list[Entry]:
    """Requests that come without token ids."""
    return [{**e, "prompt": e["prompt"][0][2]} for e in unrelated(rng, count, gap_ms, prompt, output)]


def shared_prefixes(
    rng: np.random.Generator,
    count: int,
    gap_ms: float,
    prefixes: int = 5,
    prefix: tuple[int, int] = (40, 260),
    tail: tuple[int, int] = (1, 90),
    output: tuple[int, int] = (1, 60),
) -> list[Entry]:
    """Each prompt is one of a few prefixes, sometimes cut short, and a tail of its own."""
    prefix_tokens = lengths(rng, prefixes, *prefix)
    entries = []
    rows = zip(
        arrivals(rng, count, gap_ms), lengths(rng, count, *tail), lengths(rng, count, *output), strict=True
    )
    for i, (at, own, out) in enumerate(rows):
        which = int(rng.integers(prefixes))
        cut = prefix_tokens[which] if rng.random() < 0.7 else int(rng.integers(1, prefix_tokens[which] + 1))
        entries.append({"arrival": at, "prompt": [[which, 0, cut], [1000 + i, 0, own]], "output": out})
    return entries


def conversations(
    rng: np.random.Generator,
    count: int,
    gap_ms: float,
    turns: tuple[int, int] = (2, 6),
    tool_ms: float = 60.0,
    output: tuple[int, int] = (2, 50),
) -> list[Entry]:
    """Sessions: a turn's prompt is all that was said before plus new words; all begin with one system
    prompt."""
    entries: list[Entry] = []
    for start in arrivals(rng, count, gap_ms):
        said: list[list[int]] = [[0, 0, 70]]
        for turn in range(int(rng.integers(turns[0], turns[1] + 1))):
            index = len(entries)
            said = [*said, [1 + index, 0, int(rng.integers(3, 80))]]
            entry: Entry = {"prompt": said, "output": lengths(rng, 1, *output)[0]}
            if turn == 0:
                entry["arrival"] = start
            else:
                pause = 0 if rng.random() < 0.25 else int(rng.exponential(tool_ms * MS))
                entry |= {"after": index - 1, "tool": pause}
            entries.append(entry)
            said = [*said, [OUTPUT_STREAM + index, 0, entry["output"]]]
    return entries


def bursts(rng: np.random.Generator, count: int, size: int, gap_ms: float) -> list[Entry]:
    """``size`` requests at the same nanosecond, again and again."""
    entries = unrelated(rng, count, 1.0, (5, 220), (1, 50))
    for i, entry in enumerate(entries):
        entry["arrival"] = int(i // size * gap_ms * MS)
    return entries


def on_block_edges(rng: np.random.Generator, count: int, block: int) -> list[Entry]:
    """Prompts of whole blocks, outputs that end just before, on and after an edge; half of the prompts
    repeat."""
    entries = []
    for i, at in enumerate(arrivals(rng, count, 25.0)):
        stream = int(rng.integers(4)) if i % 2 else 100 + i
        prompt = int(rng.integers(1, 9)) * block
        output = max(1, int(rng.integers(0, 4)) * block + int(rng.integers(-1, 3)))
        entries.append({"arrival": at, "prompt": [[stream, 0, prompt]], "output": output})
    return entries


def identical(rng: np.random.Generator, count: int, gap_ms: float) -> list[Entry]:
    """Few prompts, asked again and again and answered with the same words: blocks of equal content abound."""
    sizes = [(97, 70), (64, 33), (160, 48)]
    entries: list[Entry] = []
    for i, at in enumerate(arrivals(rng, count, gap_ms)):
        which = int(rng.integers(3))
        prompt, output = sizes[which]
        entry = {"prompt": [[which, 0, prompt]], "output": output, "text": 500 + which}
        entries.append({"arrival": at // 3 * 3 if i % 4 else entries[-1]["arrival"] if i else at, **entry})
    return entries


def round_times(rng: np.random.Generator, count: int) -> list[Entry]:
    """Arrivals and tool times on exact multiples of the step time."""
    entries = conversations(rng, count, 40.0, output=(1, 20))
    for entry in entries:
        key = "arrival" if "arrival" in entry else "tool"
        entry[key] = entry[key] // (10 * MS) * (10 * MS)
    return entries


def long_and_short(rng: np.random.Generator, count: int) -> list[Entry]:
    """A few long answers grow while a stream of one- and two-token answers passes by."""
    entries = unrelated(rng, count, 6.0, (1, 70), (1, 3))
    for entry in entries[::12]:
        entry |= {"output": 150, "prompt": [[entry["prompt"][0][0], 0, 30]]}
    return entries


def echoes(rng: np.random.Generator, count: int, gap_ms: float) -> list[Entry]:
    """Short answers, the same ones again and again, that later prompts quote; and a few long answers between.

    A question and its answer fill whole blocks, so it shows whether the last of them is in the cache.
    """
    entries: list[Entry] = []
    for i, at in enumerate(arrivals(rng, count, gap_ms)):
        which, text = int(rng.integers(3)), 700 + int(rng.integers(2))
        question, answer = [which, 0, 15 + 16 * which], 2
        if i % 11 == 0:
            entry: Entry = {"prompt": [[100 + i, 0, 25]], "output": 140}
        elif i % 2:
            entry = {"prompt": [question], "output": answer, "text": text}
        else:
            entry = {"prompt": [question, [text, 0, int(rng.integers(1, 30))]], "output": 2, "text": 800}
        entries.append({"arrival": at, **entry})
    return entries


def together(rng: np.random.Generator, count: int, chunk: int) -> list[Entry]:
    """Groups that arrive together, take different numbers of chunks, and all end at the same step."""
    entries = []
    for i in range(count):
        chunks = int(rng.integers(1, 9))
        prompt = chunk * chunks - int(rng.integers(0, chunk))
        own = [int(rng.integers(4)) if rng.random() < 0.5 else 100 + i, 0, prompt]
        entries.append({"arrival": i // 6 * 250 * MS, "prompt": [own], "output": 24 - chunks})
    return entries


def long_chats(rng: np.random.Generator) -> list[Entry]:
    """Few requests with long answers: long runs of steps that only decode, broken by sparse arrivals."""
    return unrelated(rng, 30, 300.0, (10, 300), (60, 260))


def cycling(rng: np.random.Generator, count: int) -> list[Entry]:
    """More distinct prefixes than the cache holds, used in turn: what is needed next has just been
    evicted."""
    entries = []
    for i, at in enumerate(arrivals(rng, count, 45.0)):
        prefix, own = i % 7 if i % 3 else int(rng.integers(7)), int(rng.integers(1, 40))
        entries.append({"arrival": at, "prompt": [[prefix, 0, 150], [100 + i, 0, own]], "output": 5 + i % 20})
    return entries
