"""One HTTP/1.1 request whose answer is handed on the moment its bytes are received.

A batch of an engine ends for all its requests at once, so that a hundred chunks arrive together. A general
HTTP client takes 150 µs and more over each of them, and the last would be stamped 20 ms late; here it is some
20 µs. Every request has a connection of its own, opened before the request is stamped as sent.
"""

from __future__ import annotations

import asyncio
import re
from time import perf_counter
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from servesim.errors import InputError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

CONNECT_S = 30.0
"""Longest time a connection may take to open."""
PAGE_S = 60.0
"""Longest time that an answer without a stream may take."""
PAGE_BYTES = 32 << 20
"""Largest body that is kept: the metrics of a busy server have less than 1 MiB."""
_HEAD_BYTES = 64 << 10
_SIZE_LINE_BYTES = 1024
_HEXADECIMAL = re.compile(rb"[0-9A-Fa-f]{1,15}")
_OK = 200


class HttpError(Exception):
    """The exchange broke off; the text says how."""


@dataclass(slots=True, frozen=True)
class Address:
    """Where a server is."""

    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    prefix: str
    """Path before ``/v1``."""


@dataclass(slots=True, frozen=True)
class Reply:
    """The end of an exchange."""

    status: int
    body: bytes
    """Empty if it was handed on as it came."""
    sent_s: float
    """``perf_counter`` when the request was written to the connection."""


def parse_url(url: str) -> Address:
    """The address in ``http://host:port/prefix``; a ``/v1`` at the end is left out.

    Raises:
        InputError: it is no such URL, or holds a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InputError(f"--url {url}: {error}; give one such as http://127.0.0.1:8000") from None
    if parts.username or parts.password or "@" in parts.netloc:
        raise InputError("--url: must not hold a user or password; give a key with --api-key")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"--url {url}: must be http:// or https:// and a host, such as http://127.0.0.1:8000"
        )
    context = None
    if parts.scheme == "https":
        import ssl

        context = ssl.create_default_context()
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Address(url, parts.hostname, port or (443 if context else 80), context, prefix)


async def exchange(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    content: bytes = b"",
    *,
    on_body: Callable[[bytes, float], None] | None = None,
    timeout_s: float = CONNECT_S,
    most_s: float = PAGE_S,
    most_bytes: int = PAGE_BYTES,
) -> Reply:
    """Send one request and wait for the end of its answer.

    Args:
        address: the server.
        method: ``GET`` or ``POST``.
        path: below the address's prefix.
        headers: beside those that make up the protocol.
        content: body of the request.
        on_body: called with every piece of the answer's body and the time of its receipt, if the status is
            200; what it raises ends the exchange.
        timeout_s: longest silence of the server.
        most_s: longest time from the request to the end of its answer.
        most_bytes: largest body; of one that is kept, :data:`PAGE_BYTES` at most.

    Raises:
        OSError: no connection.
        HttpError: the server answers something else or too much, falls silent, or closes too early.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            transport, protocol = await loop.create_connection(
                lambda: _Exchange(on_body, most_bytes), address.host, address.port, ssl=address.tls
            )
    except TimeoutError:
        raise HttpError(f"no connection within {CONNECT_S:g} s") from None
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"{method} {address.prefix}{path} HTTP/1.1",
        f"Host: {host}:{address.port}",
        "Accept-Encoding: identity",
        "Connection: close",
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    try:
        sent_s = perf_counter()
        cast("asyncio.WriteTransport", transport).write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await protocol.ended(timeout_s, most_s)
    finally:
        transport.abort()
    return Reply(protocol.status, bytes(protocol.body), sent_s)


