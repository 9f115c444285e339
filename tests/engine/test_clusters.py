"""Clusters from their config to their results: the shipped ones, and small ones worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.api import simulate
from servesim.errors import InputError, MissingFileError
from servesim.results.banner import banner
from servesim.specs.cluster import load_cluster
from servesim.specs.engine_options import EngineOptions
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import DENSE, KV_BYTES_PER_TOKEN, MOE, toy_cluster, toy_instance

if TYPE_CHECKING:
    from servesim.results.result import Result

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs/cluster").glob("*.json") if p.name != "schema.json")
MS = 1_000_000


pytestmark = pytest.mark.usefixtures("toys")


# ------------------------------------------------------------------ the shipped configs


def chat() -> Workload:
    """Twelve requests and three sessions of three turns, each turn starting with what was said before."""
    rng = np.random.default_rng(5)
    made = [Request(i, 300 + 40 * i, 20 + i, i * 60 * MS) for i in range(12)]
    for session in range(3):
        said = rng.integers(0, 1000, 200)
        for turn in range(3):
            answer = rng.integers(0, 1000, 24)
            request = Request(len(made), len(said), 24, 0, said, answer, f"chat {session}", turn)
            if turn:
                request.predecessor, request.tool_ns = request.index - 1, 300 * MS
            else:
                request.arrival_ns = session * 150 * MS
            made.append(request)
            said = np.concatenate((said, answer, rng.integers(0, 1000, 30)))
    return Workload(made, "chat")


def run_shipped(path: Path, workload: Workload, **flags: Any) -> Result:
    try:
        return simulate(path, workload, **flags)
    except MissingFileError as error:
        if str(error).startswith("profiler/perf/"):
            pytest.skip(str(error).splitlines()[0])
        raise


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_cluster_serves_and_repeats_to_the_byte(path: Path, tmp_path: Path) -> None:
    workload = chat()
    result = run_shipped(path, workload)
    assert result.rejected == []
    assert result.requests["request_id"].tolist() == list(range(len(workload)))
    assert result.requests["output"].tolist() == [r.output_tokens for r in workload]
    assert (result.requests["TTFT"] > 0).all()
    follow_ups = result.requests[12:][result.requests["sub_request"][12:] > 0]
    before = result.requests[follow_ups["request_id"] - 1]
    assert (follow_ups["arrival"] == before["end_time"] + 300 * MS).all()
    written = []
    for number, stepped in enumerate((False, False, True)):
        again = result if number == 0 else run_shipped(path, workload, stepped=stepped)
        again.save(tmp_path / f"{number}.csv")
        again.save_steps(tmp_path / f"{number}-steps.csv")
        written.append([(tmp_path / f"{number}{kind}.csv").read_bytes() for kind in ("", "-steps")])
    assert written[0] == written[1] == written[2]


def test_a_config_is_shipped_for_every_way_to_use_several_npus() -> None:
    clusters = {path.stem: load_cluster(path) for path in SHIPPED}
    shapes = {
        name: (
            cluster.num_nodes,
            len(cluster.instances),
            *max((s.tp_size, s.pp_size, s.ep_size, s.dp_group is not None) for _, s in cluster.instances),
            len({(s.hardware, s.pd_type) for _, s in cluster.instances}),
        )
        for name, cluster in clusters.items()
    }
    wanted = {
        "single_node_single_instance": (1, 1, 1, 1, 1, False, 1),
        "two_instances": (1, 2, 1, 1, 1, False, 1),
        "four_tp2": (1, 4, 2, 1, 1, False, 1),
        "pipeline": (1, 1, 1, 4, 1, False, 1),
        "tensor_pipeline": (1, 1, 2, 2, 1, False, 1),
        "moe_expert_parallel": (1, 1, 2, 1, 2, False, 1),
        "data_parallel": (1, 2, 1, 1, 1, True, 1),
        "data_expert_parallel": (1, 2, 1, 1, 2, True, 1),
        "data_tensor_pipeline": (1, 2, 2, 2, 1, True, 1),
        "two_nodes": (2, 4, 2, 1, 1, False, 1),
        "prefill_decode": (1, 3, 1, 1, 1, False, 2),
        "prefill_decode_h100_l40s": (2, 3, 1, 1, 1, False, 2),
        "per_instance_options": (1, 3, 1, 1, 1, False, 1),
    }
    assert {name: shapes[name] for name in wanted} == wanted
    assert isinstance(clusters["two_nodes"].link_bw, tuple)


def test_every_shipped_config_is_explained() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"configs/cluster/([\w.]+)", pages))
    assert {path.name for path in SHIPPED} <= named


# ------------------------------------------------------------------ several models


def test_requests_go_to_the_instances_of_the_model_they_ask_for() -> None:
    cluster = toy_cluster([toy_instance(), toy_instance(MOE), toy_instance()])
    requests = [Request(i, 50, 5, i * MS // 10, model=(DENSE, MOE)[i % 2]) for i in range(10)]
    instances = simulate(cluster, Workload(requests, "mixed")).requests["instance_id"]
    assert set(instances[1::2].tolist()) == {1}
    assert set(instances[::2].tolist()) == {0, 2}


def test_a_request_that_asks_for_no_model_goes_to_any() -> None:
    cluster = toy_cluster([toy_instance(), toy_instance(MOE)])
    requests = [Request(i, 50, 5, 0) for i in range(4)]
    assert simulate(cluster, Workload(requests, "any")).requests["instance_id"].tolist() == [0, 1, 0, 1]


def test_the_model_stands_in_the_workload_file(toys: Path) -> None:
    lines = [
        {"input_toks": 20, "output_toks": 2, "arrival_time_ns": 0, "model": MOE},
        {
            "arrival_time_ns": 0,
            "model": MOE,
            "sub_requests": [
                {"input_toks": 20, "output_toks": 2},
                {"input_toks": 20, "output_toks": 2, "model": DENSE},
            ],
        },
    ]
    (toys / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = simulate(toy_cluster([toy_instance(), toy_instance(MOE)]), toys / "mixed.jsonl")
    assert result.requests["instance_id"].tolist() == [1, 1, 0]


def test_a_model_that_nobody_serves_is_told_before_the_run() -> None:
    requests = [Request(0, 20, 2, 0), Request(1, 20, 2, 0, model="org/other")]
    with pytest.raises(InputError) as error:
        simulate(toy_cluster([toy_instance(), toy_instance(MOE)]), Workload(requests, "mine"))
    assert str(error.value) == (
        "mine: request 1 asks for model org/other, which no instance serves; served: org/toy, org/toy-moe"
    )


def test_each_model_has_its_own_prefill_and_decode_instances() -> None:
    sides = ("prefill", "decode")
    cluster = toy_cluster([toy_instance(model, pd_type=side) for model in (DENSE, MOE) for side in sides])
    requests = [Request(i, 50, 5, 0, model=(MOE, None)[i % 2]) for i in range(6)]
    taken = simulate(cluster, Workload(requests, "mixed")).requests[["instance_id", "decode_instance"]]
    assert {tuple(pair) for pair in taken[::2].tolist()} == {(2, 3)}
    assert {tuple(pair) for pair in taken[1::2].tolist()} <= {(0, 1), (2, 3)}


# ------------------------------------------------------------------ sessions


def conversation(turns: int = 3, session: int = 0, first: int = 0, arrival_ns: int = 0) -> list[Request]:
    """Turns of 40 new prompt tokens and 24 of an answer, one millisecond apart."""
    said = np.arange(40) + 1000 * session
    made = []
    for turn in range(turns):
        answer = np.full(24, 500 + turn + 1000 * session)
        request = Request(first + turn, len(said), 24, arrival_ns, said, answer, f"s{session}", turn)
        if turn:
            request.predecessor, request.tool_ns, request.arrival_ns = first + turn - 1, MS, 0
        made.append(request)
        said = np.concatenate((said, answer, np.full(40, 700 + turn + 1000 * session)))
    return made


def test_a_session_finds_its_prompts_on_the_prefill_side() -> None:
    cluster = toy_cluster([toy_instance(pd_type="prefill"), toy_instance(pd_type="decode")])
    result = simulate(cluster, Workload(conversation(), "session"), block_size=8)
    # What the prefill instance has computed is the prompts: 40, then 104 of the 168 tokens. Answers are
    # computed on the decode instance.
    assert result.requests["input"].tolist() == [40, 104, 168]
    assert result.requests["npu_hit"].tolist() == [0, 40, 104]
    assert result.requests["decode_instance"].tolist() == [1, 1, 1]
    assert (result.requests["arrival"][1:] == result.requests["end_time"][:-1] + MS).all()


def test_without_separate_sides_a_session_finds_its_answers_too() -> None:
    result = simulate(toy_cluster([toy_instance()]), Workload(conversation(), "session"), block_size=8)
    # The last token of an answer has no KV yet, so of 64 and 128 known tokens 63 and 127 are computed.
    assert result.requests["npu_hit"].tolist() == [0, 56, 120]


def test_sticky_sessions_stay_and_free_ones_take_turns() -> None:
    cluster = toy_cluster([toy_instance() for _ in range(3)])
    workload = Workload([*conversation(), *conversation(session=1, first=3, arrival_ns=10)], "sessions")
    free = simulate(cluster, workload, request_routing_policy="RR")
    stay = simulate(cluster, workload, request_routing_policy="RR", sticky_sessions=True)
    assert free.requests["instance_id"].tolist() == [0, 2, 1, 1, 0, 2]
    assert stay.requests["instance_id"].tolist() == [0, 0, 0, 1, 1, 1]
    assert stay.requests["npu_hit"].sum() > free.requests["npu_hit"].sum()


def test_a_sticky_session_comes_back_after_another_model() -> None:
    cluster = toy_cluster([toy_instance(), toy_instance(), toy_instance(MOE)])
    session = conversation(turns=4)
    for request, model in zip(session, (DENSE, MOE, DENSE, MOE), strict=True):
        request.model = model
    other = Request(4, 50, 400, 0, model=DENSE)
    result = simulate(cluster, Workload([*session, other], "sticky"), sticky_sessions=True)
    assert result.requests["instance_id"].tolist() == [0, 2, 0, 2, 1]


# ------------------------------------------------------------------ options per instance

EVERY_OPTION: dict[str, tuple[Any, Any]] = {
    "dtype": ("fp8", "fp8"),
    "kv_cache_dtype": ("fp8", "fp8"),
    "kv_cache_dtype_skip_layers": ("1 0", "0,1"),
    "block_size": (32, 32),
    "decode_context_parallel_size": (1, 1),
    "dcp_comm_backend": ("a2a", "a2a"),
    "max_num_seqs": (0, 2**31 - 1),
    "max_num_batched_tokens": (0, 2048),
    "max_model_len": ("1k", 1000),
    "long_prefill_token_threshold": (100, 100),
    "enable_chunked_prefill": (False, False),
    "reserve_full_isl": (False, False),
    "enable_prefix_caching": (False, False),
    "disable_hybrid_kv_cache_manager": (True, True),
    "async_scheduling": (False, False),
    "scheduling_policy": ("priority", "priority"),
    "max_num_active_seqs": (5, 5),
    "max_num_scheduled_tokens": (300, 300),
    "long_prefill_token_threshold_adaptive": (True, True),
    "prefill_schedule_interval": (3, 3),
    "watermark": (0.1, 0.1),
    "kv_load": ("async", "async"),
    "enable_lora": (True, True),
    "max_loras": (4, 4),
    "enable_block_copy": (False, False),
    "enable_local_offloading": (False, False),
    "enable_attn_offloading": (False, False),
    "enable_sub_batch_interleaving": (False, False),
    "cudagraph": (False, False),
    "npu_memory_utilization": (0.5, 0.5),
    "num_gpu_blocks": (900, 900),
}
"""Option -> (what an instance says, what it then runs with)."""


def test_the_table_has_all_options_of_an_instance() -> None:
    assert sorted(EVERY_OPTION) == sorted(EngineOptions.model_fields)


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_an_instance_may_differ_in_every_option(name: str) -> None:
    said, runs_with = EVERY_OPTION[name]
    cluster = toy_cluster([toy_instance(), toy_instance(**{name: said})])
    requests = [Request(i, 300, 20, 0) for i in range(6)]
    flag = not said if isinstance(said, bool) and name in WORKS_BOTH_WAYS else None
    flags: dict[str, Any] = {} if flag is None else {name: flag}
    result = simulate(cluster, Workload(requests, "w"), **flags)
    default = {**RuntimeOptions().model_dump(), "dtype": "bfloat16", **flags}[name]
    first, second = (getattr(instance.options, name) for instance in result.instances)
    assert (first, second) == (default or first, runs_with)
    assert len(result.requests) == 6
    assert set(result.requests["instance_id"].tolist()) == {0, 1}


WORKS_BOTH_WAYS = {name for name in EVERY_OPTION if not name.endswith(("offloading", "interleaving"))}


def test_kv_dtypes_and_block_sizes_differ_by_instance_in_effect() -> None:
    def instance(**own: Any) -> dict[str, Any]:
        return {**toy_instance(**own), "num_gpu_blocks": None}

    cluster = toy_cluster([instance(), instance(kv_cache_dtype="fp8"), instance(block_size=32)])
    result = simulate(cluster, Workload([Request(0, 20, 2, 0)], "w"))
    plain, fp8, large = (instance.capacity for instance in result.instances)
    assert (plain.bytes_per_token, fp8.bytes_per_token) == (KV_BYTES_PER_TOKEN, KV_BYTES_PER_TOKEN // 2)
    assert fp8.num_blocks in (2 * plain.num_blocks, 2 * plain.num_blocks + 1)
    assert large.num_blocks == plain.num_blocks // 2
    assert [i.options.variant for i in result.instances] == ["bf16", "bf16-kvfp8", "bf16"]


# ------------------------------------------------------------------ prefill and decode that differ

SLOW_LINK_GBS = 0.001
"""A byte takes 1000 ns, so that the transfer of a prompt's KV dominates everything."""


