"""Loading a workload of any known format; the format is found by looking at the content.

A format is a line of `FORMATS`: its name, how its first line is known, and the reader that makes a workload
of numbered lines.
"""

from __future__ import annotations

import re
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.workload.files import numbered_lines, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from servesim.workload.request import Workload

KNOWN = (
    "JSON lines of requests and sessions, Mooncake and Bailian traces, CSV traces (Azure, BurstGPT, "
    "simulators), results of vLLM, SGLang, GuideLLM, AIPerf and genai-perf, agents' traces, conversations "
    "and OpenAI batches (by --tokenizer or --estimate-tokens), inference-perf specs, and any JSON lines or "
    "CSV by --columns"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a workload file is read."""

    num_reqs: int = 0
    """Entries to load from the start of the file, 0 for all; a session is one entry."""
    lenient: bool = False
    """Leave bad entries out and count them, where otherwise the first ends the loading."""
    seed: int = 42
    """For what the file leaves to chance."""
    keeps_arrivals: bool = True
    """Whether the arrivals are used as they are; else none are made where the file has none."""
    tokenizer: str | Path | None = None
    """A ``tokenizer.json`` or a folder with one, for files that hold texts."""
    estimate_tokens: float | None = None
    """Characters to a token, for files that hold texts and no tokenizer is at hand."""
    columns: str | None = None
    """Which columns or keys mean what, see `columns`."""


class Reader(Protocol):
    """Makes a workload of the numbered lines of a file; the source is its name in messages."""

    def __call__(self, source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload: ...


@dataclass(frozen=True, slots=True)
class Format:
    """A format of workload files."""

    name: str
    home: str
    """Its `Reader`, as module:function in this package."""
    keys: Callable[[dict[str, Any]], bool] | None = None
    """Whether a JSON object, the first line or the whole file, is of this format."""
    mark: re.Pattern[bytes] | None = None
    """What is found in a file of this format that is one JSON document over many lines."""
    texts: bool = False
    """Whether it holds texts instead of token counts."""

    @property
    def reader(self) -> Reader:
        module, _, name = self.home.partition(":")
        found: Reader = getattr(import_module(f"servesim.workload.{module}"), name)
        return found


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: any(name in entry for name in names)


def _all(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: all(name in entry for name in names)


def _key(*names: bytes) -> re.Pattern[bytes]:
    return re.compile(b"|".join(b'"%s"\\s*:' % name for name in names))


JSONL = Format("JSON lines", "jsonl:load_jsonl", _has("input_toks", "sub_requests"))
CSV = Format("CSV", "csv_traces:load_csv_trace")
SPEC = Format("inference-perf spec", "load_spec:load_spec")
CLIENT_RESULT = Format(
    "result of vLLM or SGLang",
    "bench_result:load_bench_result",
    _has("input_lens", "total_token_throughput", "random_input_len"),
    _key(b"input_lens", b"total_token_throughput"),
)
FORMATS = (
    JSONL,
    Format("conversations", "texts:load_conversations", _has("conversations", "conversation"), texts=True),
    Format("OpenAI batch", "texts:load_batch", _all("custom_id", "body"), texts=True),
    Format("OpenAI batch answers", "texts:load_batch_answers", _all("custom_id", "response")),
    CLIENT_RESULT,
    Format("AIPerf records", "client_records:load_aiperf", _all("metadata", "metrics")),
    Format("GuideLLM result", "client_records:load_guidellm", _has("benchmarks"), _key(b"benchmarks")),
    Format(
        "genai-perf records",
        "texts:load_genai_perf",
        _has("experiments"),
        _key(b"experiments"),
        texts=True,
    ),
    Format("agents' trace", "agents:load_agents", _all("requests", "block_size"), _key(b"hash_id_scope")),
    Format("ServeGen", "client_records:load_servegen", _all("request_id", "timestamp", "data")),
    Format(
        "texts with times", "texts:load_timed_texts", _has("text_input", "messages", "prompt"), texts=True
    ),
    Format(
        "Mooncake trace",
        "mooncake:load_mooncake",
        _has("input_length", "hash_ids", "input_tokens", "isl"),
    ),
    CSV,
    SPEC,
)
"""In the order in which they are tried."""
_SPEC = re.compile(rb"\s*(load|data|api|server|tokenizer|metrics|report|storage)\s*:")


def load_workload(
    path: str | Path,
    *,
    num_reqs: int = 0,
    lenient: bool = False,
    request_rate: float | None = None,
    seed: int = 42,
    tokenizer: str | Path | None = None,
    estimate_tokens: float | None = None,
    columns: str | None = None,
) -> Workload:
    """The workload in the file `path`; ``-`` reads the standard input.

    request_rate: entries per second that the arrivals are scaled to, or replaced by where there is no pattern
    to scale (see `arrivals.change_rate`; `seed` is for that); None: arrivals as they are. The others: see
    `Loading`.

    Raises InputError with file, line and field for anything wrong.
    """
    loading = Loading(
        num_reqs=num_reqs,
        lenient=lenient,
        seed=seed,
        keeps_arrivals=request_rate is None,
        tokenizer=tokenizer,
        estimate_tokens=estimate_tokens,
        columns=columns,
    )
    _check(loading)
    piped = str(path) == "-"
    source = "standard input" if piped else str(path)
    lines = numbered_lines(path if piped else resolve(path), source)
    try:
        first = next(lines)
    except StopIteration:
        again = ", or was read before" if piped else ""
        raise InputError(f"{source}: is empty{again}; a workload needs at least one request") from None
    workload = _load(source, first, lines, loading)
    if request_rate is not None:
        from servesim.workload.arrivals import change_rate

        change_rate(workload, request_rate, seed)
    return workload


def _check(loading: Loading) -> None:
    if loading.num_reqs < 0:
        raise InputError(f"num_reqs: {loading.num_reqs} is not possible; must be >= 0, and 0 loads all")
    if loading.tokenizer is not None and loading.estimate_tokens is not None:
        raise InputError("--estimate-tokens: counts tokens without a tokenizer; leave --tokenizer out")
    if loading.estimate_tokens is not None and not 0.1 <= loading.estimate_tokens <= 100:
        raise InputError(
            f"--estimate-tokens: {loading.estimate_tokens} characters to a token are not possible; must be "
            "from 0.1 to 100 (English: about 4)"
        )


def _load(
    source: str, first: tuple[int, bytes], rest: Iterator[tuple[int, bytes]], loading: Loading
) -> Workload:
    lines: Iterator[tuple[int, bytes]] = chain([first], rest)
    if loading.columns is not None:
        from servesim.workload.columns import load_columns

        return load_columns(source, lines, loading)
    known = detect(first[1])
    if known is None and first[1].strip() in (b"{", b"[", b"[{"):  # a document printed over many lines
        whole = list(lines)
        known = _detect_document(whole)
        lines = iter(whole)
    if known is None:
        raise InputError(
            f"{source}:{first[0]}: is no known workload format (starts with {first[1][:40]!r}); "
            f"known are {KNOWN}"
        )
    _check_used(source, known, loading)
    return known.reader(source, lines, loading)


def _check_used(source: str, known: Format, loading: Loading) -> None:
    """Refuse what changes nothing for a format."""
    texts = {"--tokenizer": loading.tokenizer, "--estimate-tokens": loading.estimate_tokens}
    for flag, value in texts.items():
        if value is not None and not known.texts:
            raise InputError(
                f"{flag} {value}: {source} holds token counts already; only a file of texts needs one"
            )


def detect(line: bytes) -> Format | None:
    """The format of a file by its first line; None: it takes more than that, or is unknown."""
    line = line.strip()
    if line.startswith(b"{"):
        return _detect_object(line)
    if line.startswith(b"["):
        return _detect_list(line)
    from servesim.workload.csv_traces import is_csv

    if _SPEC.match(line) or line.startswith((b"#", b"---")):
        return SPEC
    if is_csv(line):
        return CSV
    # any other line is shown as a bad line of the main format, unless it is not even text
    return JSONL if line.isascii() and line[:1] in b'"-0123456789tfn' else None


def _detect_object(line: bytes) -> Format | None:
    if line == b"{":
        return None
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        # the figures of a benchmark may hold NaN, which orjson refuses
        return CLIENT_RESULT if b'"input_lens"' in line else JSONL
    return next((known for known in FORMATS if known.keys and known.keys(entry)), JSONL)


def _detect_list(line: bytes) -> Format | None:
    try:
        entries = orjson.loads(line)
    except orjson.JSONDecodeError:
        entries = None
    if isinstance(entries, list) and entries and isinstance(entries[0], dict):
        found = next((known for known in FORMATS if known.keys and known.keys(entries[0])), None)
        return found if found is not None and found.texts else CLIENT_RESULT
    return _CONVERSATIONS if b'"conversation' in line else None


def _detect_document(lines: list[tuple[int, bytes]]) -> Format:
    """The format of a file that is one JSON document, printed over many lines."""
    known = [each for each in FORMATS if each.mark]
    for _, line in lines:
        for each in known:
            if each.mark and each.mark.search(line):
                return each
        if b'"conversation' in line:
            return _CONVERSATIONS
    return CLIENT_RESULT


_CONVERSATIONS = FORMATS[1]
