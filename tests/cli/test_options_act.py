"""Every option changes something where it can act, and is refused or noted where it cannot.

The table has one entry for each option of :class:`RuntimeOptions`; a new option without one fails.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.specs.flags import flag_name
from servesim.specs.options import RuntimeOptions
from tests.engine.toy_world import DENSE, HARDWARE, MOE, WINDOWS, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

MS = 1_000_000
PIM_MEMORY = {"mem_size": 2, "mem_bw": 100, "mem_latency": 0, "pim_config": "Toy"}
REFUSED, NOTED = "refused", "noted"


def roomy(model: str = DENSE, **keys: Any) -> dict[str, Any]:
    """An instance whose KV blocks follow from its memory."""
    return {key: value for key, value in toy_instance(model, **keys).items() if key != "num_gpu_blocks"}


def with_pim() -> dict[str, Any]:
    made = toy_cluster([toy_instance()])
    made["nodes"][0]["cpu_mem"] = PIM_MEMORY
    return made


CLUSTERS: dict[str, dict[str, Any]] = {
    "one": toy_cluster([roomy()]),
    "tight": toy_cluster([toy_instance(num_gpu_blocks=41)]),
    "fixed": toy_cluster([toy_instance()]),
    "two": toy_cluster([roomy(), roomy()]),
    "two_tight": toy_cluster([toy_instance(num_gpu_blocks=81), toy_instance(num_gpu_blocks=81)]),
    "stages": toy_cluster([roomy(pp_size=2)]),
    "first_runner": toy_cluster([roomy(MOE, pp_size=2)]),
    "windows": toy_cluster([roomy(WINDOWS)]),
    "shared": toy_cluster([roomy(tp_size=4)]),
    "experts": toy_cluster([roomy(MOE, tp_size=2, ep_size=2)]),
    "one_rank": toy_cluster([roomy(MOE)]),
    "slow": toy_cluster(
        [toy_instance(npu_mem={"mem_size": 1, "mem_bw": 0.001, "mem_latency": 0, "reserve": 0})]
    ),
    "pim": with_pim(),
    "sides": toy_cluster(
        [roomy(pd_type="prefill"), roomy(pd_type="prefill"), roomy(pd_type="decode"), roomy(pd_type="decode")]
    ),
}


def plain() -> list[dict[str, Any]]:
    """Twelve prompts at once."""
    return [{"input_toks": 300 + i, "output_toks": 10 + i, "arrival_time_ns": 0} for i in range(12)]


def ranked() -> list[dict[str, Any]]:
    """Twelve prompts at once, the later ones of more weight."""
    return [{**entry, "priority": -index} for index, entry in enumerate(plain())]


def adapted() -> list[dict[str, Any]]:
    """Twelve prompts at once for four LoRA adapters."""
    return [{**entry, "lora": f"adapter-{index % 4}"} for index, entry in enumerate(plain())]


def chats() -> list[dict[str, Any]]:
    """Five sessions of three turns that repeat what was said before."""
    rng = np.random.default_rng(5)
    sessions = []
    for session in range(5):
        said = rng.integers(0, 60, 120).tolist()
        turns = []
        for _ in range(3):
            turns.append(
                {"input_toks": len(said), "output_toks": 12, "tool_duration_ns": MS, "input_tok_ids": said}
            )
            said = said + rng.integers(0, 60, 60).tolist()
        sessions.append(
            {"session_id": f"s{session}", "arrival_time_ns": session * 3 * MS, "sub_requests": turns}
        )
    return sessions


@dataclass(frozen=True)
class Case:
    """Flags that set an option, and the run that they are given to."""

    words: str
    cluster: str = "one"
    workload: str = "plain"
    beside: str = ""
    bare: bool = False
    """Without the files that every other run writes."""
    told: str = ""
    """Refused or noted: what happens to an option that cannot act."""


@dataclass(frozen=True)
class Option:
    acts: Case | None
    cannot: list[Case] = field(default_factory=list)


DRAFTS = '{"method":"ngram","num_speculative_tokens":2}'
OPTIONS: dict[str, Option] = {
    "vllm_version": Option(
        Case("--vllm-version 0.28", beside="--long-prefill-token-threshold 64 --num-reqs 1")
    ),
    "cluster_config": Option(Case("--cluster-config two.json")),
    "dataset": Option(Case("--dataset chats.jsonl")),
    "hardware": Option(Case("--hardware Other")),
    "model": Option(Case(f"--model {MOE}")),
    "tp": Option(Case("--tp 2")),
    "pp": Option(Case("--pp 2")),
    "dp": Option(Case("--dp 2"), [Case("--dp 2", "one_rank", told=REFUSED)]),
    "enable_expert_parallel": Option(
        Case("--enable-expert-parallel --expert-routing-policy RAND", "one_rank", beside="--tp 2"),
        [
            Case("--enable-expert-parallel", "one_rank", told=NOTED),
            Case("--enable-expert-parallel", beside="--tp 2", told=REFUSED),
        ],
    ),
    "speculative_config": Option(
        Case(f"--speculative-config {DRAFTS}"),
        [
            Case(f"--speculative-config {DRAFTS}", "stages", told=REFUSED),
            Case(f"--speculative-config {DRAFTS}", "sides", told=REFUSED),
            Case(f"--speculative-config {DRAFTS}", "windows", told=REFUSED),
            Case(f"--speculative-config {DRAFTS}", beside="--skip-prefill", told=REFUSED),
        ],
    ),
    "speculative_acceptance": Option(
        Case("--speculative-acceptance decay=0.9", beside=f"--speculative-config {DRAFTS}"),
        [Case("--speculative-acceptance decay=0.9", told=REFUSED)],
    ),
    "preset": Option(Case("--preset vllm-serve")),
    "num_reqs": Option(Case("--num-reqs 5")),
    "tokenizer": Option(None, [Case("--tokenizer tokenizer.json", told=REFUSED)]),
    "estimate_tokens": Option(
        Case("--estimate-tokens 2", workload="texts", beside="--num-reqs 3"),
        [Case("--estimate-tokens 2", told=REFUSED)],
    ),
    "columns": Option(
        Case("--columns input=output_toks,output=input_toks,arrival=arrival_time_ns:ns"),
        [Case("--columns input=input_toks,output=nowhere", told=REFUSED)],
    ),
    "lenient": Option(Case("--lenient", workload="bad")),
    "dtype": Option(Case("--dtype fp8"), [Case("--dtype fp8", "own_dtype", told=REFUSED)]),
    "kv_cache_dtype": Option(Case("--kv-cache-dtype fp8")),
    "kv_cache_dtype_skip_layers": Option(
        Case("--kv-cache-dtype-skip-layers 0", beside="--kv-cache-dtype fp8"),
        [
            Case("--kv-cache-dtype-skip-layers 0", told=REFUSED),
            Case("--kv-cache-dtype-skip-layers sliding_window", beside="--kv-cache-dtype fp8", told=REFUSED),
        ],
    ),
    "decode_context_parallel_size": Option(
        Case("--decode-context-parallel-size 2", "shared"),
        [
            Case("--decode-context-parallel-size 2", told=REFUSED),
            Case("--decode-context-parallel-size 4", "shared", told=REFUSED),
            Case("--decode-context-parallel-size 2", "windows", told=REFUSED),
        ],
    ),
    "dcp_comm_backend": Option(
        Case("--dcp-comm-backend a2a", "shared", beside="--decode-context-parallel-size 2"),
        [Case("--dcp-comm-backend a2a", "shared", told=REFUSED)],
    ),
    "block_size": Option(Case("--block-size 32", "tight")),
    "max_num_seqs": Option(Case("--max-num-seqs 2")),
    "max_num_batched_tokens": Option(Case("--max-num-batched-tokens 512")),
    "long_prefill_token_threshold": Option(
        Case("--long-prefill-token-threshold 64"),
        [
            Case("--long-prefill-token-threshold 2048", told=NOTED),
            Case("--long-prefill-token-threshold 64", beside="--skip-prefill", told=NOTED),
        ],
    ),
    "enable_chunked_prefill": Option(
        Case("--no-enable-chunked-prefill"),
        [Case("--no-enable-chunked-prefill", beside="--skip-prefill", told=NOTED)],
    ),
    "npu_memory_utilization": Option(
        Case("--npu-memory-utilization 0.5"), [Case("--npu-memory-utilization 0.5", "fixed", told=NOTED)]
    ),
    "num_gpu_blocks": Option(
        Case("--num-gpu-blocks 60"), [Case("--num-gpu-blocks 60", "fixed", told=REFUSED)]
    ),
    "reserve_full_isl": Option(
        Case("--no-reserve-full-isl", "tight", beside="--long-prefill-token-threshold 64")
    ),
    "enable_prefix_caching": Option(
        Case("--no-enable-prefix-caching", workload="chats"), [Case("--no-enable-prefix-caching", told=NOTED)]
    ),
    "disable_hybrid_kv_cache_manager": Option(
        Case("--disable-hybrid-kv-cache-manager", "windows"),
        [Case("--disable-hybrid-kv-cache-manager", told=REFUSED)],
    ),
    "async_scheduling": Option(
        Case("--no-async-scheduling"),
        [Case("--no-async-scheduling", "first_runner", beside="--vllm-version 0.30", told=NOTED)],
    ),
    "scheduling_policy": Option(
        Case("--scheduling-policy priority", workload="ranked", beside="--max-num-seqs 2"),
        [Case("--scheduling-policy priority", told=NOTED)],
    ),
    "max_num_active_seqs": Option(
        Case("--max-num-active-seqs 2"),
        [
            Case("--max-num-active-seqs 128", told=NOTED),
            Case("--max-num-active-seqs 2", beside="--vllm-version 0.30", told=REFUSED),
            Case("--max-num-active-seqs 200", told=REFUSED),
        ],
    ),
    "max_num_scheduled_tokens": Option(
        Case("--max-num-scheduled-tokens 300"),
        [
            Case("--max-num-scheduled-tokens 2048", told=NOTED),
            Case("--max-num-scheduled-tokens 2049", told=REFUSED),
        ],
    ),
    "long_prefill_token_threshold_adaptive": Option(
        Case("--long-prefill-token-threshold-adaptive", beside="--long-prefill-token-threshold 8"),
        [
            Case("--long-prefill-token-threshold-adaptive", told=NOTED),
            Case(
                "--long-prefill-token-threshold-adaptive",
                beside="--long-prefill-token-threshold 8 --vllm-version 0.28",
                told=REFUSED,
            ),
        ],
    ),
    "prefill_schedule_interval": Option(
        Case("--prefill-schedule-interval 3", beside="--long-prefill-token-threshold 16", workload="chats"),
        [Case("--prefill-schedule-interval 3", beside="--vllm-version 0.32", told=REFUSED)],
    ),
    "watermark": Option(Case("--watermark 0.5", "tight")),
    "kv_load": Option(
        Case("--kv-load async", "sides"),
        [
            Case("--kv-load async", told=REFUSED),
            Case("--kv-load async", "sides", beside="--skip-prefill", told=REFUSED),
        ],
    ),
    "enable_lora": Option(
        Case("--enable-lora", workload="adapted"),
        [Case("--enable-lora", told=NOTED), Case("--enable-lora", "two", told=NOTED)],
    ),
    "max_loras": Option(
        Case("--max-loras 3", workload="adapted", beside="--enable-lora"),
        [
            Case("--max-loras 3", told=NOTED),
            Case("--max-loras 2", workload="adapted", told=REFUSED),
            Case("--max-loras 0", beside="--enable-lora", told=REFUSED),
        ],
    ),
    "max_num_queued_reqs": Option(
        Case("--max-num-queued-reqs 5"),
        [
            Case("--max-num-queued-reqs 5", "sides", told=REFUSED),
            Case("--max-num-queued-reqs 5", beside="--vllm-version 0.28", told=REFUSED),
        ],
    ),
    "max_num_queued_tokens": Option(
        Case("--max-num-queued-tokens 900"), [Case("--max-num-queued-tokens 900", "sides", told=REFUSED)]
    ),
    "enable_local_offloading": Option(
        Case("--enable-local-offloading", "slow"), [Case("--enable-local-offloading", told=NOTED)]
    ),
    "enable_attn_offloading": Option(
        Case("--enable-attn-offloading", "pim"), [Case("--enable-attn-offloading", told=REFUSED)]
    ),
    "enable_sub_batch_interleaving": Option(
        Case("--enable-sub-batch-interleaving", "pim", beside="--enable-attn-offloading"),
        [Case("--enable-sub-batch-interleaving", told=REFUSED)],
    ),
    "enable_block_copy": Option(
        Case("--no-enable-block-copy", "experts", beside="--expert-routing-policy ZIPF"),
        [
            Case("--no-enable-block-copy", told=REFUSED),
            Case("--enable-block-copy", told=NOTED),
            Case("--no-enable-block-copy", "one_rank", told=REFUSED),
            Case("--no-enable-block-copy", "experts", told=REFUSED),
        ],
    ),
    "cudagraph": Option(Case("--enforce-eager")),
    "enable_prefix_sharing": Option(
        Case(
            "--enable-prefix-sharing",
            "two_tight",
            "chats",
            beside="--prefix-storage CPU --request-routing-policy RR",
        ),
        [
            Case("--enable-prefix-sharing", "two", "chats", told=REFUSED),
            Case("--enable-prefix-sharing", "one", "chats", beside="--prefix-storage CPU", told=NOTED),
        ],
    ),
    "prefix_storage": Option(
        Case("--prefix-storage CPU", "tight", "chats"), [Case("--prefix-storage CPU", told=NOTED)]
    ),
    "request_routing_policy": Option(
        Case("--request-routing-policy RAND", "two"),
        [
            Case("--request-routing-policy RR", told=REFUSED),
            Case("--request-routing-policy LOAD", told=NOTED),
            Case("--request-routing-policy nosuch:f", told=REFUSED),
        ],
    ),
    "router_refresh": Option(
        Case("--router-refresh 10", "two", "chats"),
        [
            Case("--router-refresh 0.1", told=REFUSED),
            Case("--router-refresh 0.1", "two", beside="--request-routing-policy RR", told=REFUSED),
        ],
    ),
    "sticky_sessions": Option(
        Case("--sticky-sessions", "two", "chats", beside="--request-routing-policy RR"),
        [
            Case("--sticky-sessions", "one", "chats", told=REFUSED),
            Case("--sticky-sessions", "two", "plain", told=REFUSED),
            Case("--sticky-sessions", "sides", "chats", told=NOTED),
        ],
    ),
    "expert_routing_policy": Option(
        Case("--expert-routing-policy ZIPF", "experts"),
        [
            Case("--expert-routing-policy nosuch:f", told=REFUSED),
            Case("--expert-routing-policy ZIPF", "one_rank", told=REFUSED),
            Case("--expert-routing-policy BALANCED", told=NOTED),
        ],
    ),
    "skip_prefill": Option(Case("--skip-prefill")),
    "max_concurrency": Option(Case("--max-concurrency 2"), [Case("--max-concurrency 12", told=NOTED)]),
    "request_rate": Option(Case("--request-rate 5")),
    "seed": Option(
        Case("--seed 7", "two", beside="--request-routing-policy RAND"),
        [
            Case("--seed 7", told=NOTED),
            Case("--seed 7", "experts", beside="--expert-routing-policy RR", told=NOTED),
            Case("--seed 7", beside="--request-rate inf", told=NOTED),
        ],
    ),
    "ensemble": Option(Case("--ensemble 2")),
    "step_noise": Option(
        Case("--step-noise 0.1", beside="--ensemble 2"), [Case("--step-noise 0.1", told=REFUSED)]
    ),
    "run_noise": Option(
        Case("--run-noise 0.1", beside="--ensemble 2"), [Case("--run-noise 0.1", told=REFUSED)]
    ),
    "arrival_jitter": Option(
        Case("--arrival-jitter 0.1", beside="--ensemble 2"), [Case("--arrival-jitter 0.1", told=REFUSED)]
    ),
    "output": Option(Case("--output out/other.csv")),
    "summary": Option(Case("--summary out/other.json")),
    "steps": Option(Case("--steps out/steps.csv")),
    "save_result": Option(Case("--save-result out/result.json")),
    "report": Option(Case("--report out/report.html")),
    "plots": Option(Case("--plots out/plots")),
    "aiperf": Option(Case("--aiperf out/table.csv")),
    "timeline": Option(Case("--timeline out/timeline.json")),
    "itl": Option(Case("--no-itl"), [Case("--no-itl", bare=True, told=REFUSED)]),
    "log_interval": Option(Case("--log-interval 0.001")),
    "run_id": Option(
        Case("--run-id x"), [Case("--run-id x", beside="--output out/x.csv", bare=True, told=REFUSED)]
    ),
    "network_backend": Option(None, [Case("--network-backend analytical", told=NOTED)]),
    "inputs_root": Option(None, [Case("--inputs-root inputs", told=NOTED)]),
    "cleanup_inputs": Option(None, [Case("--no-cleanup-inputs", told=NOTED)]),
}
"""Option -> a run that it changes, and runs where it cannot act."""
NOT_COMPARED = {
    "auto_profile": "acts where a bundle is missing",
    "stepped": "every step on its own gives the same figures, slower",
    "log_level": "what is printed of a run on a terminal, and tracebacks",
    "max_model_len": "has tests of its own",
    "vllm_serve": "is made of other options, and has tests of its own",
}


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        clusters = {**CLUSTERS, "own_dtype": toy_cluster([roomy(dtype="bfloat16")])}
        for name, described in clusters.items():
            (root / f"{name}.json").write_text(json.dumps(described), encoding="utf-8")
        for name, entries in (
            ("plain", plain()),
            ("adapted", adapted()),
            ("chats", chats()),
            ("ranked", ranked()),
            ("bad", [*plain(), {"input_toks": -1}]),
            ("texts", [{"prompt": "as long as that " * 20, "output_tokens": 5}] * 3),
        ):
            text = "\n".join(map(json.dumps, entries)) + "\n"
            (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
        _pim(root)
        shutil.copytree(root / "profiler/perf" / HARDWARE, root / "profiler/perf/Other")
        hardware = root / "configs/hardware/Other.yaml"
        hardware.parent.mkdir(parents=True, exist_ok=True)
        hardware.write_text("memory_gib: 2\nmemory_bandwidth_gbs: 500\n", encoding="utf-8")
        yield root


def _pim(root: Path) -> None:
    folder = root / "configs" / "pim"
    folder.mkdir(parents=True)
    (folder / "Toy.ini").write_text(
        "[dram]\ncapacity_gb = 1\ndata_rate_mts = 1000\nbus_width_bits = 64\nburst_length = 8\n"
        "row_to_column_ns = 10\ncas_latency_ns = 12\n[attention]\nslope = 25600\nintercept = 128000\n",
        encoding="utf-8",
    )


def outcome(case: Case, words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a run printed and wrote, without what only repeats its options."""
    shutil.rmtree("out", ignore_errors=True)
    given = f"{case.beside} {words}".split()
    defaults = {
        "--cluster-config": f"{case.cluster}.json",
        "--dataset": f"{case.workload}.jsonl",
        "--output": "" if case.bare else "out/requests.csv",
        "--summary": "" if case.bare else "out/summary.json",
    }
    usual = [
        part for flag, value in defaults.items() if value and flag not in given for part in (flag, value)
    ]
    status = main([*usual, *given])
    printed = capsys.readouterr()
    files = sorted(Path("out").glob("*"))
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.suffix == ".json"]
    summary = next((each for each in summaries if "notes" in each), {})
    notes = summary.pop("notes", [])
    summary.pop("options", None)
    figures = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    for instance in summary.get("instances", []):
        instance.pop("options")
    return {
        "status": status,
        "error": printed.err,
        "notes": notes,
        "summary": summary,
        "figures": figures,
        "heartbeat": [line for line in printed.out.splitlines() if line.startswith("[INFO]")],
        "files": [path.name for path in files],
        "requests": [path.read_text(encoding="utf-8") for path in files if path.suffix == ".csv"],
    }


