"""Lower tiers of the prefix cache in whole clusters: sessions whose KV the NPUs cannot keep between turns.

An NPU holds 99 blocks of 16 tokens; each of several sessions comes to 1,000 tokens and more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import servesim.engine.connector as lower_tiers
from servesim import simulate
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.memory.sizing import GIB
from servesim.memory.tier import TierPool
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import DENSE, KV_BYTES_PER_TOKEN, MOE, toy_cluster, toy_instance, toy_world
from tests.specs.clusters import instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.results.result import Result

MS = 1_000_000
CHUNK = 256
CXL = {"mem_size": 1, "mem_bw": 50, "mem_latency": 250, "num_devices": 2}
CPU_EVICTS = {"default": {"kv_evict_loc": "cpu"}}
CPU_TIER: dict[str, Any] = {"prefix_storage": "CPU"}
CXL_TIER: dict[str, Any] = {"prefix_storage": "CXL"}


class CheckedPool(TierPool):
    """A pool that is checked after everything that happens to it."""

    __slots__ = ("kept", "written")
    made: list[CheckedPool]

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.kept: dict[tuple[int, int], int] = {}
        """A second account of every chunk ever written."""
        self.written = 0
        self.made.append(self)

    def use(self, key: tuple[int, int]) -> bool:
        found = super().use(key)
        assert not found or key in self.kept, "a chunk that nobody wrote"
        self.check_integrity()
        return found

    def put(self, key: tuple[int, int], size: int) -> int:
        written = super().put(key, size)
        assert self.kept.setdefault(key, size) == size, "a chunk has changed its size"
        self.written += written
        self.check_integrity()
        return written


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy world, with pools that check themselves."""
    CheckedPool.made = []
    monkeypatch.setattr(lower_tiers, "TierPool", CheckedPool)
    with toy_world(tmp_path / "toys") as root:
        yield root


def sessions(count: int = 6, turns: int = 3, gap_ms: int = 40, model: str | None = None) -> Workload:
    """Sessions that begin alike and then differ; a turn adds 300 tokens to what was said, answers have 24."""
    made: list[Request] = []
    for session in range(count):
        said = np.concatenate((np.arange(200), np.full(200, 10_000 + session)))
        for turn in range(turns):
            answer = np.full(24, 20_000 + turn + 100 * session)
            index = len(made)
            arrival = session * gap_ms * MS // 4 if turn == 0 else 0
            request = Request(index, len(said), 24, arrival, said, answer, f"s{session}", turn, model=model)
            if turn:
                request.predecessor, request.tool_ns = index - 1, gap_ms * MS
            made.append(request)
            said = np.concatenate((said, answer, np.full(300, 30_000 + turn + 100 * session)))
    return Workload(made, "sessions")


def small(**keys: Any) -> dict[str, Any]:
    return toy_instance(num_gpu_blocks=100, **keys)


def llama(**keys: Any) -> dict[str, Any]:
    """A model whose kernel times are real: the toy's do not make long prompts slow."""
    return instance(num_gpu_blocks=100, **keys)


def with_cpu(cluster: dict[str, Any], **memory: Any) -> dict[str, Any]:
    for node in cluster["nodes"]:
        node["cpu_mem"] = {**node["cpu_mem"], **memory}
    return cluster


def run(cluster: dict[str, Any] | None = None, workload: Workload | None = None, **flags: Any) -> Result:
    result = simulate(cluster or toy_cluster([small()]), workload or sessions(), **flags)
    check(result)
    return result


def check(result: Result) -> None:
    """What holds for every run."""
    assert len(result.requests) == len(result.workload.requests)
    rows, cache, steps = result.requests, result.summary["prefix_cache"], result.steps
    assert (rows["prefix_hit"] == rows["npu_hit"] + rows["storage_hit"]).all()
    assert (rows["prefix_hit"] < rows["input"]).all()
    assert (steps["recalled_tokens"] <= steps["hit_tokens"]).all()
    assert (steps["recalled_bytes"] <= steps["tier_bytes"]).all()
    assert cache["npu_hit_tokens"] + cache["storage_hit_tokens"] == cache["hit_tokens"]
    assert cache["storage_hit_tokens"] == rows["storage_hit"].sum()
    assert cache["hit_tokens"] == steps["hit_tokens"].sum()
    assert cache["lookup_tokens"] == steps["lookup_tokens"].sum()
    assert cache["storage_hit_tokens"] == steps["recalled_tokens"].sum()
    assert result.summary["recomputed_tokens"] == steps["recomputed_tokens"].sum()
    assert cache["storage_written_bytes"] == sum(pool.written for pool in CheckedPool.made)
    CheckedPool.made.clear()


