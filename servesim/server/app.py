"""The HTTP side of the emulated server: OpenAI's routes, and those that vLLM adds."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from servesim._version import __version__
from servesim.results.units import SECOND
from servesim.server.answer import PATIENCE_S, Answer
from servesim.server.asked import ApiError, Asked, chat_limit, read_chat, read_completion, read_response
from servesim.server.live import Stream, why_refused
from servesim.server.pace import VirtualPace
from servesim.server.prompts import chat_text
from servesim.server.replies import ChatReply, CompletionReply, Reply, ResponseReply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request as HttpRequest

    from servesim.server.live import LiveEngine
    from servesim.server.metrics import Metrics
    from servesim.server.prompts import Filler, OutputLength, Tokenizer

_TOKENS_OF_AN_ANSWER = 4096
"""As many, times the most open answers, can be in the making: 200 MiB with the default."""
_LINGER_BYTES = 4 << 20
_LINGER_S = 2.0
"""How much of the body of a refused request is read, and for how long."""


@dataclass(slots=True)
class Settings:
    """How the server behaves."""

    models: tuple[str, ...]
    """Names that clients may ask for: the model's first, then aliases and LoRA adapters."""
    adapters: frozenset[str]
    vllm_version: str
    vocab_size: int
    api_key: str | None = None
    most_body_bytes: int = 32 << 20
    most_open: int = 4096
    """Answers in the making; more are refused with status 503."""