def test_every_option_has_an_entry() -> None:
    assert set(OPTIONS).isdisjoint(NOT_COMPARED)
    assert set(OPTIONS) | set(NOT_COMPARED) >= set(RuntimeOptions.model_fields)
    assert set(OPTIONS) <= set(RuntimeOptions.model_fields)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.acts])
def test_the_option_changes_the_outcome(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = OPTIONS[name].acts
    assert case is not None
    before, after = outcome(case, "", capsys), outcome(case, case.words, capsys)
    assert after["status"] == 0, after["error"]
    assert [note for note in after["notes"] if "no effect" in note and flag_name(name) in note] == []
    told = ("error", "notes")
    assert {k: v for k, v in after.items() if k not in told} != {
        k: v for k, v in before.items() if k not in told
    }


@pytest.mark.parametrize(
    "case",
    [case for option in OPTIONS.values() for case in option.cannot],
    ids=lambda value: (
        value.words.replace(" ", "=") + f"-{value.cluster}" if isinstance(value, Case) else value
    ),
)
def test_an_option_that_cannot_act_is_told(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    after = outcome(case, case.words, capsys)
    flag = case.words.split()[0]
    if case.told == REFUSED:
        assert after["status"] == 2, after["notes"]
        assert flag in after["error"]
        return
    assert after["status"] == 0, after["error"]
    assert [note for note in after["notes"] if note.startswith(flag)] != []
    if case.cluster != "sides":  # there it acts in part
        before = outcome(case, "", capsys)
        for key in ("figures", "requests", "heartbeat"):
            assert after[key] == before[key]


def test_a_seed_acts_where_front_end_times_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """They are drawn by the seed, from an instance's own constants or its hardware file."""
    drawn = toy_cluster([toy_instance(engine={"front_end_jitter_us": 5000})])
    Path("drawn.json").write_text(json.dumps(drawn), encoding="utf-8")
    case = Case("--seed 7", "drawn")
    before, after = outcome(case, "", capsys), outcome(case, case.words, capsys)
    assert before["figures"]["mean_ttft_ms"] != after["figures"]["mean_ttft_ms"]
    assert [note for note in after["notes"] if note.startswith("--seed")] == []
