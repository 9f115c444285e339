"""What servesim adds to a vLLM worker: time the layers of one step.

Every layer's calls are marked for PyTorch's profiler, and the GPU kernels under the marks are added up.

vLLM mixes this class into its worker (``worker_extension_cls``); names start with ``servesim_`` since it
refuses any that the worker has already. Runs in the worker's process, where PyTorch and vLLM are.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class LayerTimes:
    """Methods that the driver calls through ``collective_rpc``; arguments and results are plain data."""

    model_runner: Any

    def servesim_prepare(self, architecture: dict[str, Any], top_k: int) -> dict[str, Any]:
        """Find and hook the layers of ``architecture`` (a file's content); returns what was found.

        ``top_k``: experts a token picks; 0 for a dense model.
        """
        import torch
        from vllm import SamplingParams
        from vllm.v1.core.sched import output

        from servesim.profiler.vllm_source.modules import layers_of
        from servesim.profiler.vllm_source.steps import StepMaker
        from servesim.specs.architecture import Architecture

        runner = self.model_runner
        parsed = Architecture.model_validate(architecture)
        layers = layers_of(parsed, [("model", runner.get_model()), ("sampler", runner.sampler)])
        ranges = LayerRanges(torch.profiler.record_function)
        ranges.attach(layers)
        config = runner.kv_cache_config
        sampling = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
        self._servesim_steps = StepMaker(output, sampling, config.num_blocks, len(config.kv_cache_groups))
        self._servesim_router = _Router(top_k)
        for _, block in (pair for layer in parsed.catalog.moe for pair in layers[layer]):
            self._servesim_router.attach(block)
        return {
            "num_blocks": config.num_blocks,
            "modules": {layer: [path for path, _ in modules] for layer, modules in layers.items()},
            "gpu": torch.cuda.get_device_name(),
            "torch_version": str(torch.__version__),
            "cuda_version": str(torch.version.cuda),
        }

    def servesim_time(self, shot: dict[str, Any]) -> dict[str, float]:
        """Layer -> µs of all its kernels in one step; the median over ``iterations`` steps.

        ``shot``: chunk, history, decodes as (count, KV length), iterations, activated (experts; None: as
        routed).
        """
        from servesim.profiler.vllm_source.steps import requests_of

        requests = requests_of(shot["chunk"], shot["history"], [(n, kv) for n, kv in shot["decodes"]])
        self._servesim_router.choose(shot.get("activated"))
        steered = self._servesim_router.steered
        self._servesim_step(requests)  # warm up
        if shot.get("activated") is not None and self._servesim_router.steered == steered:
            raise RuntimeError(
                "the expert block did not call its gate: the experts of a step cannot be chosen"
            )
        times = [self._servesim_profiled(requests) for _ in range(shot["iterations"])]
        self._servesim_router.choose(None)
        return {layer: statistics.median(time.get(layer, 0.0) for time in times) for layer in times[0]}

    def _servesim_profiled(self, requests: list[Any]) -> dict[str, float]:
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self._servesim_step(requests)
            torch.cuda.synchronize()
        return kernel_us(profiler.events())

    def _servesim_step(self, requests: list[Any]) -> None:
        """One step through the worker's own entry; newer versions sample in a second call."""
        worker: Any = self
        if worker.execute_model(self._servesim_steps.output(requests)) is None:
            worker.sample_tokens(None)


class _Router:
    """Overrides the logits of an expert block's gate so that a step touches exactly ``activated`` experts."""

    def __init__(self, top_k: int) -> None:
        self.activated: int | None = None
        self._top_k = top_k
        self.steered = 0
        """Calls overridden so far; a shot that should steer and does not is worth nothing."""

    def choose(self, activated: int | None) -> None:
        """Touch this many experts in the steps to come; None: as the gate routes."""
        self.activated = activated

    def attach(self, block: Any) -> None:
        """Hook the block's gate (its child ``gate`` or ``router``).

        Raises:
            NotSupportedError: the block has neither.
        """
        from servesim.errors import NotSupportedError

        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if gate is None or not hasattr(gate, "register_forward_hook"):
            raise NotSupportedError(
                f"--source vllm: {type(block).__name__} has no gate that could be steered"
            )
        gate.register_forward_hook(self._steer)

    def _steer(self, module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        if self.activated is None:
            return output
        logits = output[0] if isinstance(output, tuple) else output
        steered = steered_logits(logits, self.activated, self._top_k)
        self.steered += 1
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


def steered_logits(logits: Any, activated: int, top_k: int) -> Any:
    """Logits (tokens, experts) by which ``top_k`` experts a token fall on the first ``activated``, evenly.

    Token t prefers experts t k, t k + 1, ... (modulo ``activated``), so that slots are dealt out in turn.
    """
    import torch

    tokens, experts = logits.shape
    expert = torch.arange(experts, device=logits.device)[None, :]
    first = torch.arange(tokens, device=logits.device)[:, None] * top_k
    rank = (expert - first) % activated
    wanted = torch.where(expert < activated, -rank, -rank - 2 * experts)
    return wanted.to(logits.dtype)


PREFIX = "servesim:"


class LayerRanges:
    """Forward hooks that open and close a profiler range around every call of a layer's modules."""

    def __init__(self, open_range: Callable[[str], Any]) -> None:
        """``open_range``: makes a context manager of a name (``torch.profiler.record_function``)."""
        self._open_range = open_range
        self._handles: list[Any] = []
        self._open: list[tuple[Any, Any]] = []

    def attach(self, layers: dict[str, list[tuple[str, Any]]]) -> None:
        """Hook every module of every layer; a module may serve one layer only."""
        for layer, modules in layers.items():
            for _, module in modules:
                self._handles += [
                    module.register_forward_pre_hook(self._opener(layer), with_kwargs=True),
                    module.register_forward_hook(self._close, with_kwargs=True, always_call=True),
                ]

    def detach(self) -> None:
        """Take all hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _opener(self, layer: str) -> Callable[..., None]:
        def opened(module: Any, *_: Any) -> None:
            mark = self._open_range(PREFIX + layer)
            mark.__enter__()
            self._open.append((module, mark))

        return opened

    def _close(self, module: Any, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def kernel_us(events: Iterable[Any]) -> dict[str, float]:
    """Layer -> µs of all kernels launched under its ranges, from the profiler's events.

    A range inside another layer's range counts for the outer one alone.
    """
    total: dict[str, float] = {}
    for event in events:
        if event.name.startswith(PREFIX) and not _inside_another(event) and _is_host(event):
            layer = event.name.removeprefix(PREFIX)
            total[layer] = total.get(layer, 0.0) + _under(event)
    return total


def _is_host(event: Any) -> bool:
    """The profiler repeats a range on the device's timeline; that copy launches nothing."""
    return getattr(getattr(event, "device_type", None), "name", "CPU") == "CPU"


def _inside_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(PREFIX):
            return True
        parent = parent.cpu_parent
    return False


def _under(event: Any) -> float:
    own = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
    return float(own + sum(_under(child) for child in event.cpu_children))
