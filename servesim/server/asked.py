"""Reading what a client asks for: OpenAI's request bodies, checked as vLLM checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.server.prompts import chat_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.server.prompts import Tokenizer

_MOST_ANSWERS = 128
_MOST_STOPS = 32
_CHAT_TOKENS = 256
"""Length of a chat's answer where the client sets no limit: a model would end it, and here nothing does."""
_COMPLETION_TOKENS = 16
"""vLLM's default."""


class ApiError(Exception):
    """An answer in OpenAI's form of errors."""

    def __init__(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def body(self) -> dict[str, Any]:
        """What the client gets."""
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status},
        }


@dataclass(slots=True)
class Asked:
    """A call for one or several answers."""

    model: str
    prompts: list[NDArray[np.int64]]
    answers: int = 1
    max_tokens: int | None = None
    """None: not given."""
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    salt: str = ""
    priority: int = 0


def read_completion(body: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> Asked:
    """A body of ``/v1/completions``.

    Raises:
        ApiError: it is not allowed.
    """
    for name in ("echo", "suffix", "logprobs", "prompt_embeds"):
        if body.get(name):
            raise ApiError(400, f"{name}: an emulated server has no model that could give it", param=name)
    if "prompt" not in body:
        raise ApiError(400, "prompt: is required", param="prompt")
    asked = _common(body, "max_tokens")
    asked.prompts = _prompts(body["prompt"], tokenizer, vocab_size)
    if asked.max_tokens is None:
        asked.max_tokens = _COMPLETION_TOKENS
    return asked


def read_chat(body: Mapping[str, Any], tokenizer: Tokenizer) -> Asked:
    """A body of ``/v1/chat/completions``."""
    if body.get("logprobs"):
        raise ApiError(400, "logprobs: an emulated server has no model that could give it", param="logprobs")
    asked = _common(body, "max_completion_tokens", "max_tokens")
    asked.prompts = [_chat_ids(body.get("messages"), tokenizer, "messages")]
    return asked


def read_response(body: Mapping[str, Any], tokenizer: Tokenizer) -> Asked:
    """A body of ``/v1/responses``."""
    if body.get("previous_response_id"):
        raise ApiError(400, "previous_response_id: answers are not kept", param="previous_response_id")
    asked = _common(body, "max_output_tokens")
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if isinstance(messages, list) and isinstance(body.get("instructions"), str):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    asked.prompts = [_chat_ids(messages, tokenizer, "input")]
    return asked


def _chat_ids(messages: Any, tokenizer: Tokenizer, name: str) -> NDArray[np.int64]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ApiError(400, f"{name}: must be a list of messages with role and content", param=name)
    return np.array(tokenizer.encode(chat_text(messages)), dtype=np.int64)


def _common(body: Mapping[str, Any], *lengths: str) -> Asked:
    model = body.get("model", "")
    if not isinstance(model, str):
        raise ApiError(400, "model: must be a name", param="model")
    asked = Asked(model, [])
    asked.answers = _whole(body, "n", 1, 1, _MOST_ANSWERS)
    for name in lengths:
        if body.get(name) is not None:
            asked.max_tokens = _whole(body, name, 0, 1, 1 << 40)
            break
    asked.min_tokens = _whole(body, "min_tokens", 0, 0, 1 << 40)
    asked.ignore_eos = _flag(body, "ignore_eos")
    asked.stream = _flag(body, "stream")
    options = body.get("stream_options") or {}
    asked.include_usage = isinstance(options, dict) and _flag(options, "include_usage")
    asked.priority = _whole(body, "priority", 0, -(1 << 31), 1 << 31)
    stop = body.get("stop") or []
    asked.stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(asked.stop, list) or not all(isinstance(word, str) for word in asked.stop):
        raise ApiError(400, "stop: must be a text or a list of texts", param="stop")
    if len(asked.stop) > _MOST_STOPS:
        raise ApiError(
            400, f"stop: {len(asked.stop)} texts; at most {_MOST_STOPS} are looked for", param="stop"
        )
    salt = body.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise ApiError(400, "cache_salt: must be a text", param="cache_salt")
    asked.salt = salt
    if asked.max_tokens is not None and asked.min_tokens > asked.max_tokens:
        raise ApiError(
            400,
            f"min_tokens: {asked.min_tokens} is more than max_tokens {asked.max_tokens}",
            param="min_tokens",
        )
    return asked


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ApiError(
            400, f"{name}: {value!r} is not allowed; must be a whole number >= {least}", param=name
        )
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: {value!r} is not allowed; must be true or false", param=name)
    return bool(value)


def _prompts(given: Any, tokenizer: Tokenizer, vocab_size: int) -> list[NDArray[np.int64]]:
    """One prompt or several, each as text or as token ids."""
    if isinstance(given, str):
        return [np.array(tokenizer.encode(given), dtype=np.int64)]
    if isinstance(given, list) and given:
        if all(isinstance(each, str) for each in given):
            return [np.array(tokenizer.encode(each), dtype=np.int64) for each in given]
        if all(isinstance(each, list) for each in given):
            return [_ids(each, vocab_size) for each in given]
        return [_ids(given, vocab_size)]
    raise ApiError(400, "prompt: must be a text, token ids, or a list of either", param="prompt")


def _ids(given: Sequence[Any], vocab_size: int) -> NDArray[np.int64]:
    if not set(map(type, given)) <= {int} or (given and not 0 <= min(given) <= max(given) < vocab_size):
        raise ApiError(400, f"prompt: token ids must be whole numbers below {vocab_size}", param="prompt")
    return np.array(given, dtype=np.int64)


def chat_limit(asked: Asked) -> int:
    """Tokens of a chat's answer as far as the client has a say."""
    return _CHAT_TOKENS if asked.max_tokens is None else asked.max_tokens
