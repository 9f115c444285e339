"""An OpenAI-compatible server, spoken to over HTTP with streaming answers."""

from __future__ import annotations

import re
from dataclasses import field
from typing import TYPE_CHECKING, Any

import orjson

from servesim.bench.http_stream import Address, HttpError, Reply, exchange, parse_url
from servesim.bench.target import Answer, TargetFacts, prompt_ids, prompt_text
from servesim.bench.token_stream import EventLines, RequestFailedError, TokenStream, error_text
from servesim.errors import InputError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.workload.request import Request

_OK = 200
_SPARE_TOKENS = 10_000
_BYTES_PER_TOKEN = 16 << 10  # with usage statistics and log-probabilities a chunk has about 1 kB
_LONGEST_NAME = 1000
_CACHE_FACTS = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
"""A label of a metric in Prometheus's text: name and value."""
_CACHE_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "block_size": ("block_size", int),
    "cache_dtype": ("kv_cache_dtype", str),
    "gpu_memory_utilization": ("gpu_memory_utilization", float),
    "num_gpu_blocks": ("num_gpu_blocks", int),
    "enable_prefix_caching": ("enable_prefix_caching", lambda text: text == "True"),
}
"""Label of vLLM's ``cache_config_info`` metric -> engine argument and how to read it."""


@dataclass(slots=True, frozen=True)
class EndpointSettings:
    """Which server, and how requests are put to it."""

    url: str
    """Base address, such as http://127.0.0.1:8000."""
    chat: bool = False
    vllm: bool = True
    """Whether the server knows vLLM's additions: token ids, exact lengths, token counts in every chunk."""
    as_ids: bool = True
    """Prompts as token ids instead of text."""
    model: str | None = None
    """None: the first model the server lists."""
    seed: int = 42
    timeout_s: float = 600.0
    """Longest silence between two chunks."""
    most_s: float = 3600.0
    """Longest time that one answer may take."""
    extra_body: dict[str, Any] = field(default_factory=dict)


class Endpoint:
    """Sends requests to a server. Every stamp is taken here, when a chunk is received."""

    side = "client"

    def __init__(self, settings: EndpointSettings, api_key: str | None = None) -> None:
        self.settings = settings
        self._api_key = api_key
        self._address: Address = parse_url(settings.url)
        self._model = settings.model or ""
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def open(self) -> TargetFacts:
        """See :class:`servesim.bench.target.Target`."""
        listed = await self._models()
        if not self._model:
            if not listed:
                raise InputError(
                    f"--url {self.settings.url}: lists no model at /v1/models; name one with --model"
                )
            self._model = listed[0]
        version, kwargs = await self._vllm_facts() if self.settings.vllm else (None, {})
        return TargetFacts(self._model, version, kwargs)

    async def answer(self, request: Request) -> Answer:
        """See :class:`servesim.bench.target.Target`."""
        path = "/v1/chat/completions" if self.settings.chat else "/v1/completions"
        most_tokens = max(4 * request.output_tokens, request.output_tokens + _SPARE_TOKENS)
        stream, lines = TokenStream(self.settings.vllm, most_tokens), EventLines()

        def take(data: bytes, now_s: float) -> None:
            for payload in lines.feed(data):
                stream.take(payload, now_s)

        try:
            reply = await exchange(
                self._address,
                "POST",
                path,
                self._headers,
                orjson.dumps(self.body(request)),
                on_body=take,
                timeout_s=self.settings.timeout_s,
                most_s=self.settings.most_s,
                most_bytes=most_tokens * _BYTES_PER_TOKEN,
            )
        except RequestFailedError as error:
            raise RequestFailedError(error.status, self._hide(error.message)) from None
        except (OSError, HttpError) as error:
            raise RequestFailedError(None, self._hide(_reason(error))) from None
        if reply.status != _OK:
            raise RequestFailedError(reply.status, self._hide(_error_of(reply)))
        if not stream.finished or not stream.token_s:
            got = f"{len(stream.token_s)} of {request.output_tokens} tokens"
            raise RequestFailedError(
                None, f"the answer ended after {got}, without saying that it is complete"
            )
        return Answer(reply.sent_s, stream.token_s, stream.output_tokens, stream.prompt_tokens)

    async def close(self) -> None:
        """Nothing stays open between two requests."""

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body, asking for exactly the request's output length as far as the server can be told."""
        settings, length = self.settings, request.output_tokens
        usage: dict[str, Any] = {"include_usage": True}
        body: dict[str, Any] = {"model": self._model, "max_tokens": length, "stream": True}
        if settings.vllm:
            usage["continuous_usage_stats"] = True
            body |= {"min_tokens": length, "ignore_eos": True, "temperature": 0.0}
        body["stream_options"] = usage
        if settings.chat:
            body["messages"] = [{"role": "user", "content": prompt_text(request, settings.seed)}]
        else:
            make = prompt_ids if settings.as_ids else prompt_text
            body["prompt"] = make(request, settings.seed)
        return body | settings.extra_body

    async def _models(self) -> list[str]:
        """Names of the models served; empty if the server does not list them."""
        reply = await self._get("/v1/models")
        if reply.status in (401, 403):
            raise InputError(
                f"--url {self.settings.url}: refuses the API key (HTTP {reply.status}): "
                f"{self._hide(_error_of(reply))}; give one with --api-key or OPENAI_API_KEY"
            )
        try:
            names = [str(model["id"]) for model in orjson.loads(reply.body)["data"]]
            return [name for name in names if len(name) <= _LONGEST_NAME]
        except (ValueError, KeyError, TypeError):
            return []

    async def _vllm_facts(self) -> tuple[str | None, dict[str, Any]]:
        """vLLM's version, and what its metrics say about its KV cache; nothing where it says nothing."""
        reply = await self._get("/version")
        try:
            version = str(orjson.loads(reply.body)["version"])[:_LONGEST_NAME]
        except (ValueError, KeyError, TypeError):
            version = None
        metrics = await self._get("/metrics")
        text = metrics.body.decode(errors="replace")
        return version, cache_facts(text) if metrics.status == _OK else {}

    async def _get(self, path: str) -> Reply:
        try:
            return await exchange(self._address, "GET", path, self._headers)
        except (OSError, HttpError) as error:
            raise InputError(
                f"--url {self.settings.url}: no server answers there ({self._hide(_reason(error))}); "
                "start one, such as `vllm serve MODEL --port 8000`, and give its address"
            ) from None

    def _hide(self, text: str) -> str:
        """``text`` without the API key, should a server repeat it."""
        return text.replace(self._api_key, "***") if self._api_key else text


def cache_facts(metrics: str) -> dict[str, Any]:
    """Engine arguments in vLLM's ``/metrics`` text."""
    found = _CACHE_FACTS.search(metrics)
    if not found:
        return {}
    facts: dict[str, Any] = {}
    for label, text in LABEL.findall(found[1]):
        if label in _CACHE_KEYS:
            name, read = _CACHE_KEYS[label]
            try:
                facts[name] = read(text)
            except ValueError:
                continue  # "None": not known yet
    return facts


def _error_of(reply: Reply) -> str:
    try:
        return error_text(orjson.loads(reply.body))
    except ValueError:
        return error_text(reply.body.decode(errors="replace"))


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
