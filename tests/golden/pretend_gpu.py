# ruff: noqa: ARG002, ARG005
"""Let vLLM 0.33 believe in one H100, so that its model classes can be built on the meta device without a GPU.

What is replaced: NVML's answers, the compiled operators (never called), process groups, and Python packages
that only hold GPU kernels. What is asked afterwards, shapes of parameters and cache specs and the planner, is
vLLM's own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")

_KERNEL_PACKAGES = ["cutlass", "quack", "cuda", "nvtx", "tilelang"]
_COMPILED = (
    "_C", "_moe_C", "_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "_flashmla_C",
    "_flashmla_extension_C", "_deepselect_C", "_flashkda_C", "vllm_flash_attn._vllm_fa2_C",
    "vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of kernel packages as mocks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in _KERNEL_PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing to run."""


def mock_package(name: str) -> None:
    """Let a package be importable from now on."""
    if name not in _KERNEL_PACKAGES:
        _KERNEL_PACKAGES.append(name)


class _Operator:
    """A compiled operator that must not be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{self._name} is not here")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Ranks:
    """A process group of which rank 0 is built."""

    def __init__(self, size: int) -> None:
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, 0, 0, 0
        self.ranks = list(range(size))
        self.is_first_rank = self.is_last_rank = True
        self.first_rank, self.last_rank, self.next_rank, self.prev_rank = 0, size - 1, 0, 0
        self.device_communicator = self.mq_broadcaster = None
        self.cpu_group = self.device_group = types.SimpleNamespace(size=lambda: size, rank=lambda: 0)
        self.unique_name = "pretended"


def set_ranks(tp: int) -> None:
    """Tensor-parallel groups of ``tp``; every other group has one rank."""
    import vllm.distributed.parallel_state as state

    for name in ("_WORLD", "_TP", "_PP", "_DP", "_EP", "_PCP", "_DCP", "_EPLB", "_INNER_DP_WORLD"):
        if hasattr(state, name):
            setattr(state, name, Ranks(tp if name in ("_WORLD", "_TP", "_EP") else 1))


def install(
    capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3", memory: int = 80 << 30
) -> None:
    """Once, before vLLM's platform is looked up."""
    import torch
    import vllm.third_party.pynvml as nvml

    for module in _COMPILED:
        sys.modules[f"vllm.{module}"] = types.ModuleType(f"vllm.{module}")
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    answers = {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": capability, "nvmlDeviceGetName": name,
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=memory, free=memory, used=0),
        "nvmlSystemGetDriverVersion": "580.0", "nvmlSystemGetCudaDriverVersion_v2": 13000,
    }  # fmt: skip
    for call, answer in answers.items():
        setattr(nvml, call, lambda *args, _answer=answer: _answer)
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=memory, multi_processor_count=132,
        warp_size=32, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20, is_integrated=False,
    )  # fmt: skip
    for call, answer in {
        "get_device_properties": properties, "get_device_capability": capability, "current_device": 0,
        "device_count": 1, "get_device_name": name, "is_available": True, "current_stream": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, call, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.Stream = torch.cuda.Event = MagicMock()  # type: ignore[misc, assignment]
    torch.version.cuda = "13.0"
    _pretend_triton(capability)
    _pretend_operators()


def _pretend_triton(capability: tuple[int, int]) -> None:
    import triton.runtime
    from triton.backends.compiler import GPUTarget

    driver = MagicMock()
    driver.get_current_target.return_value = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    triton.runtime.driver.set_active(driver)


_ready = False


def _pretend_operators() -> None:
    """Missing operators exist from the moment models are built; questions whether a kernel can do something
    are answered with yes."""
    import torch._ops

    known = torch._ops._OpNamespace.__getattr__

    def get(self: Any, name: str) -> Any:
        try:
            return known(self, name)
        except AttributeError:
            if "support" in name:
                return lambda *args, **kwargs: True
            if _ready:
                return _Operator(name)
            raise

    torch._ops._OpNamespace.__getattr__ = get  # type: ignore[method-assign]


def before_models() -> None:
    """After vLLM is imported, before the first model is built."""
    global _ready
    import vllm.model_executor.layers.sparse_attn_indexer as indexer
    import vllm.model_executor.models.registry as registry
    import vllm.utils.deep_gemm as deep_gemm

    registry._run_in_subprocess = lambda call: call()
    for module in (deep_gemm, indexer):
        for name in dir(module):
            if "deep_gemm" in name and name.startswith(("has_", "is_")):
                setattr(module, name, lambda *args, **kwargs: True)
    _ready = True
    sys.meta_path.append(_Mocks())


def on_meta() -> Any:
    """A mode in which what asks for a CUDA device is put on the meta device."""
    import torch
    from torch.overrides import TorchFunctionMode

    def is_cuda(device: object) -> bool:
        return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False

    class Redirect(TorchFunctionMode):
        def __torch_function__(self, call: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if is_cuda(kwargs.get("device")) or isinstance(kwargs.get("device"), int):
                kwargs["device"] = "meta"
            return call(*("meta" if is_cuda(arg) else arg for arg in args), **kwargs)

    return Redirect()
