"""ShareGPT files: conversations as text, ``{"conversations": [{"from": "human", "value": ...}, ...]}``.

As in vLLM's benchmark, a conversation gives one request: what the human says first is the prompt, and the
answer that follows is the output; conversations without the two give none. Texts become token ids, so that
prompts that begin alike share their prefix. The prompt gets the special tokens that the tokenizer puts around
a text, as a server does with a completion; the output is the answer's own tokens.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from servesim.errors import InputError, MissingFileError
from servesim.workload.entries import EntryError, collect, shown
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")
"""Names in ``from``, in the published files."""
FILE = "tokenizer.json"


def load_sharegpt(
    source: str,
    lines: Iterable[tuple[int, bytes]],
    tokenizer: str | Path | None,
    *,
    num_reqs: int = 0,
    lenient: bool = False,
) -> Workload:
    """The first exchange of every conversation, all at time 0: the file has no times.

    ``lines`` hold one list of conversations, or a conversation each. Conversations without an exchange are
    counted in `Workload.skipped`.
    """
    if tokenizer is None:
        raise InputError(
            f"{source}: is a ShareGPT file, which holds texts; turn them into tokens once, with your model's "
            f"tokenizer (a {FILE} or a folder with one; pip install 'servesim[tokenizer]'):  "
            f"{convert_command(source)}"
        )
    encode = load_tokenizer(tokenizer).encode

    def requests(conversation: object, index: int) -> list[Request]:
        exchange = first_exchange(conversation)
        if exchange is None:
            return []
        prompt = np.array(encode(exchange[0]).ids, dtype=np.int64)
        answer = np.array(encode(exchange[1], add_special_tokens=False).ids, dtype=np.int64)
        if not len(prompt) or not len(answer):
            return []
        return [Request(index, len(prompt), len(answer), 0, input_ids=prompt, output_ids=answer)]

    items, place = _conversations(source, lines)
    return collect(source, items, requests, num_reqs=num_reqs, lenient=lenient, place=place)


def convert_command(source: str) -> str:
    """The command line that makes a workload of a ShareGPT file."""
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
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list):
        raise EntryError(f"conversations: {shown(turns)} is not a list of turns")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise EntryError(f"conversations[{number}]: {shown(turn)} is not a turn; must be an object")
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                raise EntryError(f"conversations[{number}].{key}: {shown(turn.get(key))} is not a text")
        said.append((turn["from"], turn["value"]))
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
