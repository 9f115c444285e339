"""Sending what a call asked for: whole, or a token at a time the moment its step ends.

256 answers that grow by a token every few milliseconds leave little time for each. So a token does not wake
the task of its answer: the engine hands it over, and it is written to the client's connection at once, as a
chunk of HTTP/1.1. The task does the rest: how an answer starts and ends, and clients that read slowly.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import h11
import orjson
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from servesim.server.asked import ApiError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    from servesim.server.live import LiveEngine, Stream
    from servesim.server.replies import Reply

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

PATIENCE_S = 60
"""How long a client may take to send its request, or to read what waits for it."""
_TRANSPORT = "transport"
_MOST_AT_ONCE = 256
"""Tokens of an answer that are made text for one write: what a client who reads slowly can occupy."""


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose applications find the connection in ``scope["state"]``.

    It lets go of clients that open a connection and send no request, and of connections beyond
    ``limit_concurrency``.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, _TRANSPORT: transport}
        most = self.config.limit_concurrency
        if most is not None and len(self.connections) > most:
            transport.abort()
        self._deadline = self.loop.call_later(PATIENCE_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # part of a head has come
            if self._deadline is None:
                self._deadline = self.loop.call_later(PATIENCE_S, self._give_up)
        elif self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline:
            self._deadline.cancel()

    def _give_up(self) -> None:
        """No whole head of a request has come in time."""
        self._deadline = None
        self.transport.abort()


class Answer(Response):
    """Sends what a call asked for as it comes, and takes the call back if the client goes away."""

    def __init__(
        self, engine: LiveEngine, reply: Reply, hold: Callable[[int], None], *, in_parts: bool, usage: bool
    ) -> None:
        """
        Args:
            engine: what makes the answer.
            reply: its form.
            hold: told 1 now and -1 once it needs no memory any more.
            in_parts: whether it is streamed.
            usage: whether the last part tells the tokens.
        """
        self._engine = engine
        self._hold = hold
        self._reply = reply
        self._in_parts = in_parts
        self._usage = usage
        self._gone = False
        self._news = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        """The connection, while nothing but tokens is to be written to it."""
        self._sent = dict.fromkeys(reply.streams, 0)
        self.background = None
        self.status_code = 200
        for stream in reply.streams:
            stream.receiver = self
        hold(1)

    def tell(self, stream: Stream) -> None:
        """A stream has new tokens, or has ended."""
        transport, sent = self._transport, self._sent[stream]
        if transport is None or stream.done or stream.tokens - sent > _MOST_AT_ONCE:
            self._news.set()
            return
        if transport.is_closing() or transport.get_write_buffer_size():
            self._news.set()
            return
        part = self._reply.part(stream, sent, stream.tokens, last=False)
        self._sent[stream] = stream.tokens
        transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        listener = asyncio.create_task(self._listen(receive))

        async def patient(message: Message) -> None:
            async with asyncio.timeout(PATIENCE_S):  # for a client that does not read
                await send(message)

        try:
            await (self._send_parts(scope, patient) if self._in_parts else self._send_whole(patient))
        except (TimeoutError, asyncio.CancelledError):  # or the server ends: no reason for a traceback
            connection = scope.get("state", {}).get(_TRANSPORT)
            if connection is None:
                raise
            connection.abort()
            await asyncio.sleep(0)
        finally:
            self._transport = None
            listener.cancel()
            self._engine.abort(self._reply.streams)
            for stream in self._reply.streams:
                stream.receiver = None  # no cycle, so that its memory is free at once
            self._hold(-1)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._news.set()

    async def _send_whole(self, send: Send) -> None:
        streams = self._reply.streams
        while not all(stream.done for stream in streams):
            await self._news.wait()
            self._news.clear()
            if self._gone:
                return
        refused = next((stream.refused for stream in streams if stream.refused), "")
        if refused:
            error = ApiError(400, refused)
            await _send_json(send, error.status, error.body())
        else:
            await _send_json(send, 200, self._reply.whole())

    async def _send_parts(self, scope: Scope, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # without HTTP/1.1 there are no chunks, and what is not uvicorn has no connection to write to
        chunked = scope["http_version"] == "1.1"
        transport = scope.get("state", {}).get(_TRANSPORT) if chunked else None
        part = self._reply.opening()
        left = list(self._reply.streams)
        while left:
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            if not any(stream.done or stream.tokens > self._sent[stream] for stream in left):
                self._transport = transport
                await self._news.wait()
                self._transport = None
            self._news.clear()
            if self._gone:
                return
            part = b"".join(map(self._next_part, left))
            left = [stream for stream in left if not self._is_over(stream)]
        part += self._reply.closing(usage=self._usage)
        await send({"type": "http.response.body", "body": part, "more_body": False})

    def _next_part(self, stream: Stream) -> bytes:
        start = self._sent[stream]
        self._sent[stream] = end = min(stream.tokens, start + _MOST_AT_ONCE)
        return self._reply.part(stream, start, end, last=self._is_over(stream))

    def _is_over(self, stream: Stream) -> bool:
        return stream.done and self._sent[stream] == stream.tokens


async def _send_json(send: Send, status: int, body: Mapping[str, Any]) -> None:
    raw = orjson.dumps(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw, "more_body": False})