def ttft_ms(result: Result) -> float:
    return float(result.summary["mean_ttft_ms"])


def test_only_a_run_with_a_tier_has_storage_hits() -> None:
    cluster = toy_cluster([small()], cxl_mem=CXL)
    none, cpu, cxl = (run(cluster, **tier) for tier in ({}, CPU_TIER, CXL_TIER))
    assert none.requests["storage_hit"].sum() == none.steps["tier_bytes"].sum() == 0
    assert none.summary["prefix_cache"]["storage"] is None
    for result, name in ((cpu, "CPU"), (cxl, "CXL")):
        cache = result.summary["prefix_cache"]
        assert result.requests["storage_hit"].sum() > 0
        assert result.requests["prefix_hit"].sum() > none.requests["prefix_hit"].sum()
        assert cache["storage"] == name
        assert cache["storage_read_bytes"] % (CHUNK * KV_BYTES_PER_TOKEN) == 0


def test_a_fast_tier_beats_computing_and_a_slow_one_does_not() -> None:
    cluster, apart = toy_cluster([llama()]), sessions(gap_ms=4000)
    computed = run(cluster, apart)
    fast = run(cluster, apart, **CPU_TIER)
    slow = run(with_cpu(cluster, mem_bw=0.1), apart, **CPU_TIER)
    assert ttft_ms(fast) < ttft_ms(computed) < ttft_ms(slow)
    assert (fast.requests["storage_hit"] == slow.requests["storage_hit"]).all()


def test_a_cxl_pool_is_read_from_all_its_devices_at_once() -> None:
    ids = np.arange(400), np.arange(2000, 3575), np.arange(400)
    requests = [Request(i, len(said), 2, i * 1000 * MS, said) for i, said in enumerate(ids)]

    def ttft_ns(devices: int) -> int:
        pool = {**CXL, "mem_bw": 0.001, "num_devices": devices}
        result = run(toy_cluster([small()], cxl_mem=pool), Workload(requests, "again"), **CXL_TIER)
        assert result.requests["storage_hit"].tolist() == [0, 0, CHUNK]
        return int(result.requests["TTFT"][2])

    assert CHUNK * KV_BYTES_PER_TOKEN / 0.001 == 40.96 * MS
    assert ttft_ns(1) - ttft_ns(4) == 0.75 * 40.96 * MS


