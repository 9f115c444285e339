"""KV from elsewhere by a formula: the same connector beside vLLM's scheduler and beside the engine.

Every :attr:`LoadFormula.every`-th request has KV elsewhere, of the first :attr:`LoadFormula.share` of its
prompt, in whole blocks. Reading it takes a base and a time per token that the prefix cache lacks. While it is
read for one request, another one with the same first block cannot be told how much there is, as in vLLM's
OffloadingConnector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

OPTION = "--kv-loads"


@dataclass(frozen=True, slots=True)
class LoadFormula:
    """How much KV is elsewhere, and how long it takes to read it."""

    asynchronous: bool
    """Whether the request waits for it with blocks in hand; if not, it is there when its step begins."""
    share: float
    """Of the prompt, 0 to 1."""
    base_ns: int
    per_token_ns: int
    every: int = 1

    def there(self, request: int, prompt_tokens: int, known: int, block_size: int) -> int:
        """Leading tokens of a request, of ``known`` ones, whose KV is elsewhere.

        A step computes one token at least. So a synchronous connector leaves one; an asynchronous one need
        not, since the scheduler then computes the last one again.
        """
        if request % self.every or known < 2:  # vLLM would read a single token again and again
            return 0
        tokens = int(prompt_tokens * self.share) // block_size * block_size
        if self.share == 1.0:
            tokens = prompt_tokens  # as of a prompt that was computed elsewhere
        return min(tokens, known if self.asynchronous else known - 1)

    def read_ns(self, tokens: int) -> int:
        """Time that it takes to read so many tokens."""
        return self.base_ns + self.per_token_ns * tokens


def parse_loads(text: str) -> LoadFormula:
    """``async:0.5:3000:20`` or ``sync:0.5``, perhaps with ``/EVERY``: share of the prompts, base and time per
    token in microseconds, and which requests.

    Raises:
        InputError: something else stands there.
    """
    shape, _, every = text.partition("/")
    mode, *numbers = shape.split(":")
    try:
        share, base_us, per_token_us = (*map(float, numbers), *[0.0] * (3 - len(numbers)))
        formula = LoadFormula(
            mode == "async", share, round(base_us * 1000), round(per_token_us * 1000), int(every or 1)
        )
    except ValueError:
        formula = LoadFormula(False, -1.0, 0, 0)
    timed = min(formula.base_ns, formula.per_token_ns) >= 0 and formula.base_ns + formula.per_token_ns > 0
    if (
        not 0 < formula.share <= 1
        or formula.every < 1
        or mode not in ("sync", "async")
        or (timed if mode == "sync" else not timed)
    ):
        raise InputError(
            f"{OPTION}: {text!r} is not allowed; must be sync:SHARE or async:SHARE:BASE_US:PER_TOKEN_US, "
            "with a share above 0 and up to 1 and a time above 0, perhaps with /N for every N-th request only"
        )
    return formula


class Elsewhere:
    """What a connector says, and what it reads just now. Requests are named by their index."""

    def __init__(self, formula: LoadFormula, block_size: int) -> None:
        self.formula = formula
        self.block_size = block_size
        self._reading: dict[int, Sequence[int]] = {}
        """Request whose KV is being read -> its first block."""

    def lookup(self, request: int, prompt: Sequence[int], known: int, hit_tokens: int) -> int | None:
        """Leading tokens of a request that are elsewhere or hit; None: it cannot be told now."""
        there = self.formula.there(request, len(prompt), known, self.block_size)
        if there <= hit_tokens:
            return hit_tokens
        if self._reading and prompt[: self.block_size] in self._reading.values():
            return None
        return there

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """The KV of a request is being read from now on."""
        self._reading[request] = prompt[: self.block_size]

    def end(self, request: int) -> None:
        """It is there."""
        del self._reading[request]


def vllm_connector(elsewhere: Elsewhere) -> type:
    """A connector for vLLM's scheduler that says what ``elsewhere`` does: a class of its
    ``KVConnectorBase_V1``."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

    formula = elsewhere.formula

    class FormulaConnector(KVConnectorBase_V1):  # type: ignore[misc]
        """The side of the scheduler; there is no worker."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.now_ns = 0
            self.ends: dict[str, int] = {}
            """Request -> when its KV is there."""

        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[Any, bool]:
            known, prompt = request.num_tokens, request.prompt_token_ids
            there = elsewhere.lookup(int(request.request_id), prompt, known, num_computed_tokens)
            if there is None:
                return None, False
            tokens = there - num_computed_tokens
            return tokens, formula.asynchronous and tokens > 0

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            del blocks
            if num_external_tokens and formula.asynchronous:
                self.ends[request.request_id] = self.now_ns + formula.read_ns(num_external_tokens)
                elsewhere.begin(int(request.request_id), request.prompt_token_ids)

        def take_ended(self, now_ns: int) -> set[str]:
            """It is ``now_ns``: requests whose KV is there by now, each told once."""
            self.now_ns = now_ns
            ended = {name for name, end in self.ends.items() if end <= self.now_ns}
            for name in ended:
                del self.ends[name]
                elsewhere.end(int(name))
            return ended

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            del scheduler_output
            return KVConnectorMetadata()

        def start_load_kv(self, *arguments: Any, **more: Any) -> None:
            raise NotImplementedError

        def wait_for_layer_load(self, *arguments: Any, **more: Any) -> None:
            raise NotImplementedError

        def save_kv_layer(self, *arguments: Any, **more: Any) -> None:
            raise NotImplementedError

        def wait_for_save(self) -> None:
            raise NotImplementedError

    return FormulaConnector
