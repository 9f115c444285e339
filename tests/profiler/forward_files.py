"""Writes files as ``vllm bench forward`` writes them, by its own code, with times that are made up.

    python -m tests.profiler.forward_files FILE

Needs vLLM 0.33 importable (no GPU). vLLM's ``main`` parses the cases, draws the contexts and writes the file;
its ``ForwardBench`` sums up the samples. Only the model and the GPU are replaced: a step takes what
:func:`made_up_us` says.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = (
    *("d1=1*1@1025", "d8=8*1@1025", "d32=32*1@1025", "d128=128*1@1025", "d256=256*1@1025"),
    *("d8-long=8*1@16385", "d32-long=32*1@8193", "d128-long=128*1@2049"),
    *("p512=512", "p2048=2048", "p8192=8192", "chunk=2048@16384c", "mix=1024,32*1@4097"),
)
"""What the docs have users measure (docs/measured-steps.md)."""


def made_up_us(requests: Any) -> float:
    """µs of a step of an 8B model: 6000 for its weights or 27 for each of a prompt's tokens, 0.05 for each
    token in a decode's cache, 0.0009 for each pair of a prompt's tokens, and 300."""
    decodes = sum(request.prefix_len for request in requests if request.is_decode)
    prompts = [request for request in requests if not request.is_decode]
    pairs = sum(request.query_len * (request.prefix_len + request.query_len / 2) for request in prompts)
    computed = sum(request.query_len for request in requests)
    return float(300 + max(6000.0, 27.0 * computed) + 0.05 * decodes + 0.0009 * pairs)


def run_case(_runner: Any, case: Any, args: Any) -> dict[str, Any]:
    """As vLLM's, with a clock in the place of a GPU."""
    from vllm.benchmarks.forward.capture import ForwardBench

    us = made_up_us(case.requests)
    shaking = iter([1.0, 1.001, 0.999, 1.002] * 1000)
    clock = SimpleNamespace(synchronize=lambda: None)
    clock.elapsed_time = lambda _: us * next(shaking) / 1000
    bench = SimpleNamespace(
        _events=(clock, clock),
        _warmup=lambda _: None,
        iters=args.iters,
        samples=args.samples,
        device="cpu",
    )
    graph = SimpleNamespace(replay=lambda: None)
    same = {"max_abs": 0.0, "relative_rms": 0.0}
    return {
        "num_tokens": case.num_tokens,
        "kv_blocks": 1 + sum(-(-request.kv_len // 16) for request in case.requests),
        "routing": "real",
        "timing_scope": "target_only",
        "num_local_tokens": case.num_tokens,
        "num_tokens_after_padding": case.num_tokens,
        "batch_order": [f"bench-{index}" for index in range(len(case.requests))],
        "eager_repeat": same,
        "graph_vs_eager": same,
        "graph_deterministic": True,
        "finite": True,
        "state_reset_bytes": 4096,
        "latency_us": ForwardBench._time(bench, graph),
    }


@contextmanager
def without_a_gpu() -> Iterator[Any]:
    """vLLM's ``vllm.benchmarks.forward.main`` with the model, the GPU and the process group replaced."""
    import torch
    import vllm
    import vllm.config
    from vllm.benchmarks.forward import capture, main
    from vllm.distributed import parallel_state

    world = SimpleNamespace(world_size=1, rank=0, cpu_group=None, device_group=None)
    model_config = SimpleNamespace(max_model_len=131_072)
    runner = SimpleNamespace(model_config=model_config, vllm_config=None, dp_rank=0)
    llm = SimpleNamespace()
    llm.llm_engine = SimpleNamespace(model_executor=SimpleNamespace())
    llm.llm_engine.model_executor.driver_worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))

    def gather(found: list[Any], own: Any, **_: Any) -> None:
        found[0] = own

    places = (
        (vllm, "LLM", SimpleNamespace(from_engine_args=lambda _: llm)),
        (main, "_make_engine_args", lambda *_: None),
        (main, "run_case", run_case),
        (vllm.config, "set_current_vllm_config", lambda _: nullcontext()),
        (parallel_state, "get_world_group", lambda: world),
        (capture, "get_world_group", lambda: world),
        (torch.distributed, "all_gather_object", gather),
    )
    with ExitStack() as stack:
        for owner, name, value in places:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield main


def main(path: str, cases: tuple[str, ...] = CASES) -> None:
    """Write the file."""
    with without_a_gpu() as forward:
        forward.main(
            argparse.Namespace(
                case=list(cases),
                shapes=None,
                kv_len_jitter=0.0,
                output_json=path,
                iters=2,
                samples=2,
                seed=0,
                profile_dir=None,
                exclude_drafter=False,
                routing="auto",
                load_format="dummy",
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
