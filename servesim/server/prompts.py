"""Tokens in and out: prompts by a local tokenizer or an estimate, answers of filler words.

The estimate cuts a text at white space and after six characters, which gives about 1.3 tokens a word of
English. A filler word is one token in both, so an answer that a client sends back as history has the tokens
it had, and hits the prefix cache as it would in a real server.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np
import orjson

from servesim.errors import InputError
from servesim.workload.texts import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_PIECE = re.compile(r"\s*\S{1,6}|\s+")
_WORDS = """
time year people way day man thing woman life child world school state family group hand part
place case week system work number night point home water room mother area money story fact
month lot right study book eye job word side kind head house friend father power hour game line
end member law car city team
""".split()  # noqa: SIM905 - a list of them is far longer


class Tokenizer(Protocol):
    """Between text and token ids."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Estimate:
    """A tokenizer that needs no file; equal beginnings of two texts have equal tokens."""

    def __init__(self, vocab_size: int, most_tokens: int) -> None:
        """
        Args:
            vocab_size: token ids are below it.
            most_tokens: of a text that are of interest; one more of a longer text is given, and no others.
        """
        self._vocab_size = vocab_size
        self._most_tokens = most_tokens
        self._words = {self._id(f" {word}"): f" {word}" for word in _WORDS}

    def encode(self, text: str) -> list[int]:
        pieces = islice(_PIECE.finditer(text), self._most_tokens + 1)
        return [self._id(piece.group()) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Filler words as they were; other tokens by their number, for their text is not known."""
        return "".join(self._words.get(number, f" <{number}>") for number in ids)

    def _id(self, piece: str) -> int:
        return crc32(piece.encode("utf-8", "surrogatepass")) % self._vocab_size


class LocalTokenizer:
    """A ``tokenizer.json`` on this machine, read by the ``tokenizers`` package (extra ``tokenizer``)."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            InputError: the package or the file is missing, or the file is no tokenizer.
        """
        self._loaded = load_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._loaded.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._loaded.decode(list(ids), skip_special_tokens=False)
        return text


class Filler:
    """Answers: words of one token each."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._seed = seed
        words = {}
        for word in _WORDS:
            ids = tokenizer.encode(f" {word}")
            if len(ids) == 1:
                words[ids[0]] = f" {word}"
        if not words:
            raise InputError("--tokenizer: none of its tokens is an English word, so it has no filler")
        self._ids = np.array(list(words), dtype=np.int64)
        self._text = words
        self._quoted = {number: orjson.dumps(word) for number, word in words.items()}

    def ids(self, length: int, number: int) -> NDArray[np.int64]:
        """The tokens of answer ``number``, shape (length,)."""
        drawn = np.random.default_rng((self._seed, number)).integers(0, len(self._ids), length)
        chosen: NDArray[np.int64] = self._ids[drawn]
        return chosen

    def text(self, ids: NDArray[np.int64], start: int, end: int) -> str:
        """The text of tokens ``start`` to ``end``."""
        return "".join(self._text[number] for number in ids[start:end].tolist())

    def quoted(self, ids: NDArray[np.int64], start: int, end: int) -> list[bytes]:
        """The texts of tokens ``start`` to ``end``, each as JSON."""
        return [self._quoted[ids.item(place)] for place in range(start, end)]


class OutputLength:
    """How long an answer gets."""

    def __init__(self, rule: str, seed: int) -> None:
        """
        Args:
            rule: ``request``, ``echo`` or a distribution such as ``lognormal:200:150:1:2000``.
            seed: of the draws.

        Raises:
            InputError: the rule is none of these.
        """
        from servesim.workload.generators import parse_distribution

        self.rule = rule
        self._seed = seed
        fixed = rule in ("request", "echo")
        self._drawn = None if fixed else parse_distribution(rule, "--output-tokens")

    def tokens(
        self, asked: int | None, prompt: int, room: int, number: int, *, whole: bool
    ) -> tuple[int, bool]:
        """(tokens of answer ``number``, whether its limit and not the model ends it).

        Args:
            asked: ``max_tokens``; None: not given.
            prompt: tokens of the prompt.
            room: tokens that the context leaves.
            number: of the answer.
            whole: ``ignore_eos``: the model does not end it.
        """
        most = min(room, asked) if asked is not None else room
        if self.rule == "echo":
            wanted = prompt
        elif self._drawn is not None:
            wanted = int(self._drawn.draw_whole(1, np.random.default_rng((self._seed, number, 1)))[0])
        else:
            return most, True
        return (most, True) if whole or wanted >= most else (wanted, False)


def chat_text(messages: Sequence[dict[str, Any]]) -> str:
    """Messages as one prompt. Templates of models differ; this one has a line for each role.

    It ends where the answer begins, so that the answer can follow it unchanged in the next turn.
    """
    parts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        answer = message.get("role") == "assistant"
        text = "" if content is None else str(content)
        parts.append(f"<|{message.get('role')}|>{text if answer else f' {text}'}\n")
    return "".join(parts) + "<|assistant|>"
