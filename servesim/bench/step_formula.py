"""A step duration that is a formula, so that two schedulers can be compared without any measured kernel.

Both sides of a parity check use this one class: the recorder that drives vLLM's scheduler calls
:meth:`StepFormula.step_ns`, the simulator uses it in the place of a measured step timer.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from servesim.engine.clock import NEVER
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepFormula:
    """``base + per_token * T + per_sequence * S + per_context * C`` in whole nanoseconds.

    T: tokens scheduled in the step; S: requests scheduled in it; C: tokens that these requests already have
    in the KV cache before the step. The coefficients are integers, so a duration is exact on every machine.
    """

    base_ns: int = 9_000_000
    per_token_ns: int = 25_000
    per_sequence_ns: int = 10_000
    per_context_ns: int = 0

    @classmethod
    def from_us(
        cls, base_us: float, per_token_us: float, per_sequence_us: float, per_context_us: float = 0.0
    ) -> StepFormula:
        """The formula with coefficients given in microseconds; each is rounded to a nanosecond once."""
        coefficients = (base_us, per_token_us, per_sequence_us, per_context_us)
        return cls(*(round(value * 1000) for value in coefficients))

    def as_dict(self) -> dict[str, int]:
        """The coefficients by name, for a log's header."""
        return asdict(self)

    def step_ns(self, tokens: int, sequences: int, context_tokens: int) -> int:
        """Duration in ns of a step with the given totals over its requests."""
        return (
            self.base_ns
            + self.per_token_ns * tokens
            + self.per_sequence_ns * sequences
            + self.per_context_ns * context_tokens
        )

    # The interface of a step timer; KV extremes do not matter to the formula.

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int:  # noqa: ARG002
        """Duration in ns of a step of ``n`` decodes whose KV lengths sum to ``kv_sum``."""
        return self.step_ns(n, n, kv_sum)

    def decode_ends(
        self,
        ends_ns: list[int],
        n: int,
        kv_sum: int,
        kv_min: int,  # noqa: ARG002
        kv_max: int,  # noqa: ARG002
        steps: int,
        depth: int = 1,
        until_ns: int = NEVER,
    ) -> None:
        """Add the ends of such steps; see :meth:`servesim.cost.stage_cost.StageCost.decode_ends`."""
        step_ns, more_ns = self.step_ns(n, n, kv_sum), self.per_context_ns * n
        for step in range(steps):
            if step and ends_ns[-depth] >= until_ns:
                return
            ends_ns.append(ends_ns[-1] + step_ns + step * more_ns)

    def decode_run_ns(
        self,
        n: int,
        kv_sum: int,
        kv_min: int,  # noqa: ARG002
        kv_max: int,  # noqa: ARG002
        steps: int,
    ) -> NDArray[np.int64]:
        """Durations in ns, shape (steps,), of consecutive steps of the same ``n`` decodes."""
        import numpy as np

        return self.step_ns(n, n, kv_sum) + self.per_context_ns * n * np.arange(steps, dtype=np.int64)

    def mixed_ns(
        self,
        chunks: Sequence[tuple[int, int]],
        n: int,
        kv_sum: int,
        kv_min: int,  # noqa: ARG002
        kv_max: int,  # noqa: ARG002
    ) -> int:
        """Duration in ns of a step with prefill ``chunks`` of (tokens, history) and ``n`` decodes."""
        tokens = n + sum(chunk for chunk, _ in chunks)
        context = kv_sum + sum(history for _, history in chunks)
        return self.step_ns(tokens, n + len(chunks), context)
