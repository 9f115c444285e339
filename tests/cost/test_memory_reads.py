"""How long a step waits for what it reads, worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.cost.memory_reads import StageReads
from servesim.cost.step_terms import StageTerms
from servesim.memory.ledger import Memory
from servesim.memory.placement import PlacedLayer
from tests.cost.bundles import toy_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

ONE_GBS = Memory("toy", "node", 0, 1.0, 0.0)  # a byte takes a nanosecond


@dataclass
class Fixed:
    """A layer that takes ``cost`` µs whatever it computes."""

    name: str
    cost: float
    calls: int = 1

    def us(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.full(len(counts), self.cost)

    def origin(self, count: int) -> str:
        return f"{count}"


def reads(layers: list[PlacedLayer], ports: dict[str, Memory] | None = None, **how: Any) -> StageReads:
    """Of layers that take 1 µs each, the head 2 µs, attention what is said."""
    names = {layer.name for layer in layers if layer.kv_place is None}
    terms = StageTerms(
        [Fixed(name, 1.0) for name in sorted(names - {"lm_head"})], [], [Fixed("lm_head", 2.0)]
    )
    places = {layer.place for layer in layers} | {layer.kv_place for layer in layers} - {None}
    ports = ports or {place: ONE_GBS for place in places if place}
    values: dict[str, Any] = {"ranks": 1, "kv_layer_bytes": 10, "local": False, "model": toy_model(), **how}
    return StageReads(layers, terms, ports, **values)


def weights(place: str, size: int, name: str = "dense") -> PlacedLayer:
    return PlacedLayer(name, place, size, size, block=0)


def wait(
    layers: list[PlacedLayer], *, tokens: int = 1, attention: float = 0.0, kv: int = 0, **how: Any
) -> float:
    made = reads(layers, **how)
    return made.wait_ns(tokens, 1, attention, {"cpu": kv, "cxl:0": kv})


@pytest.mark.parametrize(("size", "waits"), [(400, 0.0), (1000, 0.0), (1700, 700.0)])
def test_a_layer_takes_as_long_as_the_slower_of_compute_and_read(size: int, waits: float) -> None:
    assert wait([weights("cpu", size)]) == waits


def test_a_read_takes_bytes_over_bandwidth_and_the_latency() -> None:
    assert (
        wait([weights("cpu", 6000)], ports={"cpu": Memory("toy", "node", 0, 2.0, 250.0)}) == 3000 + 250 - 1000
    )


def test_reads_of_one_device_come_one_after_the_other() -> None:
    # Arrivals at 3 and 6 µs; the second layer has been computed by 2.
    assert wait([weights("cpu", 3000), weights("cpu", 3000)]) == 4000


def test_weights_arrive_four_times_as_fast_from_four_devices() -> None:
    computed = 8 * 1000
    one = wait([weights("cxl:0", 100_000) for _ in range(8)]) + computed
    four = wait([weights(f"cxl:{layer % 4}", 100_000) for layer in range(8)]) + computed
    # 800 µs from one device; 200 µs from each of four, of which all but the last layer is hidden.
    assert one == 800_000
    assert four == 200_000 + 3 * 1000  # the last of device 0 arrives at 200 µs, and three layers follow
    assert four == pytest.approx(one / 4, rel=0.02)


def test_reads_run_ahead_of_layers_that_compute_long() -> None:
    # While attention computes for 5 µs the weights behind it come in.
    attention = PlacedLayer("attention", "npu", block=0, kv_place="npu")
    assert wait([attention, weights("cpu", 5500)], attention=5000.0) == 0
    assert wait([weights("cpu", 5500), attention], attention=5000.0) == 4500


def test_attention_reads_its_kv_over_the_device_it_lies_on() -> None:
    attention = PlacedLayer("attention", "npu", block=0, kv_place="cpu")
    # 300 tokens of 10 bytes in each of two blocks: 6 µs, of which attention computes 2.
    assert wait([attention, attention], attention=2000.0, kv=300) == 4000
    assert wait([attention, attention], attention=2000.0, kv=0) == 0


def test_ranks_read_their_shares_over_the_same_device() -> None:
    attention = PlacedLayer("attention", "npu", block=0, kv_place="cpu")
    assert wait([weights("cpu", 3000)], ranks=2) == 6000 - 1000
    assert wait([attention], kv=300, ranks=2) == 6000


def test_weights_on_the_npu_are_read_only_when_streamed_again() -> None:
    slow = {"npu": ONE_GBS}
    assert wait([weights("npu", 5000)], ports=slow) == 0
    assert wait([weights("npu", 5000)], ports=slow, local=True) == 4000
    assert wait([weights("npu", 5000)], ports=slow, local=True, ranks=2) == 4000  # each has its own memory


def test_of_the_embedding_only_the_rows_of_the_tokens_are_read() -> None:
    embedding = PlacedLayer("embedding", "cpu", 10**9, 0, 0, 100)
    assert wait([embedding], tokens=30) == 3000 - 1000


def test_only_the_experts_that_are_chosen_are_read() -> None:
    experts = PlacedLayer("moe", "cpu", 9000, 1000, 8000, block=0)
    # One token chooses 2 of 4: half of them. With 64 tokens all are.
    assert wait([experts], tokens=1, model=toy_model(4)) == 1000 + 4000 - 1000
    assert wait([experts], tokens=64, model=toy_model(4)) == pytest.approx(1000 + 8000 - 1000)


def test_the_head_is_waited_for_too() -> None:
    assert wait([weights("npu", 0), weights("cpu", 5000, "lm_head")]) == 5000 - 3000
