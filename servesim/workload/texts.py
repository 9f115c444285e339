"""Files of texts instead of token counts: conversations, batches of API calls, and requests with a prompt.

- ShareGPT, ``{"conversations": [{"from": "human", "value": ...}, ...]}``, and LMSYS-Chat and WildChat,
  ``{"conversation": [{"role": "user", "content": ...}, ...]}``. As in vLLM's benchmark, a conversation gives
  one request: what the human says first is the prompt, and the answer that follows is the output;
  conversations without the two give none.
- OpenAI batches, ``{"custom_id": ..., "body": {"messages": [...], "max_tokens": N}}``; the answers to a batch
  say their token counts and need no tokenizer.
- requests with a text, ``{"text_input" or "prompt" or "messages": ..., "output_length": N, "timestamp":
  ms}``.
- genai-perf's ``profile_export.json``: payloads and times of what was sent and received.

Texts become token ids, so that prompts that begin alike share their prefix. The prompt gets the special
tokens that the tokenizer puts around a text, as a server does with a completion, and no chat template; the
output is the answer's own tokens. Without a tokenizer, a number of characters counts as a token: see
`Estimate`.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from servesim.errors import InputError, MissingFileError
from servesim.workload.arrivals import start_at_zero
from servesim.workload.entries import MAX_TOKENS, EntryError, collect, shown, whole_number
from servesim.workload.mooncake import json_object, time_ns
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from servesim.workload.formats import Loading

_log = logging.getLogger("servesim")
ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")
"""Names in ``from`` or ``role``, in the published files."""
FILE = "tokenizer.json"
_MS = 1_000_000


class Encoder(Protocol):
    """Makes token ids of a text."""

    def __call__(self, text: str, *, prompt: bool) -> NDArray[np.int64]:
        """Ids of ``text``, shape (tokens,). ``prompt``: with the tokens that stand around a prompt."""


class Estimate:
    """Counts a number of characters as a token; texts that begin alike begin with the same ids.

    English has about 4 characters to a token with the tokenizers of 2023 to 2026, source code about 3 and
    Chinese about 1.5: the count of one text is often 20 % off, which is said when a file is loaded.
    """

    def __init__(self, characters: float) -> None:
        self._characters = characters

    def __call__(self, text: str, *, prompt: bool) -> NDArray[np.int64]:
        del prompt
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        if not len(points):
            return np.empty(0, dtype=np.int64)
        tokens = math.ceil(len(points) / self._characters)
        starts = np.floor(np.arange(tokens) * self._characters).astype(np.int64)
        # a polynomial of the characters so far, taken at the end of each token: equal as long as all is equal
        steps = np.arange(1, len(points) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = np.cumsum((points.astype(np.uint64) + np.uint64(1)) * (steps | np.uint64(1)))
        ends = np.minimum(np.append(starts[1:], len(points)), len(points)) - 1
        ids: NDArray[np.int64] = (mixed[ends] >> np.uint64(2)).astype(np.int64)
        return ids


def encoder_of(source: str, loading: Loading) -> Encoder:
    """What makes tokens of the texts in ``source``.

    Raises:
        InputError: neither a tokenizer nor an estimate was asked for.
    """
    if loading.estimate_tokens is not None:
        _log.warning(
            "%s: token counts are estimates, %g characters to a token; they are often 20 %% off",
            source,
            loading.estimate_tokens,
        )
        return Estimate(loading.estimate_tokens)
    if loading.tokenizer is None:
        raise InputError(
            f"{source}: holds texts; turn them into tokens once, with your model's tokenizer (a {FILE} or a "
            "folder with one; pip install 'servesim[tokenizer]'), or count characters with "
            f"--estimate-tokens:  {convert_command(source)}"
        )
    encode = load_tokenizer(loading.tokenizer).encode

    def encoded(text: str, *, prompt: bool) -> NDArray[np.int64]:
        return np.array(encode(text, add_special_tokens=prompt).ids, dtype=np.int64)

    return encoded


def load_conversations(source: str, lines: Iterable[tuple[int, bytes]], loading: Loading) -> Workload:
    """The first exchange of every conversation, all at time 0: the files have no times of arrival.

    ``lines`` hold one list of conversations, or a conversation each. Conversations without an exchange are
    counted in `Workload.skipped`.
    """
    encode = encoder_of(source, loading)

    def requests(conversation: object, index: int) -> list[Request]:
        exchange = first_exchange(conversation)
        if exchange is None:
            return []
        prompt, answer = encode(exchange[0], prompt=True), encode(exchange[1], prompt=False)
        if not len(prompt) or not len(answer):
            return []
        return [Request(index, len(prompt), len(answer), 0, input_ids=prompt, output_ids=answer)]

    items, place = _conversations(source, lines)
    return collect(source, items, requests, num_reqs=loading.num_reqs, lenient=loading.lenient, place=place)


def load_batch(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The calls of an OpenAI batch, all at time 0; an answer is as long as the call allows."""
    encode = encoder_of(source, loading)

    def requests(line: bytes, index: int) -> list[Request]:
        body = json_object(line).get("body")
        if not isinstance(body, dict):
            raise EntryError(f"body: {shown(body)} is not an object; must be the body of a call")
        limits = (body.get(key) for key in ("max_completion_tokens", "max_output_tokens", "max_tokens"))
        limit = next((limit for limit in limits if limit is not None), None)
        if limit is None:
            raise EntryError(
                "body.max_tokens: is missing; how long an answer gets is not known then: set it, or give the "
                "file with the answers"
            )
        output_tokens = whole_number(limit, "body.max_tokens", 1, MAX_TOKENS)
        prompt = encode(_prompt_of(body, "body."), prompt=True)
        return [_request(index, prompt, output_tokens, 0)]

    return collect(source, lines, requests, num_reqs=loading.num_reqs, lenient=loading.lenient)


