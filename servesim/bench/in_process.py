"""vLLM's engine inside this process: no HTTP between, and the engine's own stamps."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from servesim.bench.target import Answer, EngineStamps, TargetFacts, prompt_ids
from servesim.bench.token_stream import RequestFailedError
from servesim.errors import InputError

if TYPE_CHECKING:
    from servesim.workload.request import Request

_RESOLVED = {
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "async_scheduling"),
    "cache_config": ("block_size", "gpu_memory_utilization", "num_gpu_blocks", "enable_prefix_caching"),
    "parallel_config": ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel"),
    "model_config": ("max_model_len", "seed"),
}
"""Part of vLLM's configuration -> arguments read from it once its defaults are filled in."""


class InProcessVllm:
    """An ``AsyncLLM`` engine with exact output lengths."""

    side = "engine"

    def __init__(self, model: str, engine_kwargs: dict[str, Any], seed: int) -> None:
        """
        Args:
            model: name or folder, as vLLM takes it.
            engine_kwargs: further engine arguments under vLLM's names.
            seed: of made-up prompts.
        """
        self._kwargs = {"model": model, "disable_log_stats": False, **engine_kwargs}
        self._seed = seed
        self._engine: Any = None
        self._params: Any = None

    async def open(self) -> TargetFacts:
        """See :class:`servesim.bench.target.Target`."""
        try:
            import vllm
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise InputError(
                f"--engine vllm: vLLM cannot be imported here ({error}); install it on a machine with a GPU, "
                "or leave --engine out and record a running server with --url"
            ) from None

        def params(length: int) -> Any:
            return SamplingParams(
                max_tokens=length,
                min_tokens=length,
                ignore_eos=True,
                temperature=0.0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )

        self._params = params
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._kwargs))
        except Exception as error:  # whatever vLLM raises on bad arguments or a missing GPU
            raise InputError(
                f"--engine vllm: vLLM {vllm.__version__} does not start: {type(error).__name__}: {error}"
            ) from error
        asked = {key: value for key, value in self._kwargs.items() if key != "disable_log_stats"}
        return TargetFacts(
            str(self._kwargs["model"]), vllm.__version__, {**asked, **resolved_arguments(self._engine)}
        )

    async def answer(self, request: Request) -> Answer:
        """See :class:`servesim.bench.target.Target`."""
        prompt = {"prompt_token_ids": prompt_ids(request, self._seed)}
        token_s: list[float] = []
        metrics = None
        sent_s = perf_counter()
        try:
            async for output in self._engine.generate(
                prompt, self._params(request.output_tokens), f"bench-{request.index}"
            ):
                token_s += [perf_counter()] * len(output.outputs[0].token_ids)
                metrics = output.metrics
        except Exception as error:  # a request vLLM refuses, or an engine that died
            raise RequestFailedError(None, f"{type(error).__name__}: {error}") from error
        if metrics is None or not token_s:
            raise RequestFailedError(None, "vLLM gave no tokens, or no stamps with them (disable_log_stats?)")
        stamps = EngineStamps(
            metrics.arrival_time,
            metrics.queued_ts,
            metrics.scheduled_ts,
            metrics.first_token_ts,
            metrics.last_token_ts,
        )
        return Answer(sent_s, token_s, len(token_s), request.input_tokens, stamps)

    async def close(self) -> None:
        """See :class:`servesim.bench.target.Target`."""
        if self._engine is not None:
            self._engine.shutdown()


def resolved_arguments(engine: Any) -> dict[str, Any]:
    """Arguments as the engine runs with them; those its configuration does not show are left out."""
    config = getattr(engine, "vllm_config", None)
    found: dict[str, Any] = {}
    for part, names in _RESOLVED.items():
        for name in names:
            value = getattr(getattr(config, part, None), name, None)
            if isinstance(value, bool | int | float | str):
                found[name] = value
    cache_dtype = getattr(getattr(config, "cache_config", None), "cache_dtype", None)
    if isinstance(cache_dtype, str):
        found["kv_cache_dtype"] = cache_dtype
    dtype = getattr(getattr(config, "model_config", None), "dtype", None)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found