def first_token_ns(prefill: dict[str, Any], decode: dict[str, Any], nodes: int = 1) -> int:
    """Of a prompt of 100 tokens with 3 to generate."""
    sides = [toy_instance(pd_type="prefill", **prefill)], [toy_instance(pd_type="decode", **decode)]
    described = sides if nodes == 2 else ([*sides[0], *sides[1]],)
    links = {"link_bw": [1, 1, SLOW_LINK_GBS, SLOW_LINK_GBS / 4], "link_latency": 0}
    result = simulate(toy_cluster(*described, **links), Workload([Request(0, 100, 3, 0)], "one"))
    assert result.requests["output"].tolist() == [3]
    return int(result.requests["TTFT"][0])


def test_the_kv_of_a_prompt_takes_its_bytes_over_the_link() -> None:
    alone = simulate(toy_cluster([toy_instance()]), Workload([Request(0, 1, 2, 0)], "one"))
    one_token_step = int(alone.requests["TTFT"][0])
    kv_bytes = 100 * KV_BYTES_PER_TOKEN
    waited = first_token_ns({}, {}) - kv_bytes * 1000
    # what is left is the decode side's step for the last prompt token, over a KV cache of 99 tokens
    assert one_token_step <= waited < 2 * one_token_step


def test_fp8_on_the_prefill_side_halves_the_transfer() -> None:
    # The toy's kernels are the same in every variant, so that nothing but the bytes differs.
    both = {"kv_cache_dtype": "fp8"}
    halved = 100 * KV_BYTES_PER_TOKEN // 2 * 1000
    assert first_token_ns({}, {}) - first_token_ns(both, both) == halved
    assert first_token_ns({}, {}) - first_token_ns(both, {}) == halved
    assert first_token_ns({}, {}) - first_token_ns({}, both) == 0


