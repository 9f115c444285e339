"""A step of ranks that share KV, from its parts; and what a run says of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import simulate
from servesim.cost.batch_shape import Shape
from servesim.engine.build import step_pricing
from servesim.errors import InputError
from servesim.power.activity import shared_kv_bytes_per_token
from servesim.results.meters import InstanceMeter
from servesim.specs.cluster import load_cluster
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import DENSE, LAYERS, MOE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toy_world(tmp_path_factory.mktemp("shared")) as root:
        yield root


def shares(size: int, model: str = DENSE, **own: Any) -> dict[str, Any]:
    return toy_instance(model, tp_size=4, decode_context_parallel_size=size, **own)


def lines_of(size: int, shape: Shape) -> tuple[float, dict[str, float]]:
    """ns of a step, and µs of its layers."""
    cluster = load_cluster(toy_cluster([shares(size)]))
    pricing = step_pricing(cluster, RuntimeOptions(cudagraph=False), 0)
    stage = pricing.cost.alone
    assert stage is not None
    found: dict[str, float] = Counter()
    for line in stage.explain(shape):
        found[line.layer] += line.total_us
    return stage.step_ns(shape), found


def test_a_step_by_hand() -> None:
    """4 decodes of 128 tokens in 5 blocks: 13 us over 64 of them and 10 over the new ones, where one rank's
    attention over all 128 took 17; three passes of 1,000 ns and half of their bytes / 1.75."""
    shape = Shape((), 4, 4 * 128, 128, 128)
    (one_ns, one), (two_ns, two) = lines_of(1, shape), lines_of(2, shape)
    assert one["attention"] == pytest.approx(LAYERS * 17)
    assert two["attention"] == pytest.approx(LAYERS * 23)
    tokens, heads, width = 4, 2, 4
    queries = tokens * heads * width * 2
    sums = 2 * tokens * heads * 4
    passes = {"queries": queries, "log-sum-exps": sums, "outputs": queries}
    for name, size in passes.items():
        assert two[f"shared KV: {name}"] == pytest.approx(LAYERS * (1000 + size / 1.75 / 2) / 1000)
    exchanged = sum(us for name, us in two.items() if name.startswith("shared KV"))
    assert two_ns - one_ns == pytest.approx(1000 * (LAYERS * 6 + exchanged), abs=1)
    assert {name: us for name, us in two.items() if not name.startswith(("shared KV", "attention"))} == {
        name: us for name, us in one.items() if name != "attention"
    }


def test_a_step_with_prompts_is_the_sum_of_its_lines() -> None:
    for shape in (Shape(((64, 96),), 3, 300, 80, 140), Shape(((64, 0),)), Shape(((16, 200), (2, 0)))):
        step_ns, lines = lines_of(2, shape)
        assert step_ns == pytest.approx(1000 * sum(lines.values()), abs=1)
        shares_kv = bool(shape.num_decodes) or any(history for _, history in shape.chunks)
        assert ("shared KV: outputs" in lines) == shares_kv


def test_a_run_in_jumps_is_that_of_its_steps() -> None:
    requests = [Request(i, 40 + 30 * i, 50, i * 10**5) for i in range(6)]
    runs = [
        simulate(
            toy_cluster([shares(2)]), Workload(requests, "w"), stepped=stepped, max_num_batched_tokens=128
        )
        for stepped in (False, True)
    ]
    assert runs[0].requests.tolist() == runs[1].requests.tolist()


def test_pipelines_and_groups_share_too() -> None:
    work = Workload([Request(i, 40, 5, 0) for i in range(4)], "w")
    assert len(simulate(toy_cluster([shares(2, pp_size=2)]), work).requests) == 4
    members = [shares(2, MOE, dp_group="a", ep_size=4) for _ in range(2)]
    assert len(simulate(toy_cluster(members), work).requests) == 4
    members[1]["decode_context_parallel_size"] = 1
    with pytest.raises(InputError, match="decode_context_parallel_size"):
        simulate(toy_cluster(members), work)


def test_a_run_says_that_it_is_derived() -> None:
    result = simulate(toy_cluster([shares(2)]), Workload([Request(0, 40, 5, 0)], "w"))
    (instance,) = result.instances
    assert instance.stated_error is not None
    assert instance.stated_error.percent == 30.0
    assert "decode context parallelism: derived" in instance.stated_error.reason
    assert instance.uncertainty is not None
    assert instance.uncertainty.decode > 0.3
    (entry,) = result.summary["instances"]
    assert entry["options"]["decode_context_parallel_size"] == 2
    assert entry["options"]["dcp_comm_backend"] == "ag_rs"
    assert any("derived, not measured" in note for note in result.log.notes)


def sent_bytes(size: int, requests: list[Request]) -> int:
    result = simulate(toy_cluster([shares(size)]), Workload(requests, "w"))
    (log,) = result.log.instances
    meter = InstanceMeter(log)
    return meter.link_bytes(meter.look_at(0, result.log.end_ns), 0, result.log.end_ns)


def test_the_meter_counts_what_decodes_send() -> None:
    """One token of five is the prompt's, whose step has no KV to share; the other four are decodes."""
    (request,) = requests = [Request(0, 40, 5, 0)]
    each = shared_kv_bytes_per_token(load_model(DENSE), 4, 2, "ag_rs")
    assert sent_bytes(2, requests) - sent_bytes(1, requests) == (request.output_tokens - 1) * each


def test_bytes_that_decodes_send() -> None:
    """Two groups of two ranks, each sends its payload once: 2 heads x (4 + 4 elements, 2 x 2 for sums)."""
    model = load_model(DENSE)
    assert shared_kv_bytes_per_token(model, 4, 2, "ag_rs") == LAYERS * 2 * 1 * 2 * (4 + 4 + 4) * 2
    assert shared_kv_bytes_per_token(model, 4, 2, "a2a") == LAYERS * 2 * 1 * 2 * (4 + 4 + 2) * 2
    assert shared_kv_bytes_per_token(model, 4, 1, "ag_rs") == 0
