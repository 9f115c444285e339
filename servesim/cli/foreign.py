"""Flags of other tools that people type here out of habit, and what to do instead.

Those of vLLM are in :mod:`servesim.specs.serve_arguments`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from servesim.specs import serve_arguments

if TYPE_CHECKING:
    from collections.abc import Collection

_NEAR = 0.8
"""Share of like letters from which on a flag is taken for a slip of another."""
_CLUSTER = "is set in the cluster config: docs/cluster-config.md"

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
    "--ep-size": f"ep_size of an instance {_CLUSTER}",
    "--ep": f"ep_size of an instance {_CLUSTER}",
    "--num-gpus": f"the number of NPUs {_CLUSTER}; --tp, --pp and --dp change it",
    "--mem-fraction-static": "not the same share as --npu-memory-utilization, which also holds activations",
    "--dataset-name": "the format of a workload is found by content; give its file with --dataset",
    "--burstiness": "servesim workload synth makes bursty arrivals",
    "--input-len": "servesim workload synth makes workloads of given lengths",
    "--output-len": "servesim workload synth makes workloads of given lengths",
    "--random-input-len": "servesim workload synth makes workloads of given lengths",
    "--random-output-len": "servesim workload synth makes workloads of given lengths",
}
"""Another tool's name -> where the same is said here."""


def advice(word: str, known: Collection[str]) -> str:
    """What to say about a flag that does not exist; empty: nothing that would help."""
    flags = {flag.removeprefix("--no-").removeprefix("--") for flag in known}
    same = SAME.get(word)
    if same is not None and (same in known or same.removeprefix("--no-") in flags):
        return f"it is called {same!r} here"
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    if told := _of_vllm(word):
        return told
    near = get_close_matches(word, list(known), n=1, cutoff=_NEAR)
    return f"did you mean {near[0]!r}?" if near else ""


def _of_vllm(word: str) -> str:
    """What to say about an argument of ``vllm serve``; empty: it is none, or one that means the same here."""
    name, opposite = serve_arguments.canonical(word)
    if name in ("--quantization", "-q"):
        return "the model's quantization_config says it; --dtype fp8 sets 8-bit weights"
    if opposite or name not in serve_arguments.KNOWN or name in serve_arguments.OWN:
        return ""
    if name in serve_arguments.ELSEWHERE:
        return serve_arguments.ELSEWHERE[name]
    if name in serve_arguments.NOT_SIMULATED:
        return f"not simulated: {serve_arguments.NOT_SIMULATED[name]}"
    if name in serve_arguments.KERNELS | serve_arguments.KERNEL_SWITCHES:
        return "not simulated: a choice of kernels or graphs; a bundle holds those that were measured"
    if name in serve_arguments.OWN_SWITCHES:
        return ""
    return "nothing in a simulation depends on it; leave it out"
