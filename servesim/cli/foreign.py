"""Flags of other tools that people type here out of habit, and what to do instead."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

_NEAR = 0.8
"""Share of like letters from which on a flag is taken for a slip of another."""
_CLUSTER = "is set in the cluster config: docs/cluster-config.md"
_GROUPS = "KV groups of windows and states; servesim kv tells what fits both ways"

SAME = {
    "--num-prompts": "--num-reqs",
    "--dataset-path": "--dataset",
    "--workload": "--dataset",
    "--trace": "--dataset",
    "--config": "--cluster-config",
    "--device": "--hardware",
    "--gpu": "--hardware",
    "--model-path": "--model",
    "--tp-size": "--tp",
    "--pp-size": "--pp",
    "--dp-size": "--dp",
    "--page-size": "--block-size",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--max-running-requests": "--max-num-seqs",
    "--max-batch-size": "--max-num-seqs",
    "--context-length": "--max-model-len",
    "--disable-cuda-graph": "--no-cudagraph",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--qps": "--request-rate",
}
"""Another tool's name -> ours of the same meaning."""
ELSEWHERE = {
    "--enable-expert-parallel": f"ep_size of an instance {_CLUSTER}",
    "-ep": f"ep_size of an instance {_CLUSTER}",
    "--ep-size": f"ep_size of an instance {_CLUSTER}",
    "--ep": f"ep_size of an instance {_CLUSTER}",
    "--num-gpus": f"the number of NPUs {_CLUSTER}; --tp, --pp and --dp change it",
    "--kv-transfer-config": f"prefill and decode instances: pd_type {_CLUSTER}",
    "--cpu-offload-gb": f"where weights are: placement {_CLUSTER}",
    "--swap-space": "vLLM V1 has no swap; preempted requests are computed again, here too",
    "--quantization": "the model's quantization_config says it; --dtype fp8 sets 8-bit weights",
    "-q": "the model's quantization_config says it; --dtype fp8 sets 8-bit weights",
    "--mem-fraction-static": "not the same share as --npu-memory-utilization, which also holds activations",
    "--dataset-name": "the format of a workload is found by content; give its file with --dataset",
    "--burstiness": "servesim workload synth makes bursty arrivals",
    "--input-len": "servesim workload synth makes workloads of given lengths",
    "--output-len": "servesim workload synth makes workloads of given lengths",
    "--random-input-len": "servesim workload synth makes workloads of given lengths",
    "--random-output-len": "servesim workload synth makes workloads of given lengths",
}
"""Another tool's name -> where the same is said here."""
NOT_SIMULATED = {
    "--speculative-config": "speculative decoding",
    "--enable-lora": "LoRA adapters",
    "--max-num-partial-prefills": "more than the engine's one way to share a step among prompts",
    "--max-long-partial-prefills": "more than the engine's one way to share a step among prompts",
    "--scheduling-policy": "any order but first come, first served",
    "--limit-mm-per-prompt": "images and other inputs beside text",
    "--disable-hybrid-kv-cache-manager": _GROUPS,
    "--no-disable-hybrid-kv-cache-manager": _GROUPS,
    "--kv-cache-dtype-skip-layers": "layers whose cache has a format of its own",
    "--decode-context-parallel-size": "context parallelism",
    "-dcp": "context parallelism",
    "--enable-dbo": "dual-batch overlap",
    "--enable-eplb": "moving experts between ranks",
    "--attention-backend": "a choice of attention kernels: a bundle holds those that were measured",
    "--compilation-config": "a choice of compilation: a bundle holds the kernels that were measured",
}
"""Another tool's name -> what the simulation does not have."""
WITHOUT_MEANING = (
    *("--trust-remote-code", "--served-model-name", "--tokenizer", "--load-format", "--download-dir"),
    *("--host", "--port", "--api-key", "--disable-log-requests", "--revision", "--hf-token"),
)
"""Flags of servers that no time depends on."""


def advice(word: str, known: Collection[str]) -> str:
    """What to say about a flag that does not exist; empty: nothing that would help."""
    flags = {flag.removeprefix("--no-").removeprefix("--") for flag in known}
    same = SAME.get(word)
    if same is not None and (same in known or same.removeprefix("--no-") in flags):
        return f"it is called {same!r} here"
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    if word in NOT_SIMULATED:
        return f"not simulated: {NOT_SIMULATED[word]}"
    if word in WITHOUT_MEANING:
        return "nothing in a simulation depends on it; leave it out"
    near = get_close_matches(word, list(known), n=1, cutoff=_NEAR)
    return f"did you mean {near[0]!r}?" if near else ""
