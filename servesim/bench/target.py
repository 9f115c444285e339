"""What a replay needs of the thing it records, be it a server or an engine in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from servesim.workload.request import Request


@dataclass(slots=True, frozen=True)
class EngineStamps:
    """vLLM's own stamps of a request, in seconds."""

    arrival_time: float
    """On the wall clock; the others on the engine's monotonic clock."""
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float


@dataclass(slots=True)
class Answer:
    """A request answered in full. Times are seconds of ``time.perf_counter`` in this process."""

    sent_s: float
    token_s: list[float]
    """Receipt of every token, or of every chunk where a server does not tell its tokens apart."""
    output_tokens: int
    prompt_tokens: int | None = None
    """As the server counted; None: it did not say."""
    stamps: EngineStamps | None = None


@dataclass(slots=True, frozen=True)
class TargetFacts:
    """What the target says about itself."""

    model: str
    vllm_version: str | None = None
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Engine arguments that could be found out, under vLLM's names."""


class Target(Protocol):
    """A server or an engine."""

    side: str
    """Who stamps: ``client`` or ``engine``."""

    async def open(self) -> TargetFacts:
        """Connect or start up.

        Raises:
            InputError: there is nothing to connect to, or it cannot be started.
        """

    async def answer(self, request: Request) -> Answer:
        """Send one request and wait for its last token.

        Raises:
            RequestFailedError: it was not answered in full.
        """

    async def close(self) -> None:
        """Let go of connections or shut the engine down."""
