"""Reading HTTP answers as they come."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.bench import http_stream
from servesim.bench.http_stream import ChunkedBody, HttpError, PlainBody, Reply, exchange, parse_url
from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(1, 25), min_size=1))
def test_chunks_survive_any_way_of_cutting_the_stream(chunks: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(b"%x;note=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    body, got, place = ChunkedBody(), b"", 0
    for turn in range(len(stream)):
        step = cuts[turn % len(cuts)]
        got += body.feed(stream[place : place + step])
        place += step
    assert (got, body.ended) == (b"".join(chunks), True)


def test_a_body_of_known_length_ends_there() -> None:
    body = PlainBody(5)
    assert (body.feed(b"abc"), body.ended) == (b"abc", False)
    assert (body.feed(b"defg"), body.ended) == (b"de", True)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def answered(
    pieces: Sequence[bytes], *, silence_s: float = 0.0, path: str = "/x", most_s: float = 60.0
) -> tuple[Reply, bytes]:
    """The reply to one request by a server that sends these bytes, and what it was sent."""
    asked = b""
    quiet_s = 0.1 if silence_s else 30.0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked = await reader.readuntil(b"\r\n\r\n")
        with suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            await asyncio.sleep(silence_s)
        writer.close()

    async def go() -> Reply:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            address = parse_url(f"http://127.0.0.1:{port}/base/v1/")
            return await exchange(address, "GET", path, {"X-Key": "1"}, timeout_s=quiet_s, most_s=most_s)

    return asyncio.run(go()), asked


def test_a_page_that_lasts_until_the_connection_closes_is_read() -> None:
    reply, asked = answered([b"HTTP/1.1 404 Not", b" Found\r\nServer: s\r\n\r\nno ", b"such page"])
    assert (reply.status, reply.body) == (404, b"no such page")
    assert asked.startswith(b"GET /base/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-Key: 1\r\n" in asked


@pytest.mark.parametrize(
    ("pieces", "silence_s", "message"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], 0, "before the answer was complete"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], 1, r"nothing was received for 0\.1 s"),
        ([b"220 mail.example.org ESMTP\r\n\r\n"], 0, "does not speak HTTP/1.1: it answers '220 mail"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"], 0, "a chunk without a size"),
        ([], 0, "before the answer was complete"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(pieces: list[bytes], silence_s: float, message: str) -> None:
    with pytest.raises(HttpError, match=message):
        answered(pieces, silence_s=silence_s)


ENDLESS = {
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 60_000, "header has more than 65,536 bytes"),
    "the size of a chunk": (CHUNKED, b"1" * 60_000, "a chunk without a size"),
    "a page": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * (8 << 20), "more than 33,554,432 bytes"),
    "a page in chunks": (CHUNKED, b"100000\r\n" + b"x" * (1 << 20) + b"\r\n", "more than 33,554,432 bytes"),
    "a page that trickles": (b"HTTP/1.1 200 OK\r\n\r\n", b"x", "not complete after 0.3 s"),
}


@pytest.mark.parametrize(("head", "piece", "told"), ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_answer_is_cut_off(head: bytes, piece: bytes, told: str) -> None:
    with pytest.raises(HttpError, match=told):
        answered([head] + [piece] * 1000, most_s=0.3 if len(piece) == 1 else 60.0)


@pytest.mark.parametrize("size", [b"-5", b"0x5", b"1_0", b"f" * 20, b""])
def test_a_size_that_is_none_is_refused(size: bytes) -> None:
    with pytest.raises(HttpError, match="a chunk without a size"):
        ChunkedBody().feed(size + b"\r\nabc\r\n")


def test_every_piece_is_stamped_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: what the stamps say does not depend on how busy this machine is."""
    clock = iter(range(100))
    monkeypatch.setattr(http_stream, "perf_counter", lambda: float(next(clock)))
    taken: list[tuple[bytes, float]] = []

    async def receive() -> None:
        protocol = http_stream._Exchange(lambda data, now_s: taken.append((data, now_s)), 100)
        for piece in (CHUNKED, b"2\r\nab\r\n", b"3\r\nc", b"de\r\n1\r\nf\r\n", b"0\r\n\r\n"):
            protocol.data_received(piece)

    asyncio.run(receive())
    # The clock was read once at the start, and then once for every piece, in their order.
    assert taken == [(b"ab", 2.0), (b"c", 3.0), (b"def", 4.0)]


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://localhost", "localhost", 80, ""),
        ("https://api.example.org/v1", "api.example.org", 443, ""),
        ("http://[::1]:8000/a/b/v1/", "::1", 8000, "/a/b"),
    ],
)
def test_urls_are_taken_apart(url: str, host: str, port: int, prefix: str) -> None:
    address = parse_url(url)
    assert (address.host, address.port, address.prefix) == (host, port, prefix)
    assert (address.tls is not None) == url.startswith("https")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:99999", "http://u:p@x"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="--url"):
        parse_url(url)