def load_batch_answers(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The calls that the answers of an OpenAI batch tell of, by their ``usage``; failed ones are left out."""

    def requests(line: bytes, index: int) -> list[Request]:
        response = json_object(line).get("response")
        body = response.get("body") if isinstance(response, dict) else None
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return []
        counts = []
        for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
            name = names[1] if names[1] in usage else names[0]
            counts.append(whole_number(usage.get(name), f"response.body.usage.{name}", 1, MAX_TOKENS))
        return [Request(index, counts[0], counts[1], 0)]

    return collect(source, lines, requests, num_reqs=loading.num_reqs, lenient=loading.lenient)


def load_timed_texts(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """Requests that have a text and the length of the answer; ``timestamp`` in ms where there is one."""
    encode = encoder_of(source, loading)

    def requests(line: bytes, index: int) -> list[Request]:
        entry = json_object(line)
        lengths = ("output_length", "output_tokens", "max_tokens")
        name = next((name for name in lengths if name in entry), lengths[0])
        output_tokens = whole_number(entry.get(name), name, 1, MAX_TOKENS)
        arrival_ns = time_ns(entry.get("timestamp", 0), "timestamp", "milliseconds", _MS)
        return [_request(index, encode(_prompt_of(entry, ""), prompt=True), output_tokens, arrival_ns)]

    workload = collect(source, lines, requests, num_reqs=loading.num_reqs, lenient=loading.lenient)
    start_at_zero(workload)
    return workload


def load_genai_perf(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """What genai-perf sent in the first experiment of its ``profile_export.json``.

    An output has the tokens that its usage tells, else as many as parts with content came.
    """
    from servesim.workload.bench_result import of_document, whole_document

    encode = encoder_of(source, loading)
    experiments = whole_document(source, lines)["experiments"]
    first = experiments[0] if isinstance(experiments, list) and experiments else None
    sent = first.get("requests") if isinstance(first, dict) else None
    if not isinstance(sent, list):
        raise InputError(f"{source}: experiments[0].requests: is missing; must be a list of requests")
    if len(experiments) > 1:
        _log.warning("%s: holds %d experiments: the first is taken", source, len(experiments))

    def requests(entry: object, index: int) -> list[Request]:
        if not isinstance(entry, dict) or not isinstance(entry.get("request_inputs"), dict):
            raise EntryError(f"{shown(entry)} is no request; must have request_inputs")
        try:
            payload = json.loads(entry["request_inputs"].get("payload", "{}"))
        except (TypeError, ValueError):
            raise EntryError("request_inputs.payload: is no JSON; must be the body of a call") from None
        outputs = entry.get("response_outputs")
        answered = _answered(outputs, encode) if isinstance(outputs, list) else 0
        if not answered:
            return []
        stamp = whole_number(entry.get("timestamp"), "timestamp", 0, 2**63 - 1)
        return [_request(index, encode(_prompt_of(payload, "payload."), prompt=True), answered, stamp)]

    return of_document(source, sent, requests, loading)


def _answered(outputs: list[Any], encode: Encoder) -> int:
    """Tokens of an answer: as its usage says, else the parts with content, else those of its text.

    What perf_analyzer notes as one response can hold several events, or a piece of one.
    """
    words = ""
    for output in outputs:
        piece = str(output.get("response") or "") if isinstance(output, dict) else ""
        words += ("\n\n" if piece.startswith(("data:", "event:", ":", "{")) else "") + piece
    parts = 0
    for event in words.split("\n\n"):
        data = "".join(line.removeprefix("data:") for line in event.splitlines() if line[:1] in ("d", "{"))
        try:
            told = json.loads(data)
            counted = (told.get("usage") or {}).get("completion_tokens")
            choice = (told.get("choices") or [{}])[0]
        except (ValueError, AttributeError, IndexError, TypeError):
            continue  # the last event is [DONE]
        if isinstance(counted, int) and counted > 0 and not isinstance(counted, bool):
            return counted
        said = choice.get("delta", choice) if isinstance(choice, dict) else {}
        if isinstance(whole := said.get("message"), dict):
            return len(encode(str(whole.get("content") or ""), prompt=False))
        parts += bool(said.get("content") or said.get("text") or said.get("reasoning_content"))
    return parts


def _request(index: int, prompt: NDArray[np.int64], output_tokens: int, arrival_ns: int) -> Request:
    if not len(prompt):
        raise EntryError("the prompt is empty; must have at least one token")
    return Request(index, len(prompt), output_tokens, arrival_ns, input_ids=prompt)


def _prompt_of(body: dict[str, Any], where: str) -> str:
    """The text of a call: its messages one after the other, or its prompt."""
    for key in ("messages", "input"):
        if isinstance(body.get(key), list):
            return "\n".join(_content(message, f"{where}{key}[{i}]") for i, message in enumerate(body[key]))
    for key in ("text_input", "prompt", "input"):
        if isinstance(body.get(key), str):
            return str(body[key])
    raise EntryError(f"{where}messages: is missing; must be a list of messages, or prompt a text")


def _content(message: object, where: str) -> str:
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, list):  # parts; pictures and sounds have no text
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    if content is None:
        return ""  # a call of a tool
    if not isinstance(content, str):
        raise EntryError(f"{where}.content: {shown(content)} is not a text")
    return content


def convert_command(source: str) -> str:
    """The command line that makes a workload of a file of texts."""
    output = f"{Path(source).name.split('.')[0]}.jsonl"
    return (
        f"servesim workload convert {shlex.quote(source)} --tokenizer PATH --request-rate 10 "
        f"--output {shlex.quote(output)}"
    )


def first_exchange(conversation: object) -> tuple[str, str] | None:
    """What the human says first and what is answered; None: there is no such pair.

    Raises:
        EntryError: it is no conversation.
    """
    found = conversation if isinstance(conversation, dict) else {}
    name = "conversation" if "conversation" in found else "conversations"
    who_key, said_key = ("role", "content") if name == "conversation" else ("from", "value")
    turns = found.get(name)
    if not isinstance(turns, list):
        raise EntryError(f"{name}: {shown(turns)} is not a list of turns")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise EntryError(f"{name}[{number}]: {shown(turn)} is not a turn; must be an object")
        for key in (who_key, said_key):
            if not isinstance(turn.get(key), str):
                raise EntryError(f"{name}[{number}].{key}: {shown(turn.get(key))} is not a text")
        said.append((turn[who_key], turn[said_key]))
    asked = next((at for at, (who, _) in enumerate(said) if who in ASKING), len(said))
    if asked + 1 >= len(said) or said[asked + 1][0] not in ANSWERING:
        return None
    return said[asked][1], said[asked + 1][1]


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer in ``path``, a ``tokenizer.json`` or a folder with one.

    Raises:
        InputError: there is none, it is malformed, or the package ``tokenizers`` is not installed.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    if not file.is_file():
        raise MissingFileError(
            f"--tokenizer {path}: no such file; give a {FILE}, or a folder with one (models on Hugging Face "
            "have it beside config.json)"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "--tokenizer: needs the package tokenizers; install it with  pip install 'servesim[tokenizer]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain exceptions
        raise InputError(f"--tokenizer {file}: is no {FILE}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _conversations(
    source: str, lines: Iterable[tuple[int, bytes]]
) -> tuple[Iterator[tuple[int, object]], str]:
    """Numbered conversations, and what stands between the file's name and the number in a message."""
    rest = iter(lines)
    first = next(rest)
    if first[1].lstrip().startswith(b"["):
        document = b"\n".join([first[1], *(line for _, line in rest)])
        try:
            found = orjson.loads(document)
        except orjson.JSONDecodeError as error:
            raise InputError(
                f"{source}: is not one whole JSON list: line {error.lineno} column {error.colno}: "
                f"{error.msg}; get the file again"
            ) from None
        return enumerate(found, 1), ": conversation "

    def parsed() -> Iterator[tuple[int, object]]:
        for number, line in (first, *rest):
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None

    return parsed(), ":"