class Server:
    """Routes, and what they have in common."""

    def __init__(
        self,
        engine: LiveEngine,
        metrics: Metrics,
        tokenizer: Tokenizer,
        filler: Filler,
        lengths: OutputLength,
        settings: Settings,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.filler = filler
        self.lengths = lengths
        self.settings = settings
        self._sleeping = False
        self._calls = count()
        self._held = [0, 0]
        """Answers that clients have not got in full yet, and their tokens."""

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/completions", self._guard(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guard(self.chat), methods=["POST"]),
            Route("/v1/responses", self._guard(self.responses), methods=["POST"]),
            Route("/v1/embeddings", self._guard(self.embeddings), methods=["POST"]),
            Route("/v1/models", self._guard(self.models)),
            Route("/tokenize", self._guard(self.tokenize), methods=["POST"]),
            Route("/detokenize", self._guard(self.detokenize), methods=["POST"]),
            Route("/health", self._guard(self.health)),
            Route("/ping", self._guard(self.health), methods=["GET", "POST"]),
            Route("/version", self._guard(self.version)),
            Route("/metrics", self._guard(self.prometheus)),
            Route("/reset_prefix_cache", self._guard(self.reset_prefix_cache), methods=["POST"]),
            Route("/sleep", self._guard(self.sleep), methods=["POST"]),
            Route("/wake_up", self._guard(self.wake_up), methods=["POST"]),
            Route("/is_sleeping", self._guard(self.is_sleeping)),
            Route("/servesim", self._guard(self.status)),
            Route("/virtual_time", self._guard(self.virtual_time), methods=["GET", "POST"]),
        ]
        missing = {404: _not_found, 405: _not_found}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=missing)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        task = asyncio.create_task(self.engine.run())
        task.add_done_callback(_stop_on_fault)
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _guard(
        self, handler: Callable[[HttpRequest], Awaitable[Any]]
    ) -> Callable[[HttpRequest], Awaitable[Any]]:
        """The handler behind the API key, with its errors in OpenAI's form."""

        async def guarded(request: HttpRequest) -> Any:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                await _linger(request)
                return JSONResponse(error.body(), status_code=error.status)

        return guarded

    def _check_key(self, request: HttpRequest) -> None:
        key = self.settings.api_key
        if key is None or not request.url.path.startswith("/v1"):
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(401, "Unauthorized", "AuthenticationError")

    async def _body(self, request: HttpRequest) -> dict[str, Any]:
        """The JSON object that the client sent."""
        most, raw = self.settings.most_body_bytes, bytearray()
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for part in request.stream():
                    raw += part
                    if len(raw) > most:
                        raise ApiError(413, f"the body is longer than {most} bytes", "RequestEntityTooLarge")
        except TimeoutError:
            raise ApiError(408, f"the body has not come within {PATIENCE_S} s", "RequestTimeout") from None
        except ClientDisconnect:
            raise ApiError(400, "the client has gone before its body came") from None
        try:
            body = orjson.loads(bytes(raw))
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        return body

    # ------------------------------------------------------------------ answers

    async def completions(self, request: HttpRequest) -> Any:
        asked = read_completion(await self._body(request), self.tokenizer, self.settings.vocab_size)
        return self._answer(request, asked, CompletionReply, asked.max_tokens)

    async def chat(self, request: HttpRequest) -> Any:
        asked = read_chat(await self._body(request), self.tokenizer)
        return self._answer(request, asked, ChatReply, chat_limit(asked))

    async def responses(self, request: HttpRequest) -> Any:
        asked = read_response(await self._body(request), self.tokenizer)
        return self._answer(request, asked, ResponseReply, chat_limit(asked))

    def _answer(
        self, request: HttpRequest, asked: Asked, form: type[Reply], most_tokens: int | None
    ) -> Response:
        settings, number = self.settings, next(self._calls)
        model = asked.model or settings.models[0]
        if model not in settings.models:
            raise ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        if self._sleeping:
            raise ApiError(503, "the engine sleeps; POST /wake_up first", "ServiceUnavailableError")
        count_of = len(asked.prompts) * asked.answers
        if self._held[0] + count_of > settings.most_open:
            raise ApiError(
                503, f"{settings.most_open} answers are in the making already", "ServiceUnavailableError"
            )
        streams = [
            self._stream(asked, ids, model, most_tokens)
            for ids in asked.prompts
            for _ in range(asked.answers)
        ]
        given_id = request.headers.get("x-request-id") or f"{number:032x}"
        for place, stream in enumerate(streams):
            stream.key = f"{given_id} {place}".encode() if "x-request-id" in request.headers else stream.key
        created = int(time.time())
        if isinstance(self.engine.pace, VirtualPace):
            created = self.engine.pace.now_ns() // SECOND
        held = len(streams), sum(stream.request.output_tokens for stream in streams)
        most_tokens_held = max(settings.most_open * _TOKENS_OF_AN_ANSWER, self.engine.max_model_len)
        if self._held[1] and self._held[1] + held[1] > most_tokens_held:
            raise ApiError(
                503, f"{self._held[1]} tokens are in the making already", "ServiceUnavailableError"
            )

        def hold(sign: int) -> None:
            for place in (0, 1):
                self._held[place] += sign * held[place]

        reply = form(given_id, created, model, streams, self.filler)
        answer = Answer(self.engine, reply, hold, in_parts=asked.stream, usage=asked.include_usage)
        self.engine.submit(streams)
        self.metrics.asked(streams[0], asked.answers, asked.max_tokens)
        return answer

    def _stream(self, asked: Asked, ids: NDArray[np.int64], model: str, most_tokens: int | None) -> Stream:
        context = self.engine.max_model_len
        if not len(ids):
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(ids) >= context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens. However, your prompt has at least "
                f"{len(ids)} tokens. Please reduce its length.",
            )
        request = self.engine.new_request(ids, ids[:0], None)
        length, limited = self.lengths.tokens(
            most_tokens,
            len(ids),
            context - len(ids),
            request.index,
            whole=asked.ignore_eos,
        )
        length = max(length, min(asked.min_tokens, context - len(ids)))
        words = self.filler.ids(length, request.index)
        for stop in asked.stop:
            words, limited = self._cut(words, stop, asked.min_tokens, limited)
        request.output_ids, request.output_tokens = words, len(words)
        request.priority = asked.priority
        reason = why_refused(self.engine, request)
        if reason:
            raise ApiError(400, reason)
        request.lora = model if model in self.settings.adapters else None
        return Stream(request, asked.salt, ids.tobytes(), limited=limited)

    def _cut(
        self, words: NDArray[np.int64], stop: str, least: int, limited: bool
    ) -> tuple[NDArray[np.int64], bool]:
        """The answer up to and with the token that completes ``stop``."""
        text = self.filler.text(words, 0, len(words))
        place = text.find(stop)
        if not stop or place < 0:
            return words, limited
        end, tokens = place + len(stop), 0
        length = 0
        while length < end:
            length += len(self.filler.text(words, tokens, tokens + 1))
            tokens += 1
        return (words[:tokens], False) if tokens >= least else (words, limited)

    # ------------------------------------------------------------------ what else there is

    async def embeddings(self, request: HttpRequest) -> Response:
        del request
        raise ApiError(501, "embeddings are not emulated; this server generates text", "NotImplementedError")

    async def models(self, request: HttpRequest) -> Response:
        del request
        first, context = self.settings.models[0], self.engine.max_model_len
        data = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "servesim",
                "root": name,
                "parent": first if name in self.settings.adapters else None,
                "max_model_len": context,
            }
            for name in self.settings.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def tokenize(self, request: HttpRequest) -> Response:
        body = await self._body(request)
        text = chat_text(body["messages"]) if isinstance(body.get("messages"), list) else body.get("prompt")
        if not isinstance(text, str):
            raise ApiError(400, "prompt: must be a text", param="prompt")
        ids = self.tokenizer.encode(text)
        if len(ids) > self.engine.max_model_len:
            raise ApiError(
                400, f"prompt: has more tokens than the {self.engine.max_model_len} of the context"
            )
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": self.engine.max_model_len,
                "tokens": ids,
                "token_strs": None,
            }
        )

    async def detokenize(self, request: HttpRequest) -> Response:
        ids = (await self._body(request)).get("tokens")
        if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
            raise ApiError(400, "tokens: must be a list of token ids", param="tokens")
        return JSONResponse({"prompt": self.tokenizer.decode(ids)})

    async def health(self, request: HttpRequest) -> Response:
        del request
        return Response()

    async def version(self, request: HttpRequest) -> Response:
        del request
        return JSONResponse({"version": self.settings.vllm_version, "servesim": __version__})

    async def prometheus(self, request: HttpRequest) -> Response:
        del request
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def reset_prefix_cache(self, request: HttpRequest) -> Response:
        del request
        if not self.engine.reset_prefix_cache():
            raise ApiError(409, "requests are running; the prefix cache is left as it is", "ConflictError")
        return Response()

    async def sleep(self, request: HttpRequest) -> Response:
        del request
        if self.engine.open_streams:
            raise ApiError(409, "requests are running; wait for them to end", "ConflictError")
        self._sleeping = True
        self.engine.reset_prefix_cache()
        return Response()

    async def wake_up(self, request: HttpRequest) -> Response:
        del request
        self._sleeping = False
        return Response()

    async def is_sleeping(self, request: HttpRequest) -> Response:
        del request
        return JSONResponse({"is_sleeping": self._sleeping})

    async def status(self, request: HttpRequest) -> Response:
        """What the emulator itself has to say: its clock, and how late its tokens are."""
        del request
        late = sorted(self.engine.late_ns)
        shown = {
            "servesim": __version__,
            "simulated_s": self.engine.pace.now_ns() / 1e9,
            "open": self.engine.open_streams,
            "late_ms": {
                "tokens": len(late),
                "median": late[len(late) // 2] / 1e6 if late else 0.0,
                "p99": late[int(len(late) * 0.99)] / 1e6 if late else 0.0,
            },
            "free_blocks": [each.scheduler.kv.pool.num_free for each in self.engine.instances],
            "usable_blocks": [each.scheduler.kv.pool.usable for each in self.engine.instances],
            "whole": [each.scheduler.kv.pool.is_whole for each in self.engine.instances],
        }
        return JSONResponse(shown)

    async def virtual_time(self, request: HttpRequest) -> Response:
        """Where time is virtual: what time it is, sleeping in it, and how many calls it waits for.

        ``{"sleep_s": 5}`` answers five simulated seconds later; ``{"leave": true}``: one client less is at
        work; ``{"clients": 3}``: so many are.
        """
        pace = self.engine.pace
        if not isinstance(pace, VirtualPace):
            raise ApiError(400, "time follows the wall clock; start the server with --virtual-time N")
        if request.method == "POST":
            body = await self._body(request)
            clients, sleep_s = body.get("clients"), body.get("sleep_s")
            if body.get("leave") is True:
                clients = max(pace.clients - 1, 1)
            if clients is not None:
                if type(clients) is not int or not 1 <= clients <= 1_000_000:
                    raise ApiError(400, "clients: must be a whole number >= 1", param="clients")
                pace.expect(clients, self.engine.woken)
            if sleep_s is not None:
                if type(sleep_s) not in (int, float) or not 0 <= sleep_s <= 1e8:
                    raise ApiError(400, "sleep_s: must be seconds from 0 to 1e8", param="sleep_s")
                await pace.sleep(sleep_s, self.engine.woken)
        return JSONResponse({"now_s": pace.now_ns() / 1e9, "clients": pace.clients})


async def _linger(request: HttpRequest) -> None:
    """Read on for a while: a client that still sends when the connection closes gets a reset, no answer."""
    left = _LINGER_BYTES
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it was read to its end
        async with asyncio.timeout(_LINGER_S):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


async def _not_found(request: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    told = ApiError(status, f"{request.method} {request.url.path}: there is no such route", "NotFoundError")
    await _linger(request)
    return JSONResponse(told.body(), status_code=status)


def _stop_on_fault(task: asyncio.Task[None]) -> None:
    """A simulation that breaks ends the server, with the fault told where it was started."""
    if not task.cancelled() and task.exception() is not None:
        asyncio.get_running_loop().call_exception_handler(
            {"message": "the simulation broke off", "exception": task.exception(), "task": task}
        )


__all__: Sequence[str] = ("Server", "Settings")