def test_fp8_halves_tier_bytes_and_doubles_its_tokens() -> None:
    apart = sessions(gap_ms=4000)
    wide, narrow = (
        run(workload=apart, kv_cache_dtype=dtype, **CPU_TIER).summary["prefix_cache"]
        for dtype in ("auto", "fp8")
    )
    assert wide["storage_hit_tokens"] == narrow["storage_hit_tokens"] > 0
    assert wide["storage_read_bytes"] == 2 * narrow["storage_read_bytes"]
    assert wide["storage_written_bytes"] == 2 * narrow["storage_written_bytes"]
    (one,), (two,) = wide["storage_pools"], narrow["storage_pools"]
    assert (one["bytes"], 2 * one["tokens"] // CHUNK) == (two["bytes"], two["tokens"] // CHUNK)


def test_sharing_lets_an_instance_recall_what_another_computed() -> None:
    cluster = toy_cluster([small(), small()])
    private = run(cluster, request_routing_policy="RR", **CPU_TIER)
    shared = run(cluster, request_routing_policy="RR", enable_prefix_sharing=True, **CPU_TIER)
    pools = [result.summary["prefix_cache"]["storage_pools"] for result in (private, shared)]
    assert [[pool["bytes"] for pool in each] for each in pools] == [[1 << 29, 1 << 29], [1 << 30]]
    assert shared.requests["storage_hit"].sum() > private.requests["storage_hit"].sum()
    written = [result.summary["prefix_cache"]["storage_written_bytes"] for result in (private, shared)]
    assert written[1] < written[0]


def test_instances_of_other_kv_share_the_room_alone() -> None:
    twice = [Request(i, 400, 2, i * 100 * MS, np.arange(400), model=DENSE) for i in range(3)]
    kinds = toy_cluster([small(), small(kv_cache_dtype="fp8")])
    hits = run(
        kinds, Workload(twice, "alike"), enable_prefix_sharing=True, request_routing_policy="RR", **CPU_TIER
    )
    assert hits.requests["prefix_hit"].tolist() == [0, 0, 384]
    assert len(hits.summary["prefix_cache"]["storage_pools"]) == 1


def test_nodes_have_pools_of_their_own() -> None:
    flags: dict[str, Any] = {**CPU_TIER, "enable_prefix_sharing": True, "request_routing_policy": "RR"}
    alike = [Request(i, 400, 2, i * 100 * MS, np.arange(400)) for i in range(2)]
    near = run(toy_cluster([small(), small()]), Workload(alike, "alike"), **flags)
    far = run(toy_cluster([small()], [small()]), Workload(alike, "alike"), **flags)
    assert near.requests["storage_hit"].tolist() == [0, CHUNK]
    assert far.requests["storage_hit"].tolist() == [0, 0]
    assert len(far.summary["prefix_cache"]["storage_pools"]) == 2


def test_cxl_memory_is_split_over_the_nodes() -> None:
    result = run(toy_cluster([small()], [small(), small()], cxl_mem=CXL), **CXL_TIER)
    sizes = [pool["bytes"] for pool in result.summary["prefix_cache"]["storage_pools"]]
    assert sizes == [1 << 30, 1 << 29, 1 << 29]


EVICTS = {"default": {"kv_evict_loc": "cxl:0"}}
"""Beside an instance whose tier is striped over both devices."""


def test_a_device_of_two_pools_is_split_between_them() -> None:
    cluster = toy_cluster([small(placement=EVICTS), small()], cxl_mem=CXL)
    result = run(cluster, enable_prefix_sharing=True, **CXL_TIER)
    sizes = [pool["bytes"] for pool in result.summary["prefix_cache"]["storage_pools"]]
    assert sizes == [GIB // 2, GIB // 2 + GIB]
    private = run(cluster, **CXL_TIER).summary["prefix_cache"]["storage_pools"]
    assert [pool["bytes"] for pool in private] == [GIB // 2, GIB]


def test_a_device_of_two_pools_moves_no_more_than_it_can() -> None:
    # Both instances recall a chunk at 2 s: one from device 0, one half from each. At 2/3 of a device's rate
    # for both, device 0 moves 2/3 + 1/3.
    said = np.arange(400), np.arange(2000, 3575), np.arange(400)
    requests = [Request(i, len(said[i // 2]), 2, i // 2 * 1000 * MS, said[i // 2]) for i in range(6)]

    def ttft_ns(mem_bw: float) -> NDArray[np.int64]:
        cluster = toy_cluster([small(placement=EVICTS), small()], cxl_mem={**CXL, "mem_bw": mem_bw})
        flags: dict[str, Any] = {"request_routing_policy": "RR", "enable_prefix_sharing": True}
        result = run(cluster, Workload(requests, "again"), **flags, **CXL_TIER)
        assert result.requests["storage_hit"].tolist() == [0, 0, 0, 0, CHUNK, CHUNK]
        return result.requests["TTFT"][4:].astype(np.int64)

    read_ns = CHUNK * KV_BYTES_PER_TOKEN / 0.001
    assert ttft_ns(0.001) - ttft_ns(1e6) == pytest.approx(1.5 * read_ns, abs=2)


def test_a_tier_leaves_bandwidth_to_who_reads_weights_there() -> None:
    weights = {"default": {"weights": "cpu"}}
    both = toy_cluster([small(placement=weights), small()])
    alone = toy_cluster([small(placement=weights)])
    tiers = [run(cluster, **CPU_TIER).instances[-1].tier for cluster in (alone, both)]
    # alone: first the recall, then the step. Both have tiers, so recalls may have it all
    assert [tier.bandwidth_gbs for tier in tiers if tier] == [100, 100]
    only = toy_cluster([small(placement=weights, enable_prefix_caching=False), small(placement=CPU_EVICTS)])
    tier = run(only).instances[1].tier
    assert tier is not None
    assert tier.bandwidth_gbs == 50


@pytest.mark.parametrize("sharing", [False, True])
def test_the_prefill_side_recalls_and_streams_on(sharing: bool) -> None:
    cluster = toy_cluster([llama(pd_type="prefill"), llama(pd_type="decode")], link_bw=50)
    none = run(cluster, sessions(gap_ms=4000))
    tier = run(cluster, sessions(gap_ms=4000), enable_prefix_sharing=sharing, **CPU_TIER)
    assert tier.requests["storage_hit"].sum() > none.requests["storage_hit"].sum() == 0
    assert set(tier.steps["instance"][tier.steps["recalled_bytes"] > 0].tolist()) == {0}
    assert ttft_ms(tier) < ttft_ms(none)


@pytest.mark.parametrize(
    "keys",
    [
        [{"tp_size": 2}],
        [{"pp_size": 2}],
        [{"async_scheduling": False}],
        [{"model": MOE, "dp_group": "a", "ep_size": 2}, {"model": MOE, "dp_group": "a", "ep_size": 2}],
    ],
    ids=["tp", "pp", "synchronous", "dp"],
)
def test_tiers_serve_every_kind_of_parallelism(keys: list[dict[str, Any]]) -> None:
    result = run(toy_cluster([small(**each) for each in keys]), **CPU_TIER)
    assert result.requests["storage_hit"].sum() > 0


def test_a_small_tier_keeps_what_was_used_last() -> None:
    hits = []
    for chunks in (1, 6, 12, 1000):
        cluster = with_cpu(toy_cluster([small()]), mem_size=chunks * CHUNK * KV_BYTES_PER_TOKEN / 2**30)
        result = run(cluster, **CPU_TIER)
        assert result.summary["prefix_cache"]["storage_pools"][0]["tokens"] == chunks * CHUNK
        hits.append(int(result.requests["storage_hit"].sum()))
    assert hits == sorted(hits)
    assert hits[0] < hits[-1]


@pytest.mark.parametrize("flags", [CPU_TIER, {**CPU_TIER, "enable_prefix_sharing": True}, CXL_TIER], ids=str)
@pytest.mark.parametrize(
    "limits", [{}, {"async_scheduling": False}, {"enable_chunked_prefill": False}], ids=str
)
def test_stepped_or_jumped_and_run_again_everything_is_the_same(
    flags: dict[str, Any], limits: dict[str, Any], tmp_path: Path
) -> None:
    cluster = toy_cluster([small(), small()], cxl_mem=CXL)
    files = []
    for number, stepped in enumerate((False, False, True)):
        workload = sessions(gap_ms=5)
        for request in workload:
            request.output_tokens = len(request.output_ids)  # type: ignore[arg-type]
        result = run(cluster, workload, stepped=stepped, **flags, **limits)
        names = [tmp_path / f"{number}.{kind}" for kind in ("requests.csv", "steps.csv", "json")]
        result.save(names[0])
        result.save_steps(names[1])
        result.save_summary(names[2])
        files.append([name.read_bytes() for name in names])
    assert files[0] == files[1] == files[2]


def test_long_answers_are_written_through_in_jumps_as_in_steps() -> None:
    said, answer = np.arange(100), np.full(900, 7)
    requests = [
        Request(0, 100, 900, 0, said, answer),
        Request(1, 500, 2, 100 * MS, np.full(500, 8)),
        Request(2, 1010, 2, 2000 * MS, np.concatenate((said, answer, said[:10]))),
    ]
    jumped, stepped = (
        run(workload=Workload(requests, "long"), stepped=each, **CPU_TIER) for each in (False, True)
    )
    for result in (jumped, stepped):
        assert result.requests["prefix_hit"][2] >= 768
    assert jumped.steps.tolist() == stepped.steps.tolist()


# ------------------------------------------------------------------ what cannot be


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prefix-storage", "CXL"], "has no cxl_mem"),
        (["--enable-prefix-sharing"], "there is no lower tier to share"),
        (["--prefix-storage", "CPU", "--no-enable-prefix-caching"], "leave one of them out"),
    ],
)
def test_what_excludes_each_other_is_told_before_writing(
    flags: list[str], words: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(toys)
    outputs = ["--output", "out/r.csv", "--summary", "out/s.json", "--steps", "out/steps.csv"]
    assert main(["run", "--num-reqs", "3", *flags, *outputs]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.count("error:") == 1
    assert shown.out == ""
    assert files_below(toys) == before


def test_the_same_from_python_is_an_input_error() -> None:
    with pytest.raises(InputError, match="has no cxl_mem"):
        simulate(toy_cluster([small()]), sessions(1), **CXL_TIER)


def test_no_step_waits_for_chunks_that_requests_wait_for() -> None:
    made = []
    for how in ("step", "async"):
        CheckedPool.made.clear()
        made.append(run(**CPU_TIER, kv_load=how))
    in_step, beside = made
    for result in made:
        assert result.summary["prefix_cache"]["storage_hit_tokens"] > 0
    assert len(in_step.instances[0].gates.step) > 0
    assert len(beside.instances[0].gates.step) == 0
    waited = [record for record in beside.records if record.load_ended_ns >= 0]
    assert waited
    for record in waited:
        assert record.arrival_ns <= record.load_began_ns < record.load_ended_ns <= record.scheduled_ns
        assert record.storage_hit > 0
    assert beside.steps["recalled_bytes"].sum() > 0
    assert "kv_load" not in in_step.summary["options"]
    assert beside.summary["options"]["kv_load"] == "async"
    assert beside.summary["instances"][0]["options"]["kv_load"] == "async"
