"""A server that speaks enough of the OpenAI protocol to be recorded, and emits tokens on a known schedule."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "sk-very-secret"
METRICS = (
    "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n"
    'vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="True",engine="0",'
    'gpu_memory_utilization="0.9",num_gpu_blocks="2048",swap_space_bytes="None"} 1.0\n'
)


@dataclass
class Served:
    """One request as the server saw it; times on ``perf_counter``, which all of this machine share."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    received_s: float
    sent_s: list[float] = field(default_factory=list)
    """Just before each token was written to the socket."""
    ended_s: float = 0.0


@dataclass
class StreamingServer:
    """Answers with ``max_tokens`` tokens: the first ``first_s`` after a request, then one every ``gap_s``."""

    first_s: float = 0.03
    gap_s: float = 0.02
    misbehave: Callable[[Served, int], str | tuple[int, str] | None] | None = None
    """(request, its number) -> an HTTP status and message, ``break`` or ``error`` in mid-stream, or None."""
    counts: bool = True
    """Whether it counts tokens in every chunk when asked to, and numbers its version, as vLLM does."""
    lists_models: bool = True
    tokens_per_chunk: int = 1
    stop_early: int = 0
    """Tokens it leaves out of every answer."""
    requests: list[Served] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(300)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(300)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {
            key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)
        }
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            self._page(writer, path)
            await writer.drain()
            return True
        served = Served(json.loads(content), headers, path, perf_counter())
        self.requests.append(served)
        fault = self.misbehave(served, len(self.requests) - 1) if self.misbehave else None
        if isinstance(fault, tuple):
            status, message = fault
            _answer(
                writer,
                status,
                json.dumps({"error": {"message": f"{message} {headers.get('authorization')}"}}),
            )
            await writer.drain()
            return True
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(writer, served, fault)
        finally:
            self.in_flight -= 1
            served.ended_s = perf_counter()

    def _page(self, writer: asyncio.StreamWriter, path: str) -> None:
        pages = {}
        if self.lists_models:
            pages["/v1/models"] = json.dumps({"data": [{"id": "org/tiny", "object": "model"}]})
        if self.counts:
            pages |= {"/version": '{"version": "0.24.0"}', "/metrics": METRICS}
        _answer(writer, 200 if path in pages else 404, pages.get(path, "no such page"))

    async def _stream(self, writer: asyncio.StreamWriter, served: Served, fault: str | None) -> bool:
        body, chat = served.body, served.path.endswith("chat/completions")
        usage_wanted = body.get("stream_options", {})
        every_chunk = self.counts and usage_wanted.get("continuous_usage_stats")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        total = body["max_tokens"] - self.stop_early

        def event(**values: Any) -> None:
            data = b"data: " + json.dumps(values).encode() + b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def usage(done: int) -> dict[str, int]:
            return {"prompt_tokens": prompt_tokens, "completion_tokens": done}

        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if chat:
            more = {"usage": usage(0)} if every_chunk else {}
            event(choices=[{"delta": {"role": "assistant", "content": ""}}], **more)
        for done in range(self.tokens_per_chunk, total + self.tokens_per_chunk, self.tokens_per_chunk):
            done = min(done, total)
            due_s = served.received_s + self.first_s + len(served.sent_s) * self.gap_s
            await asyncio.sleep(max(due_s - perf_counter(), 0))
            if fault and done > 2:
                if fault == "error":
                    event(error={"message": "the engine died", "code": 500})
                await writer.drain()
                return False
            choice: dict[str, Any] = {"finish_reason": "length" if done == total else None}
            # some tokens, such as parts of a letter, have no text of their own
            text = "" if every_chunk and done % 5 == 4 else " x"
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            served.sent_s.append(perf_counter())
            event(choices=[choice], **({"usage": usage(done)} if every_chunk else {}))
            await writer.drain()
        if usage_wanted.get("include_usage"):
            event(choices=[], usage=usage(total))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True


def _answer(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    data = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\nContent-Type: application/json\r\n\r\n"
    writer.write(head.encode() + data)