class _Exchange(asyncio.Protocol):
    """Reads one answer."""

    def __init__(self, on_body: Callable[[bytes, float], None] | None, most_bytes: int) -> None:
        self.status = 0
        self.body = bytearray()
        self._on_body = on_body
        self._most_bytes = self._left_bytes = most_bytes
        self._head: bytes | None = b""
        self._framing: ChunkedBody | PlainBody = PlainBody(None)
        self._heard_s = perf_counter()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ended(self, timeout_s: float, most_s: float) -> None:
        """Wait for the end of the answer."""
        self._heard_s = perf_counter()
        last_s = self._heard_s + most_s
        while not self._done.done():
            now_s = perf_counter()
            left_s = min(self._heard_s + timeout_s, last_s) - now_s
            if now_s >= last_s:
                raise HttpError(f"the answer was not complete after {most_s:g} s")
            if left_s <= 0:
                raise HttpError(f"nothing was received for {timeout_s:g} s")
            await asyncio.wait([self._done], timeout=left_s)
        self._done.result()

    def data_received(self, data: bytes) -> None:
        self._heard_s = now_s = perf_counter()
        if self._done.done():
            return
        try:
            self._take(data, now_s)
        except (
            Exception
        ) as error:  # a fault of the server's, or of whoever takes the body: the exchange's end
            self._done.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done.done():
            return
        if exc is None and self._head is None and self._framing.may_end:
            self._done.set_result(None)
        else:
            detail = f" ({exc})" if exc else ""
            self._done.set_exception(
                HttpError(f"the server closed the connection before the answer was complete{detail}")
            )

    def _take(self, data: bytes, now_s: float) -> None:
        if self._head is not None:
            head, blank, data = (self._head + data).partition(b"\r\n\r\n")
            if len(head) > _HEAD_BYTES:
                raise HttpError(f"the server's header has more than {_HEAD_BYTES:,} bytes")
            if not blank:
                self._head = head
                return
            self._head = None
            self._read_head(head.decode("latin-1"))
        content = self._framing.feed(data)
        if content:
            self._left_bytes -= len(content)
            if self._left_bytes < 0:
                raise HttpError(f"the server's answer has more than {self._most_bytes:,} bytes")
            if self._on_body and self.status == _OK:
                self._on_body(content, now_s)
            elif len(self.body) + len(content) > PAGE_BYTES:
                raise HttpError(f"the server's answer has more than {PAGE_BYTES:,} bytes")
            else:
                self.body += content
        if self._framing.ended:
            self._done.set_result(None)

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        words = first.split(" ", 2)
        if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdecimal():
            raise HttpError(f"the server does not speak HTTP/1.1: it answers {first[:60]!r}")
        self.status = int(words[1])
        fields = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if fields.get("transfer-encoding", "").lower() == "chunked":
            self._framing = ChunkedBody()
        elif fields.get("content-length", "").isdecimal():
            self._framing = PlainBody(int(fields["content-length"]))


class PlainBody:
    """A body of known length, or one that lasts until the connection is closed (None)."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.may_end = length is None

    @property
    def ended(self) -> bool:
        """Whether all of it was received."""
        return self._left == 0

    def feed(self, data: bytes) -> bytes:
        """The body's part of ``data``."""
        if self._left is None:
            return data
        data = data[: self._left]
        self._left -= len(data)
        return data


class ChunkedBody:
    """A body in chunks, each led by its size in hexadecimal digits; a chunk of size 0 is the last."""

    may_end = False

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._left = 0  # bytes of the present chunk still to come, its line end included

    def feed(self, data: bytes) -> bytes:
        """The content in ``data``, which continues what was fed before.

        Raises:
            HttpError: the size of a chunk is no number.
        """
        data, place, parts = self._rest + data, 0, []
        while not self.ended:
            if self._left == 0:
                end = data.find(b"\r\n", place)
                if end < 0:
                    if len(data) - place > _SIZE_LINE_BYTES:
                        raise HttpError(
                            f"the server sent a chunk without a size: {data[place : place + 40]!r}"
                        )
                    break
                size = _size(data[place:end])
                place = end + 2
                self.ended = size == 0
                self._left = size + 2
                continue
            take = min(self._left, len(data) - place)
            if take == 0:
                break
            parts.append(data[place : place + min(take, max(self._left - 2, 0))])
            place += take
            self._left -= take
        self._rest = data[place:]
        return b"".join(parts)


def _size(line: bytes) -> int:
    digits = line.split(b";")[0].strip()
    if not _HEXADECIMAL.fullmatch(digits):
        raise HttpError(f"the server sent a chunk without a size: {line[:40]!r}")
    return int(digits, 16)
