"""Clients that misbehave: the server stays up, keeps its memory bounded, and loses no KV block."""

from __future__ import annotations

import gc
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import pytest

from servesim.cli import serve
from servesim.server import answer, app
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world
from tests.server.serving import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW = "--cluster-config one.json --speed 0.01"
FAST = "--cluster-config one.json --speed 50"


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        (root / "one.json").write_text(json.dumps(toy_cluster([toy_instance()])))
        late = toy_instance(engine={"front_end_us": 50_000.0})
        (root / "slow.json").write_text(json.dumps(toy_cluster([late])))
        yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "PATIENCE_S", 0.3)
    monkeypatch.setattr(app, "PATIENCE_S", 0.3)


def connect(server: Served, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(300)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return connection


def call(version: str = "1.1", **body: Any) -> bytes:
    raw = json.dumps({"prompt": [3] * 100, "stream": True} | body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: a\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def open_stream(server: Served, tokens: int) -> socket.socket:
    """A streaming call of which the client has read the first bytes."""
    connection = connect(server)
    connection.sendall(call(max_tokens=tokens))
    assert connection.recv(100)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    got = bytearray()
    while part := connection.recv(1 << 16):
        got += part
    return bytes(got)


def answer_to(server: Served, raw: bytes) -> bytes:
    with connect(server) as connection:
        try:
            connection.sendall(raw)
            return connection.recv(1000)
        except ConnectionError:
            return b""


def wait_for(server: Served, status: int) -> None:
    """Until a call of one token is answered with ``status``."""
    until = monotonic() + 300
    while server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] != status:
        assert monotonic() < until
        sleep(0.02)


# ---------------------------------------------------------------------- those that leave


def test_aborted_streams_lose_no_block() -> None:
    """``python benchmarks/server.py abort`` does it 10,000 times."""
    with serving(SLOW) as server:

        def leave(number: int) -> None:
            open_stream(server, 50 + number).close()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(leave, range(400)))
        status = server.wait_until_idle()
        assert status["free_blocks"] == status["usable_blocks"]
        assert status["whole"] == [True]
        assert server.metric("vllm:request_success_total") == 400


def test_who_leaves_before_the_engine_has_it_is_not_run() -> None:
    """The front end of a server takes its time too."""
    with serving("--cluster-config slow.json --speed 0.1") as server:
        for number in range(8):
            with connect(server) as connection:
                connection.sendall(call(max_tokens=1900, prompt=[number] * 100))
                assert connection.recv(100)
        status = server.wait_until_idle()
        assert status["free_blocks"] == status["usable_blocks"]
        assert server.metric("vllm:request_success_total") == 8


def test_a_client_may_leave_amid_its_request() -> None:
    with serving(FAST) as server:
        for raw in (b"POST /v1/comp", call(max_tokens=2)[:-20]):
            with connect(server) as connection:
                connection.sendall(raw)
        wait_for(server, 200)
        assert server.wait_until_idle()["whole"] == [True]


def test_closed_connections_are_collected() -> None:
    """Each is a cycle of objects, which the command line would leave until it has 200,000 of them."""
    before = gc.get_threshold()
    try:
        gc.set_threshold(200_000)
        serve.collect_garbage()
        with serving(FAST) as server:
            for _ in range(1000):
                server.get("/health")
        kept = sum(type(each).__name__ == "_SelectorSocketTransport" for each in gc.get_objects())
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    assert kept < 700


