"""A meter whose clock is a formula: every time can be worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.meter import ProfileJob, Provenance
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import HardwareSpec
from servesim.specs.model import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch

GRID = SweepGrid(
    64, 8, 256, token_factor=4.0, chunk_factor=4.0, decode_factor=4.0, kv_factor=4.0, skew_factor=8.0
)
"""A sweep of a few dozen shots."""


class PulledPlug(BaseException):
    """Stands for the signal that ends a process."""


def job(
    model: str = "servesim/tiny-llama", dtype: str = "bfloat16", kv: str = "auto", tp: tuple[int, ...] = (1,)
) -> ProfileJob:
    """A job of a shipped tiny model."""
    spec = load_model(model)
    architecture = load_architecture(spec.model_type)
    return ProfileJob(spec, architecture, HardwareSpec(name="Fake"), dtype, kv, tp, 64, 8, 256)


class FakeMeter:
    """Dense layers take 1 µs a token, attention 1 ns a token of KV plus 10 ns a token of the longest."""

    def __init__(
        self, *, stop_after: int | None = None, capacity: int = 1 << 40, device: str = "fake device"
    ) -> None:
        """``stop_after``: shots until the plug is pulled."""
        self.shots = 0
        self.ranks: list[int] = []
        self._stop_after, self._capacity, self._device = stop_after, capacity, device

    computes = False

    @property
    def conditions(self) -> dict[str, Any]:
        return {"source": "torch", "gpu": self._device}

    def provenance(self, content: BundleContent) -> Provenance:
        del content
        return Provenance("torch", {}, {"measured": {"clock": "a formula"}})

    def grid(self) -> SweepGrid:
        return GRID

    def start_rank(self, tp: int) -> None:
        self.ranks.append(tp)

    def kv_capacity_tokens(self) -> int:
        return self._capacity

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        self._count()
        return {layer: [1.0 * count for count in tokens] for layer in layers}

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        self._count()
        return {layer: [2.0 * count for count in sequences] for layer in layers}

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        self._count()
        return [1.0 + 0.001 * batch.kv_tokens + 0.01 * batch.longest for batch in batches]

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        self._count()
        return [10.0 * activated + tokens for tokens, activated in points]

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        self._count()
        return [0.001 * payload for payload in payloads]

    def skew_rows(self) -> list[Row]:
        return []

    def close(self) -> None:
        pass

    def _count(self) -> None:
        if self.shots == self._stop_after:
            raise PulledPlug
        self.shots += 1
