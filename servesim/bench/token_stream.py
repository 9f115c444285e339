"""What a streaming answer of an OpenAI-compatible server says, chunk by chunk, and when."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import orjson

from servesim.slotted import dataclass

_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_LONGEST_MESSAGE = 500  # characters of a server's error that are kept
_LONGEST_LINE = 4 << 20  # bytes of one event: log-probabilities of a whole answer have less


class RequestFailedError(Exception):
    """A request that the server did not answer in full."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None: the connection failed or the stream broke off."""
        self.message = message


class EventLines:
    """Cuts a byte stream, however it was split on its way, into the payloads of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads of the ``data:`` lines that ``data`` completes.

        Raises:
            RequestFailedError: a line does not end.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise RequestFailedError(None, f"the server streamed a line of more than {_LONGEST_LINE:,} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(slots=True)
class TokenStream:
    """The tokens of one answer, each with the time its chunk was received."""

    counted: bool
    """Whether every chunk says how many tokens there are so far (vLLM's continuous usage statistics)."""
    most_tokens: int
    """A server that sends more does not do what it was asked for, and might never end."""
    token_s: list[float] = field(default_factory=list)
    """Receipt of every token; of every chunk with text where chunks say no count."""
    prompt_tokens: int | None = None
    total_tokens: int | None = None
    """Tokens generated, by the server's own count."""
    finished: bool = False

    def take(self, payload: bytes, now_s: float) -> None:
        """Note one event received at ``now_s``.

        Raises:
            RequestFailedError: the event is an error, no JSON object of the expected form, or one token too
                many.
        """
        if payload == b"[DONE]":
            self.finished = True
            return
        event = _parsed(payload)
        if event.get("error"):
            raise RequestFailedError(_status(event["error"]), error_text(event))
        usage, choices = _fields(event, "usage"), event.get("choices") or []
        self.prompt_tokens = _count(usage, "prompt_tokens", self.prompt_tokens)
        self.total_tokens = _count(usage, "completion_tokens", self.total_tokens)
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RequestFailedError(None, "the server streamed choices that are no list of objects")
        if max(self.total_tokens or 0, len(self.token_s)) > self.most_tokens:
            raise RequestFailedError(None, f"the server sent more than {self.most_tokens:,} tokens")
        if not choices:
            return
        if self.counted and usage:
            new = (self.total_tokens or 0) - len(self.token_s)
        else:
            new = 1 if _has_text(choices[0]) else 0
        self.token_s += [now_s] * new
        self.finished = self.finished or bool(choices[0].get("finish_reason"))

    @property
    def output_tokens(self) -> int:
        """Tokens generated: the server's count, else the number of chunks with text."""
        return len(self.token_s) if self.total_tokens is None else self.total_tokens


def error_text(answer: Any) -> str:
    """The message in a server's error answer: ``{"error": {"message": …}}``, ``{"detail": …}``, any text."""
    found = answer
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else orjson.dumps(found).decode()
    return " ".join(text.split())[:_LONGEST_MESSAGE]


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        event = None
    if not isinstance(event, dict):
        shown = payload[:80].decode(errors="replace")
        raise RequestFailedError(None, f"the server streamed something that is no JSON object: {shown!r}")
    return event


def _fields(event: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; empty where there is none."""
    found = event.get(key) or {}
    if not isinstance(found, dict):
        raise RequestFailedError(None, f"the server streamed a {key} that is no object")
    return found


def _count(usage: dict[str, Any], key: str, before: int | None) -> int | None:
    """A number of tokens; ``before`` where this event does not say it."""
    found = usage.get(key)
    if found is None:
        return before
    if type(found) is not int or not 0 <= found < 2**31:
        raise RequestFailedError(None, f"the server streamed {key} that are no number of tokens")
    return found


def _has_text(choice: dict[str, Any]) -> bool:
    delta = _fields(choice, "delta")
    return bool(choice.get("text")) or any(delta.get(key) for key in _TEXT_KEYS)


def _status(error: Any) -> int | None:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else None
