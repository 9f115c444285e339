"""Prompts for a real server: the workload's own token ids, or made-up ones of the same length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpy.random import default_rng  # here, so that the first prompt is not late

if TYPE_CHECKING:
    from servesim.workload.request import Request

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
    if request.input_ids is not None:
        return [int(token) for token in request.input_ids]
    rng = default_rng((seed, request.index))
    ids: list[int] = rng.integers(_LOW_ID, _HIGH_ID, request.input_tokens).tolist()
    return ids


def prompt_text(request: Request, seed: int) -> str:
    """A text of about ``input_tokens`` tokens: one word for each id of :func:`prompt_ids`.

    Prompts that begin with the same ids begin with the same words. How many tokens the server makes of it is
    its tokenizer's affair.
    """
    return " ".join(_WORDS[token % len(_WORDS)] for token in prompt_ids(request, seed))