def test_the_server_ends_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever still listens is cut off; no traceback for each of them."""
    logging.getLogger("uvicorn").propagate = True
    with serving(SLOW) as server:
        streams = [open_stream(server, 1500) for _ in range(5)]
    for stream in streams:
        stream.close()
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text


# ---------------------------------------------------------------------- those that read slowly


def test_a_slow_reader_gets_every_token() -> None:
    with serving(f"{FAST} --max-open 8") as server, connect(server, 4096) as connection:
        connection.sendall(call(max_tokens=1500, n=8))
        wait_for(server, 503)  # all eight are open
        server.wait_until_idle()
        assert server.post("/v1/completions", {"prompt": "a"})[0] == 503  # made, but not read
        raw = rest_of(connection)
        wait_for(server, 200)
    assert raw.count(b'"text":"') == 8 * 1500
    assert raw.count(b'"finish_reason":"length"') == 8
    assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    largest = 0
    while body:  # HTTP's chunks: what the server holds for such a client
        size, _, body = body.partition(b"\r\n")
        largest, body = max(largest, int(size, 16)), body[int(size, 16) + 2 :]
    assert largest < 8 * 256 * 300


@pytest.mark.usefixtures("impatient")
def test_a_client_that_never_reads_is_cut_off() -> None:
    with serving(f"{FAST} --max-open 8") as server, connect(server, 4096) as connection:
        connection.sendall(call(max_tokens=1500, n=8))
        wait_for(server, 503)
        wait_for(server, 200)
        assert not rest_of_quietly(connection).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")


def rest_of_quietly(connection: socket.socket) -> bytes:
    try:
        return rest_of(connection)
    except ConnectionError:
        return b""


def test_http_1_0_gets_a_stream_without_chunks() -> None:
    with serving(FAST) as server, connect(server) as connection:
        connection.sendall(call("1.0", max_tokens=20))
        head, _, body = rest_of(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"}\n\ndata: [DONE]\n\n")
    assert body.count(b"data: {") == 20


# ---------------------------------------------------------------------- those that flood


def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SPARE_CONNECTIONS", 20)
    with serving(f"{FAST} --max-open 10") as server:
        held = [connect(server) for _ in range(30)]
        sleep(0.1)
        with connect(server) as one_more:
            assert rest_of_quietly(one_more) == b""
        for connection in held:
            connection.close()
        wait_for_health(server)


def wait_for_health(server: Served) -> None:
    until = monotonic() + 300
    while True:
        try:
            assert server.get("/health") == ""
        except OSError:
            assert monotonic() < until
            sleep(0.02)
        else:
            return


@pytest.mark.usefixtures("impatient")
def test_a_request_that_never_comes_is_given_up() -> None:
    with serving(FAST) as server:
        for begun in (b"", b"GET /health HT"):
            with connect(server) as connection:
                connection.sendall(begun)
                assert rest_of_quietly(connection) == b""
        with connect(server) as connection:  # also the second one of a connection
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
            connection.sendall(b"GET /health HT")
            assert rest_of_quietly(connection) == b""
        with connect(server) as connection:
            connection.sendall(call(max_tokens=2)[:-20])
            assert b"408" in connection.recv(1000)
        assert server.get("/health") == ""


# ---------------------------------------------------------------------- those that send too much


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\0" * 1000,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(raw: bytes) -> None:
    with serving(FAST) as server:
        assert answer_to(server, raw)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
        assert server.get("/health") == ""


def test_a_prompt_is_read_no_further_than_the_context() -> None:
    with serving(FAST) as server:
        status, told = server.post("/v1/completions", {"prompt": "ab " * 1_000_000})
        assert status == 400
        assert "your prompt has at least 2049 tokens" in told["error"]["message"]
        assert server.post("/tokenize", {"prompt": "ab " * 1_000_000})[0] == 400


def test_many_stop_texts_are_refused() -> None:
    with serving(FAST) as server:
        status, told = server.post("/v1/completions", {"prompt": "a", "stop": ["zz"] * 33})
        assert (status, told["error"]["param"]) == (400, "stop")


def test_open_answers_have_tokens_enough_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_TOKENS_OF_AN_ANSWER", 100)
    with serving(f"{SLOW} --max-open 30") as server:
        with open_stream(server, 1500):
            assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1501})[0] == 503
            with open_stream(server, 1500):
                pass
        server.wait_until_idle()


@pytest.mark.parametrize(("words", "status"), [("--api-key secret", 401), ("--max-body-mib 1", 413)])
def test_a_large_refused_body_gets_its_answer(words: str, status: int) -> None:
    with serving(f"{FAST} {words}") as server:
        for _ in range(5):
            found, _ = server.post("/v1/completions", {"prompt": "as " * (1 << 20), "max_tokens": 2})
            assert found == status
            found, _ = server.post("/v1/none", {"prompt": "as " * (1 << 20)})
            assert found == 404
