"""A deployment's own ``vllm serve`` line: every argument is accounted for.

The lines follow public recipes of how such models are served; only their settings are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servesim import simulate
from servesim.__main__ import main
from servesim.api import read_cluster
from servesim.errors import InputError, MissingFileError
from servesim.specs.cluster_changes import with_options
from servesim.specs.hardware import load_hardware
from servesim.specs.options import RuntimeOptions
from servesim.specs.presets import serve_defaults
from servesim.specs.serve_arguments import (
    ELSEWHERE,
    HARMLESS,
    KERNEL_SWITCHES,
    KERNELS,
    KNOWN,
    LISTS,
    NOT_SIMULATED,
    OWN,
    OWN_SWITCHES,
    REFUSED_SWITCHES,
    WITHOUT_INFLUENCE,
    WITHOUT_INFLUENCE_LISTS,
    WITHOUT_INFLUENCE_SWITCHES,
    canonical,
)
from servesim.specs.serve_line import read_serve_line
from servesim.specs.vllm_versions import VllmVersion

LLAMA = "meta-llama/Llama-3.1-8B"

RECIPES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "vllm serve meta-llama/Llama-3.1-8B-Instruct": (
        {"model": "meta-llama/Llama-3.1-8B-Instruct"}, 1, 0, 0,
    ),
    "vllm serve meta-llama/Llama-3.3-70B-Instruct --tensor-parallel-size 4 --max-model-len 32768 "
    "--gpu-memory-utilization 0.95 --disable-log-requests --port 8000": (
        {
            "model": "meta-llama/Llama-3.3-70B-Instruct", "tp": 4, "max_model_len": "32768",
            "npu_memory_utilization": 0.95,
        }, 4, 2, 0,
    ),
    "vllm serve Qwen/Qwen3-32B -tp 2 --enable-auto-tool-choice --tool-call-parser hermes "
    "--reasoning-parser qwen3 --max-num-seqs=256 --kv-cache-dtype fp8": (
        {"model": "Qwen/Qwen3-32B", "tp": 2, "max_num_seqs": 256, "kv_cache_dtype": "fp8"}, 4, 3, 0,
    ),
    "vllm serve Qwen/Qwen3-235B-A22B --tensor-parallel-size 8 --enable-expert-parallel "
    "--max-num-batched-tokens 16k --trust-remote-code --no-enable-prefix-caching": (
        {
            "model": "Qwen/Qwen3-235B-A22B", "tp": 8, "enable_expert_parallel": True,
            "max_num_batched_tokens": 16000, "enable_prefix_caching": False,
        }, 5, 1, 0,
    ),
    "VLLM_USE_FLASHINFER_MOE_FP8=1 vllm serve deepseek-ai/DeepSeek-V3 -tp 8 -ep --quantization fp8 "
    "--dtype bfloat16 --block-size 64 --attention-backend FLASHMLA --moe-backend deep_gemm": (
        {
            "model": "deepseek-ai/DeepSeek-V3", "tp": 8, "enable_expert_parallel": True, "dtype": "fp8",
            "block_size": 64,
        }, 6, 1, 2,
    ),
    "vllm serve openai/gpt-oss-120b --tensor-parallel-size 2 --async-scheduling "
    "--max-cudagraph-capture-size 2048 --stream-interval 1 --tool-call-parser openai "
    "--enable-auto-tool-choice --no-enable-prefix-caching": (
        {
            "model": "openai/gpt-oss-120b", "tp": 2, "async_scheduling": True,
            "enable_prefix_caching": False,
        }, 4, 3, 1,
    ),
    "vllm serve mistralai/Mixtral-8x7B-Instruct-v0.1 --tokenizer_mode mistral --config_format mistral "
    "--load_format mistral --tensor_parallel_size 2": (
        {"model": "mistralai/Mixtral-8x7B-Instruct-v0.1", "tp": 2}, 2, 3, 0,
    ),
    "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --limit-mm-per-prompt.image 2 --limit-mm-per-prompt.video 0 "
    "--mm-encoder-tp-mode data --data-parallel-size 2 --max-model-len 65536": (
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "dp": 2, "max_model_len": "65536"}, 3, 3, 0,
    ),
    "vllm serve nvidia/Llama-3.1-8B-Instruct-FP8 --enforce-eager --swap-space 4 --seed 1 --host 0.0.0.0 "
    "--served-model-name llama fast-llama --api-key one two": (
        {"model": "nvidia/Llama-3.1-8B-Instruct-FP8", "cudagraph": False}, 2, 5, 0,
    ),
    "vllm serve zai-org/GLM-4.5-Air --pipeline-parallel-size 2 -tp 4 --disable-chunked-prefill "
    "-O3 --compilation-config '{\"pass_config\": {\"fuse_allreduce_rms\": true}}' --scheduling-policy fcfs": (
        {
            "model": "zai-org/GLM-4.5-Air", "pp": 2, "tp": 4, "enable_chunked_prefill": False,
            "scheduling_policy": "fcfs",
        },
        5, 0, 2,
    ),
    "python3 -m vllm.entrypoints.openai.api_server --model google/gemma-3-27b-it --dtype half "
    "--max-num-seqs 64 --max-num-batched-tokens 8192 --max-model-len auto --disable-log-stats": (
        {
            "model": "google/gemma-3-27b-it", "dtype": "float16", "max_num_seqs": 64,
            "max_num_batched_tokens": 8192, "max_model_len": "auto",
        }, 5, 1, 0,
    ),
    "vllm serve moonshotai/Kimi-K2-Instruct --trust-remote-code -tp 16 --distributed-executor-backend ray "
    "--long-prefill-token-threshold 2048 --num-gpu-blocks-override 9000 --all2all-backend "
    "allgather_reducescatter --no-async-scheduling --scheduler-reserve-full-isl": (
        {
            "model": "moonshotai/Kimi-K2-Instruct", "tp": 16, "long_prefill_token_threshold": 2048,
            "num_gpu_blocks": 9000, "async_scheduling": False, "reserve_full_isl": True,
        }, 6, 3, 0,
    ),
    "vllm serve \\\n  ibm-granite/granite-3.1-8b-instruct \\\n  --dtype auto \\\n  "
    "--disable-uvicorn-access-log --cudagraph-capture-sizes 1 2 4 8 --max-logprobs 5": (
        {"model": "ibm-granite/granite-3.1-8b-instruct"}, 2, 2, 1,
    ),
}  # fmt: skip
"""Line -> (options, number of arguments used, without influence, of kernels)."""


@pytest.mark.parametrize("text", RECIPES)
def test_every_argument_of_a_recipe_is_accounted_for(text: str) -> None:
    options, used, idle, kernels = RECIPES[text]
    line = read_serve_line(text)
    assert line.options == options
    assert (len(line.used), len(line.without_influence), len(line.kernels)) == (used, idle, kernels)
    chosen = RuntimeOptions(vllm_serve=text)
    assert chosen.preset == "vllm-serve"
    assert {name: str(getattr(chosen, name)) for name in options} == {k: str(v) for k, v in options.items()}


def test_there_are_a_dozen_recipes() -> None:
    assert len(RECIPES) >= 12


def test_the_tables_know_every_argument_of_vllm_once() -> None:
    names = (Path(__file__).parent / "vllm_serve_arguments.txt").read_text(encoding="utf-8").split()
    assert len(names) > 300
    assert [name for name in names if canonical(name)[0] not in KNOWN] == []
    groups = [
        *(set(OWN), set(OWN_SWITCHES), set(ELSEWHERE), set(NOT_SIMULATED), KERNELS, KERNEL_SWITCHES),
        *(WITHOUT_INFLUENCE, WITHOUT_INFLUENCE_LISTS, WITHOUT_INFLUENCE_SWITCHES),
    ]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set(HARMLESS) | REFUSED_SWITCHES <= set(ELSEWHERE) | set(NOT_SIMULATED)
    assert LISTS <= KNOWN
    assert set(OWN.values()) | {option for option, _ in OWN_SWITCHES.values()} <= set(
        RuntimeOptions.model_fields
    )


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("--spec-method ngram", "not simulated: speculative decoding that is not given as"),
        ("--enable-dbo", "--enable-dbo: not simulated: dual-batch overlap"),
        ("--kv-transfer-config '{}'", "pd_type"),
        ("--max-num-seq 64", "--max-num-seq: unknown; did you mean --max-num-seqs"),
        ("--frobnicate", "--frobnicate: unknown; leave out"),
        ("--tensor-parallel-size", "its value is missing"),
        ("--tensor-parallel-size four", "must be a whole number"),
        ("--enable-prefix-caching=true", "it takes no value"),
        ("--quantization awq", "awq is not allowed"),
        ("--gpu-memory-utilization high", "must be a number"),
        ("--nnodes 2", "several nodes"),
        ("--prefill-context-parallel-size 2", "prefill context parallelism"),
        ("--dcp-q-replicate", "queries that every rank of decode context parallelism"),
        ("--cp-kv-cache-interleave-size 16", "KV that ranks share in runs"),
    ],
)
def test_what_cannot_be_simulated_is_refused(rest: str, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_serve_line(f"vllm serve {LLAMA} {rest}")
    assert told in str(refusal.value)


def test_context_parallelism_is_read() -> None:
    line = read_serve_line(
        f"vllm serve {LLAMA} -tp 16 -dcp 2 --dcp-comm-backend a2a -pcp 1 --no-dcp-q-replicate"
    )
    found = {name: line.options[name] for name in ("decode_context_parallel_size", "dcp_comm_backend")}
    assert found == {"decode_context_parallel_size": 2, "dcp_comm_backend": "a2a"}
    assert line.without_influence == ["-pcp 1", "--no-dcp-q-replicate"]


def test_adapters_are_read_and_their_names_are_not() -> None:
    line = read_serve_line(f"vllm serve {LLAMA} --enable-lora --max-loras 4 --lora-modules a=/a b=/b")
    assert (line.options["enable_lora"], line.options["max_loras"]) == (True, 4)
    assert line.without_influence == ["--lora-modules a=/a b=/b"]


def test_all_refusals_stand_in_one_message() -> None:
    with pytest.raises(InputError, match=r"--enable-dbo.*--frobnicate.*--stream-interval"):
        RuntimeOptions(vllm_serve=f"vllm serve {LLAMA} --enable-dbo --frobnicate 3 --stream-interval 4")


@pytest.mark.parametrize("wrong", ["sglang serve x", "", "docker run vllm", "vllm bench x", "vllm serve 'x"])
def test_other_commands_are_refused(wrong: str) -> None:
    with pytest.raises(InputError):
        read_serve_line(wrong)


def test_a_yaml_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"model: {LLAMA}\ntensor-parallel-size: 2\nenable-prefix-caching: false\ntrust_remote_code: true\n"
        'max-model-len: 16k\nserved-model-name: [a, b]\ncompilation-config: {"mode": 3}\n'
        "enforce-eager: true\n",
        encoding="utf-8",
    )
    line = read_serve_line(str(path))
    assert line.options == {
        "model": LLAMA,
        "tp": 2,
        "enable_prefix_caching": False,
        "max_model_len": "16k",
        "cudagraph": False,
    }
    assert (len(line.used), len(line.without_influence), len(line.kernels)) == (5, 2, 1)
    over = read_serve_line(f"vllm serve --config {path} -tp 1")
    assert over.options["tp"] == 1
    with pytest.raises(MissingFileError):
        read_serve_line("nowhere.yaml")


def test_flags_beside_the_line_win_and_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--vllm-serve", f"vllm serve {LLAMA} --max-num-seqs 64 --port 80 --attention-backend FLASHINFER"]
    summary = tmp_path / "summary.json"
    assert main([*words, "--max-num-seqs", "32", "--num-reqs", "5", "--summary", str(summary)]) == 0
    printed = capsys.readouterr().out
    assert "max-num-seqs 32" in printed
    assert "max-num-batched-tokens 8192" in printed
    assert "preset vllm-serve" in printed
    told = json.loads(summary.read_text(encoding="utf-8"))
    assert told["options"]["max_num_batched_tokens"] == 8192
    assert (
        told["options"]["npu_memory_utilization"] == told["instances"][0]["options"]["npu_memory_utilization"]
    )
    assert told["notes"] == [
        f"vllm serve: used: --model {LLAMA}, --max-num-seqs 64",
        "vllm serve: without influence: --port 80",
        "vllm serve: not followed, as kernel times and captured graphs are the bundle's: "
        "--attention-backend FLASHINFER",
        "vllm serve: other values were given beside it: --max-num-seqs",
    ]


# ---------------------------------------------------------------- the preset


@pytest.mark.parametrize(
    ("hardware", "version", "seqs", "tokens"),
    [
        ("H100", "0.24", 1024, 8192),
        ("H100", "0.33", 1024, 8192),
        ("H200", "0.33", 1024, 8192),
        ("RTXPRO6000", "0.33", 1024, 8192),
        ("A100", "0.33", 256, 2048),
        ("L40S", "0.33", 256, 2048),
        ("B200", "0.27", 1024, 8192),
        ("B200", "0.28", 1024, 16384),
        ("MI300X", "0.33", 1024, 16384),
    ],
)
def test_the_preset_follows_hardware_and_version(
    hardware: str, version: VllmVersion, seqs: int, tokens: int
) -> None:
    spec = load_hardware(hardware)
    assert serve_defaults(spec, spec.memory_gib or 0, version, 131072, {}) == {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": tokens,
        "npu_memory_utilization": 0.92,
    }


@pytest.mark.parametrize(
    ("stated", "longest", "expected"),
    [
        ({"max_num_batched_tokens": 512}, 131072, {"max_num_seqs": 512}),
        ({"enable_chunked_prefill": False}, 40000, {"max_num_seqs": 1024, "max_num_batched_tokens": 40000}),
        ({"max_num_seqs": 2}, 1000, {"max_num_batched_tokens": 2000}),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 64}, 1000, {}),
    ],
)
def test_one_limit_bounds_the_default_of_the_other(
    stated: dict[str, Any], longest: int, expected: dict[str, int]
) -> None:
    found = serve_defaults(load_hardware("H100"), 79.2, "0.33", longest, stated)
    assert found == {**expected, "npu_memory_utilization": 0.92}


def test_the_preset_says_nothing_of_tpus() -> None:
    with pytest.raises(InputError, match="defaults of TPUs are not known"):
        serve_defaults(load_hardware("TPUv6e"), 31.25, "0.33", 8192, {})


def test_explicit_options_win_over_the_preset() -> None:
    (entry,) = simulate(num_reqs=2, preset="vllm-serve", npu_memory_utilization=0.5).summary["instances"]
    options = entry["options"]
    assert options["npu_memory_utilization"] == 0.5
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == (1024, 8192)


def test_experts_are_spread_over_the_copies() -> None:
    options = RuntimeOptions(model="Qwen/Qwen3-30B-A3B", tp=2, dp=2, enable_expert_parallel=True)
    cluster = read_cluster(options)
    assert [(spec.tp_size, spec.ep_size) for _, spec in cluster.instances] == [(2, 4), (2, 4)]
    assert with_options(cluster, options).instances == cluster.instances
    with pytest.raises(InputError, match="add --enable-expert-parallel if they do"):
        read_cluster(options.replace(enable_expert_parallel=False))


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(InputError, match="has no experts"):
        simulate(num_reqs=2, hardware="H100", model=LLAMA, tp=2, enable_expert_parallel=True)
