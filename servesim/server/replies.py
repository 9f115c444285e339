"""Answers in the forms of OpenAI's interfaces, whole or as server-sent events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.server.live import Stream
    from servesim.server.prompts import Filler

_HERE = "@text@"
_DONE = b"data: [DONE]\n\n"


class Reply:
    """What a call gets back."""

    prefix = ""
    kind = ""
    part_kind = ""

    def __init__(
        self, number: str, created: int, model: str, streams: Sequence[Stream], filler: Filler
    ) -> None:
        """
        Args:
            number: ends the id of the answer.
            created: time in s.
            model: the name that the client asked for.
            streams: its answers, in order.
            filler: what they say.
        """
        self.streams = streams
        self._filler = filler
        self._places = {stream: place for place, stream in enumerate(streams)}
        self._between: dict[Stream, tuple[bytes, bytes]] = {}
        """What comes before and after the text of a token that is not the last."""
        self._head = {"id": f"{self.prefix}{number}", "created": created, "model": model}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(place, self._text(stream, 0, stream.tokens), stream.finish_reason)
            for place, stream in enumerate(self.streams)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> bytes:
        """What comes before the first token."""
        return b""

    def part(self, stream: Stream, start: int, end: int, *, last: bool) -> bytes:
        """Tokens ``start`` to ``end`` of one answer, one event each; the ``last`` one says why it ended."""
        between = self._between.get(stream)
        if between is None:
            between = self._between[stream] = self._event_around(stream, None)
        before, after = between
        texts = self._quoted(stream, start, end)
        if not last:
            return b"".join([before + text + after for text in texts])
        events = [before + text + after for text in texts[:-1]]
        before, after = self._event_around(stream, stream.finish_reason)
        events.append(before + (texts[-1] if texts else b'""') + after)
        return b"".join(events)

    def closing(self, *, usage: bool) -> bytes:
        """What comes after the last token."""
        if not usage:
            return _DONE
        told = {**self._head, "object": self.part_kind, "choices": [], "usage": self._usage()}
        return _event(told) + _DONE

    def _event_around(self, stream: Stream, reason: str | None) -> tuple[bytes, bytes]:
        """What comes before and after the text of an event: events of one answer differ in that alone."""
        choices = [self._part_choice(self._places[stream], _HERE, reason)]
        event = _event({**self._head, "object": self.part_kind, "choices": choices})
        before, after = event.split(f'"{_HERE}"'.encode())
        return before, after

    def _text(self, stream: Stream, start: int, end: int) -> str:
        assert stream.request.output_ids is not None
        return self._filler.text(stream.request.output_ids, start, end)

    def _quoted(self, stream: Stream, start: int, end: int) -> list[bytes]:
        assert stream.request.output_ids is not None
        return self._filler.quoted(stream.request.output_ids, start, end)

    def _choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _part_choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _usage(self) -> dict[str, Any]:
        prompts = {stream.request.input_ids.tobytes(): stream for stream in self.streams}  # type: ignore[union-attr]
        prompt = sum(stream.request.input_tokens for stream in prompts.values())
        output = sum(stream.tokens for stream in self.streams)
        cached = sum(stream.cached_tokens for stream in prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class CompletionReply(Reply):
    """``/v1/completions``."""

    prefix = "cmpl-"
    kind = part_kind = "text_completion"

    def _choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        return {
            "index": place,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": None,
        }

    _part_choice = _choice


class ChatReply(Reply):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def opening(self) -> bytes:
        return b"".join(
            _event(
                {
                    **self._head,
                    "object": self.part_kind,
                    "choices": [
                        {"index": place, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    ],
                }
            )
            for place in range(len(self.streams))
        )

    def _choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": place, "message": message, "logprobs": None, "finish_reason": reason}

    def _part_choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": place, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}


class ResponseReply(Reply):
    """``/v1/responses``: one answer."""

    prefix = "resp_"
    kind = "response"
    _events = 0
    """Events that have gone out."""

    def whole(self) -> dict[str, Any]:
        return self._response("completed", self._text(self.streams[0], 0, self.streams[0].tokens))

    def opening(self) -> bytes:
        item, part = self._message("in_progress", None), _text_part("")
        return b"".join(
            [
                self._told("response.created", {"response": self._response("in_progress", "")}),
                self._told("response.output_item.added", {"output_index": 0, "item": item}),
                self._told("response.content_part.added", {**self._place, "part": part}),
            ]
        )

    def part(self, stream: Stream, start: int, end: int, *, last: bool) -> bytes:
        del last
        texts = [self._text(stream, token, token + 1) for token in range(start, end)]
        delta = "response.output_text.delta"
        return b"".join(self._told(delta, {**self._place, "delta": text, "logprobs": []}) for text in texts)

    def closing(self, *, usage: bool) -> bytes:
        del usage
        stream = self.streams[0]
        text = self._text(stream, 0, stream.tokens)
        item, part = self._message("completed", text), _text_part(text)
        return b"".join(
            [
                self._told("response.output_text.done", {**self._place, "text": text, "logprobs": []}),
                self._told("response.content_part.done", {**self._place, "part": part}),
                self._told("response.output_item.done", {"output_index": 0, "item": item}),
                self._told("response.completed", {"response": self.whole()}),
            ]
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._head['id']}", "output_index": 0, "content_index": 0}

    def _told(self, kind: str, body: dict[str, Any]) -> bytes:
        number = self._events
        self._events += 1
        return f"event: {kind}\n".encode() + _event({"type": kind, "sequence_number": number, **body})

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        return {
            "id": f"msg_{self._head['id']}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_text_part(text)],
        }

    def _response(self, status: str, text: str) -> dict[str, Any]:
        usage = self._usage()
        return {
            "id": self._head["id"],
            "object": "response",
            "created_at": self._head["created"],
            "model": self._head["model"],
            "status": status,
            "output": [self._message(status, text)] if text else [],
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
