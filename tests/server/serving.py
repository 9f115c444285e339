"""An emulated server in a thread of the test, and what talks to it."""

from __future__ import annotations

import json
import threading
import urllib.request
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import uvicorn

from servesim.__main__ import Parser
from servesim.cli import serve
from servesim.specs.options import from_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator


class Served:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        """The JSON or text of a path."""
        with urllib.request.urlopen(self.url + path, timeout=300) as answer:
            raw = answer.read().decode()
        return json.loads(raw) if "json" in answer.headers.get("content-type", "") else raw

    def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, body) of what a path answers; ``body`` is JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.url + path, raw, {"content-type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, given = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, given = error.code, error.read()
        return status, json.loads(given) if given.startswith(b"{") else given.decode()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over its labels."""
        lines = self.get("/metrics").splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name]
        assert found, name
        return sum(found)

    def wait_until_idle(self) -> dict[str, Any]:
        """The server's own status once nothing is open."""
        until = monotonic() + 300
        while (status := self.get("/servesim"))["open"]:
            assert monotonic() < until
            sleep(0.02)
        found: dict[str, Any] = status
        return found


@contextmanager
def serving(words: str) -> Iterator[Served]:
    """A server as ``servesim serve`` with these words starts it."""
    parser = Parser(prog="servesim")
    serve.add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["serve", "--port", "0", *words.split()])
    serve.check(args)
    app, _, _ = serve.build_app(args, from_namespace(args))
    listening = serve.listen(args.host, args.port)
    server = uvicorn.Server(serve.server_config(app, args.max_open))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield Served(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()
