"""What a replay needs of the thing it records, be it a server or an engine in this process, and the prompts
it sends there: the workload's own token ids, or made-up ones of the same length."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.random import default_rng  # here, so that the first prompt is not late

from servesim.slotted import dataclass
from servesim.workload.hashes import prompt_ids as known_prompt

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


_LOW_ID, _HIGH_ID = 1_000, 20_000
"""Ids of ordinary tokens in every vocabulary in use; specials stand below and above."""
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car
"""
_WORDS = _WORD_LIST.split()
"""Words that most tokenizers take as one token each, with the blank before them."""


def prompt_ids(request: Request, seed: int) -> list[int]:
    """Token ids of the prompt, shape (input_tokens,): the workload's, or seeded random ones.

    Made-up prompts differ from request to request, so that a prefix cache finds nothing in them.
    """
    known = known_prompt(request)
    if known is not None:
        return [int(token) for token in known]
    rng = default_rng((seed, request.index))
    ids: list[int] = rng.integers(_LOW_ID, _HIGH_ID, request.input_tokens).tolist()
    return ids


def prompt_text(request: Request, seed: int) -> str:
    """A text of about ``input_tokens`` tokens: one word for each id of :func:`prompt_ids`.

    Prompts that begin with the same ids begin with the same words. How many tokens the server makes of it is
    its tokenizer's affair.
    """
    return " ".join(_WORDS[token % len(_WORDS)] for token in prompt_ids(request, seed))
