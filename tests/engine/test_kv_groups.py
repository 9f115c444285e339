"""Models whose layers do not all keep every token, in whole runs: memory, freeing, quiet stretches, refusals.

The toy model has 3 layers of full attention and 2 that see 100 tokens: groups of 2 layers, of which full
attention takes two (one of them with a layer to spare).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servesim import simulate
from servesim.errors import InputError, NotSupportedError
from servesim.memory.plan import kv_plan
from servesim.results.banner import kv_cache_line
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import WINDOW, WINDOWS, toy_cluster, toy_instance

if TYPE_CHECKING:
    from servesim.results.result import Result

MS = 1_000_000
CONFIGS = Path(__file__).parents[1] / "golden" / "models"


pytestmark = pytest.mark.usefixtures("toys")


def run(requests: list[Request], instance: dict[str, Any] | None = None, **options: Any) -> Result:
    made = toy_instance(WINDOWS, **(instance or {}))
    return simulate(toy_cluster([made]), Workload(requests, "toy"), **options)


def long_answers() -> list[Request]:
    return [Request(i, 90 + 37 * i, 500 + 13 * i, 40 * i * MS) for i in range(6)]


def test_blocks_behind_a_window_are_given_back() -> None:
    one = [Request(0, 40, 900, 0)]
    used = run(one).instances[0].steps.column("kv_blocks_used")
    # two groups keep all of 939 tokens; the third what 100 tokens and one in flight touch
    assert used[-1] == 2 * 59 + -(-(WINDOW + 1) // 16) + 1 - 1
    whole = run(one, disable_hybrid_kv_cache_manager=True).instances[0].steps.column("kv_blocks_used")
    assert whole[-1] == 59  # one group of five layers, so each block is larger


def test_compressed_tokens_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DeepSeek V4: one answer of 3,000 tokens keeps 12 blocks of 256, and the ends of its windows."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("SERVESIM_AUTO_PROFILE", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = simulate(
        workload=Workload([Request(0, 2000, 1000, 0)], "one"),
        model="deepseek-ai/DeepSeek-V4-Flash",
        hardware="B200",
        tp=8,
        num_gpu_blocks=4000,
    )
    instance = result.instances[0]
    assert instance.capacity.plan is not None
    assert len(instance.capacity.plan.groups) == 5
    used = instance.steps.column("kv_blocks_used")
    windows = 2 * (128 // 64 + 1) + (8 // 4 + 1) + (128 // 8 + 1)
    assert 12 < used[-1] <= 12 + windows
    assert used.max() > used[-1]  # while the prompt was computed


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("blocks", [200, 1001])
def test_quiet_stretches_change_nothing(asynchronous: bool, blocks: int) -> None:
    both = [
        run(long_answers(), {"num_gpu_blocks": blocks}, stepped=stepped, async_scheduling=asynchronous)
        for stepped in (False, True)
    ]
    for column in ("start_ns", "end_ns", "kv_blocks_used", "decode_tokens", "preempted"):
        jumped, stepped = (result.instances[0].steps.column(column).tolist() for result in both)
        assert jumped == stepped, column
    assert both[0].requests.tolist() == both[1].requests.tolist()


def test_nothing_is_left_behind() -> None:
    result = run(long_answers(), {"num_gpu_blocks": 170})
    assert result.instances[0].steps.column("preempted").sum() > 0
    assert len(result.requests) == 6


def test_banner_and_summary_name_the_groups() -> None:
    result = run(long_answers())
    line = kv_cache_line(result.instances[0])
    assert "1001 blocks of 16 in 3 groups: 3 layers full, 2 sliding 100" in line
    groups = result.summary["instances"][0]["kv_cache"]["groups"]
    assert [(g["kind"], g["layers"], g["reach"]) for g in groups] == [
        *(("full", 2, None), ("full", 1, None)),
        ("sliding", 2, WINDOW),
    ]


def test_a_request_that_only_windows_make_fit_is_served() -> None:
    need = 2 * 59 + 7 + 1
    assert run([Request(0, 40, 900, 0)], {"num_gpu_blocks": need + 300}).summary["completed"] == 1
    rejected = run([Request(0, 40, 900, 0)], {"num_gpu_blocks": 100})
    assert rejected.summary["completed"] == 0


@pytest.mark.parametrize(
    ("instance", "options", "told"),
    [
        ({"pp_size": 2}, {}, "pp_size: 2 is not modelled for org/toy-windows"),
        ({}, {"prefix_storage": "CPU"}, r"a lower tier of the prefix cache \(CPU\) is not modelled"),
        ({"placement": {"default": {"kv_loc": "cpu"}}}, {}, "placement and attention in memory are not"),
    ],
)
def test_what_moves_kv_is_refused_by_name(
    instance: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(NotSupportedError, match=told):
        run(long_answers(), instance, **options)


def test_prefill_and_decode_instances_are_refused_by_name() -> None:
    sides = [toy_instance(WINDOWS, pd_type=side) for side in ("prefill", "decode")]
    with pytest.raises(NotSupportedError, match=r"pd_type 'prefill'.*3 groups: 3 layers full, 2"):
        simulate(toy_cluster(sides), Workload(long_answers(), "toy"))


def test_an_instance_may_have_one_manager_alone() -> None:
    apart = toy_cluster([toy_instance(WINDOWS), toy_instance(WINDOWS, disable_hybrid_kv_cache_manager=True)])
    result = simulate(apart, Workload(long_answers(), "toy"))
    assert ["groups" in entry["kv_cache"] for entry in result.summary["instances"]] == [True, False]


@pytest.mark.parametrize(("version", "caching"), [("0.24", False), ("0.28", True), ("0.33", True)])
def test_prefixes_of_states_are_cached_as_the_version_does(version: str, caching: bool) -> None:
    model = load_model(str(CONFIGS / "Qwen__Qwen3.5-27B.json"))
    cluster = load_cluster(toy_cluster([toy_instance()]))
    spec = next(spec for _, spec in cluster.instances)
    options = resolve(RuntimeOptions(vllm_version=version), spec, model)
    assert options.enable_prefix_caching is caching
    assert kv_plan(model, options).states_held == (2 if caching else 1)
    asked = resolve(RuntimeOptions(vllm_version=version, enable_prefix_caching=True), spec, model)
    assert asked.enable_prefix_caching


def test_the_flag_cannot_act_without_windows() -> None:
    with pytest.raises(InputError, match="no layer of the model attends to a window or a chunk"):
        simulate(
            toy_cluster([toy_instance()]),
            Workload([Request(0, 4, 2, 0)], "toy"),
            disable_hybrid_kv_cache_manager=True,
        )
