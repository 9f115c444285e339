"""How far a run went beyond what its kernel times were measured for: longer prompts, longer contexts.

Tables go on beyond their last measured point, along a line or a law; how far off that is was seen only here
and there (:data:`KNOWN_ERROR`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from servesim.slotted import dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servesim.results.result import Result

_ANY = 1 << 62  # a length that nothing has
KNOWN_ERROR = "9 to 14 % off beyond 65,536 tokens, where that is known"
"""Attention extrapolated from public measurements against layerwise ones; about 3 % within the range."""


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """What one instance served beyond its :class:`~servesim.results.stated_errors.Reach`; 0: not stated."""

    instance: int
    requests: int
    """With a longer prompt or a longer context."""
    prompt_tokens: int
    """Of the longest prompt, measured or not."""
    measured_prompt_tokens: int
    context_tokens: int
    """Of the longest context that a token was decoded over."""
    measured_context_tokens: int


def extrapolations(result: Result) -> list[Extrapolation]:
    """An entry for every instance that went beyond; none where nothing is known to be measured."""
    rows, found = result.table, []
    contexts = rows["input"] + rows["output"] - 1
    for log in result.instances:
        reach = log.reach
        if reach is None:
            continue
        prefilled = rows["instance_id"] == log.index
        decoded = (rows["decode_instance"] == log.index) & (rows["output"] > 1)
        longer = prefilled & (rows["input"] > (reach.prompt_tokens or _ANY))
        longer |= decoded & (contexts > (reach.context_tokens or _ANY))
        if longer.any():
            found.append(
                Extrapolation(
                    log.index,
                    int(longer.sum()),
                    _most(rows["input"][prefilled]),
                    reach.prompt_tokens or 0,
                    _most(contexts[decoded]),
                    reach.context_tokens or 0,
                )
            )
    return found


def _most(tokens: NDArray[np.int64]) -> int:
    return int(tokens.max()) if len(tokens) else 0


def extrapolation_entry(result: Result) -> list[dict[str, Any]]:
    """``extrapolated`` of the summary."""
    return [asdict(found) for found in extrapolations(result)]


def extrapolation_line(entries: list[dict[str, Any]]) -> str:
    """One line about all instances together; empty: no run was longer than what was measured."""
    if not entries:
        return ""
    parts = []
    for name, what in (("prompt", "prompts"), ("context", "contexts")):
        longest = max(entry[f"{name}_tokens"] for entry in entries)
        reach = min((end for entry in entries if (end := entry[f"measured_{name}_tokens"])), default=_ANY)
        if longest > reach:
            parts.append(f"{what} up to {longest:,} tokens (kernel times rest on up to {reach:,})")
    requests = sum(entry["requests"] for entry in entries)
    return f"{requests:,} requests: {'; '.join(parts)}; attention beyond is extrapolated ({KNOWN_ERROR})"