def test_two_ranks_move_half_each_only_on_both_sides() -> None:
    kv_ns = 100 * KV_BYTES_PER_TOKEN * 1000
    single, double = {"tp_size": 1}, {"tp_size": 2}
    decode_step = {tp: first_token_ns(single, {"tp_size": tp}) - kv_ns for tp in (1, 2)}
    assert first_token_ns(double, double) == kv_ns // 2 + decode_step[2]
    assert first_token_ns(double, single) == kv_ns + decode_step[1]


def test_between_nodes_the_slower_uplink_counts() -> None:
    kv_ns = 100 * KV_BYTES_PER_TOKEN * 1000
    assert first_token_ns({}, {}, nodes=2) - first_token_ns({}, {}) == 3 * kv_ns


@pytest.mark.parametrize("sides", [(1, 3), (3, 1), (2, 2)])
def test_any_number_of_prefill_and_decode_instances(sides: tuple[int, int]) -> None:
    prefill = [
        toy_instance(pd_type="prefill", tp_size=2, dtype="fp8", block_size=16) for _ in range(sides[0])
    ]
    decode = [toy_instance(pd_type="decode", pp_size=2, block_size=4) for _ in range(sides[1])]
    workload = Workload([Request(i, 90 + i, 10, i * MS // 5) for i in range(30)], "w")
    result = simulate(toy_cluster(prefill, decode), workload)
    assert len(result.requests) == 30
    assert set(result.requests["instance_id"].tolist()) == set(range(sides[0]))
    assert set(result.requests["decode_instance"].tolist()) == set(range(sides[0], sum(sides)))


def test_groups_in_lock_step_may_be_the_sides() -> None:
    shape: dict[str, Any] = {"model": MOE, "ep_size": 2}
    prefill = [toy_instance(**shape, pd_type="prefill", dp_group="p") for _ in range(2)]
    decode = [toy_instance(**shape, pd_type="decode", dp_group="d") for _ in range(2)]
    workload = Workload([Request(i, 90 + i, 10, i * MS // 5) for i in range(12)], "w")
    result = simulate(toy_cluster(prefill, decode), workload)
    assert set(result.requests["instance_id"].tolist()) == {0, 1}
    assert set(result.requests["decode_instance"].tolist()) == {2, 3}


# ------------------------------------------------------------------ what stays refused

MOE_MEMBER = {"model": MOE, "dp_group": "A"}


@pytest.mark.parametrize(
    ("instances", "complaint"),
    [
        (
            [{"pd_type": "prefill"}],
            r"pd_type: 'prefill' needs a 'decode' instance of org/toy beside it",
        ),
        (
            [{"pd_type": "prefill"}, {"pd_type": "decode"}, {}],
            r"instances\[2\].pd_type: null is not allowed beside prefill and decode instances",
        ),
        ([{"pp_size": 6}], r"pp_size: 6 is not allowed; must be <= 5, the layers of org/toy"),
        ([{"ep_size": 2}], r"ep_size: 2 is not allowed; must be 1, as org/toy has no experts"),
        ([{"tp_size": 3}], r"tp_size: 3 is not allowed; must divide the 4 attention heads"),
        (
            [{"dp_group": "A"}, {"dp_group": "A", "tp_size": 2}],
            r"tp_size: 2 is not allowed; must be 1 as in",
        ),
        (
            [MOE_MEMBER, {**MOE_MEMBER, "async_scheduling": False}],
            r"instance 1: async_scheduling false is not allowed; must be true as in instance 0, the same "
            r"dp_group 'A'",
        ),
        (
            [{**MOE_MEMBER, "enable_block_copy": False}, MOE_MEMBER],
            r"instance 1: enable_block_copy true is not allowed; must be false as in instance 0",
        ),
    ],
)
def test_a_cluster_that_cannot_be_is_told(instances: list[dict[str, Any]], complaint: str) -> None:
    cluster = toy_cluster([toy_instance(**keys) for keys in instances])
    with pytest.raises(InputError, match=complaint):
        simulate(cluster, Workload([Request(0, 20, 2, 0)], "w"))


def test_the_banner_says_how_an_instance_is_spread() -> None:
    sides: list[dict[str, Any]] = [{"pd_type": "prefill", "tp_size": 2}, {"pd_type": "decode", "pp_size": 3}]
    group = toy_instance(MOE, dp_group="A", ep_size=2)
    cluster = toy_cluster([*(toy_instance(**side) for side in sides), group, group])
    result = simulate(cluster, Workload([Request(0, 20, 2, 0)], "w"))
    text = banner(RuntimeOptions(), result.workload, result.instances)
    assert re.findall(r"^(instances? .*): .*\((.*)\)$", text, re.MULTILINE) == [
        ("instance 0", "tp 2, prefill"),
        ("instance 1", "tp 1, pp 3, decode"),
        ("instances 2-3", "tp 1, ep 2, dp_group A"),
    ]


# ------------------------------------------------------------------ what servers let in, and how answers end


def at_once(*shapes: tuple[int, int], apart_ns: int = 0, **keys: Any) -> Workload:
    rows = [Request(i, *shape, i * apart_ns, **keys) for i, shape in enumerate(shapes)]
    return Workload(rows, "w")


def test_a_full_queue_turns_requests_away() -> None:
    toy = toy_cluster([toy_instance()])
    result = simulate(toy, at_once(*[(50, 20)] * 6), max_num_queued_reqs=4)
    assert [rejected.request for rejected in result.rejected] == [4, 5]
    assert "503" in result.rejected[0].reason
    spread = at_once(*[(50, 2)] * 6, apart_ns=1000 * MS)
    assert not simulate(toy, spread, max_num_queued_reqs=1).rejected


def test_long_prompts_in_the_queue_turn_requests_away() -> None:
    toy = toy_cluster([toy_instance()])
    result = simulate(toy, at_once(*[(50, 20)] * 6), max_num_queued_tokens=120)
    assert [rejected.request for rejected in result.rejected] == [3, 4, 5]
    # once the first tokens are out, only the new prompts count
    later = at_once(*[(50, 400)] * 6, apart_ns=100 * MS)
    assert not simulate(toy, later, max_num_queued_tokens=50).rejected


@pytest.mark.parametrize(("asynchronous", "more"), [(True, 1), (False, 0)])
def test_a_stop_token_costs_a_step_more(asynchronous: bool, more: int) -> None:
    toy = toy_cluster([toy_instance()])
    ends, stops = (
        simulate(toy, at_once((50, 20), max_tokens=limit), async_scheduling=asynchronous) for limit in (0, 90)
    )
    assert len(stops.steps) == len(ends.steps) + more
    assert stops.requests.tolist() == ends.requests.tolist()


def test_an_adapter_that_no_instance_serves_is_refused() -> None:
    workload = at_once((50, 20), (50, 20))
    workload.requests[1].lora = "sql"
    told = "request 1 names the LoRA adapter sql, and instance 0 serves none; add --enable-lora"
    with pytest.raises(InputError, match=told):
        simulate(toy_cluster([toy_instance(), toy_instance(enable_lora=True)]), workload)
    assert not simulate(toy_cluster([toy_instance(enable_lora=True)]), workload).rejected


def test_limits_that_vllm_refuses_are_refused() -> None:
    toy = toy_cluster([toy_instance()])
    for flags, told in (
        ({"max_num_batched_tokens": 64}, "must be >= 128, the most requests that run"),
        ({"long_prefill_token_threshold": 1500, "max_model_len": 1000}, "must be <= 1000"),
        ({"max_num_active_seqs": 129}, "must be <= 128"),
    ):
        with pytest.raises(InputError, match=told):
            simulate(toy, at_once((50, 20)), **flags)
    old = {"long_prefill_token_threshold": 1500, "max_model_len": 1000, "vllm_version": "0.26"}
    simulate(toy, at_once((50, 20)), **old)
