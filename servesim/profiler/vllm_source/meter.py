"""The meter of the ``vllm`` source: a one-block engine with dummy weights, whose worker tells layer times."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError, RunError
from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.meter import Provenance
from servesim.profiler.vllm_source.modules import calls_of
from servesim.profiler.vllm_source.steps import BLOCK_SIZE
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch, ProfileJob

OLDEST = (0, 19)
_EXTENSION = "servesim.profiler.vllm_source.extension.LayerTimes"
_BLOCKS = 1
_OWN_NAMES = {"phimoe": "PhiMoEForCausalLM"}
"""Model classes that vLLM spells otherwise than transformers."""
_SHORT_KV = 16
"""KV length of the decodes that per-sequence layers are timed with."""


def require_vllm() -> str:
    """The version of vLLM, once everything this source needs is there.

    Raises:
        NotSupportedError: vLLM is missing or too old, or there is no GPU; the message names which.
    """
    way_out = "use --source torch, which needs PyTorch alone, or --source silicon, which needs no device"
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise NotSupportedError(
            "--source vllm: vLLM is not installed here; install vllm>=0.19 on a machine with a GPU, or "
            f"{way_out}"
        ) from None
    if version_tuple(version) < OLDEST:
        raise NotSupportedError(
            f"--source vllm: vLLM {version} is installed; 0.19 or later is needed, or {way_out}"
        )
    try:
        import torch
    except ImportError as error:
        raise NotSupportedError(
            f"--source vllm: vLLM {version} is installed, but PyTorch cannot be imported ({error})"
        ) from error
    if not torch.cuda.is_available():
        raise NotSupportedError(
            f"--source vllm: vLLM {version} is installed, but PyTorch {torch.__version__} finds no GPU; "
            f"{way_out}"
        )
    return version


def version_tuple(version: str) -> tuple[int, int]:
    """``0.24.0rc1`` -> ``(0, 24)``."""
    parts = version.split(".")
    return int(parts[0]), int(parts[1])


class VllmMeter:
    """One engine at a time: that of the rank last started."""

    computes = False

    def __init__(self, job: ProfileJob, *, iterations: int = 3) -> None:
        """
        Raises:
            NotSupportedError: vLLM or a GPU is missing.
        """
        self._version = require_vllm()
        import torch

        self._job, self._iterations = job, iterations
        self._gpu, self._torch_version = torch.cuda.get_device_name(), str(torch.__version__)
        self._cuda_version = str(torch.version.cuda)
        self._tp, self._engine, self._found = 0, None, dict[str, Any]()
        self._folder = Path(tempfile.mkdtemp(prefix="servesim-model-"))

    @property
    def conditions(self) -> dict[str, Any]:
        return {
            "source": "vllm",
            "gpu": self._gpu,
            "vllm_version": self._version,
            "torch_version": self._torch_version,
            "cuda_version": self._cuda_version,
            "measurement": {
                "iterations": self._iterations,
                "statistic": "median",
                "time": "sum of kernel times",
            },
        }

    def provenance(self, content: BundleContent) -> Provenance:
        del content
        from servesim.profiler.torch_source.device import nvidia_state

        arguments = engine_arguments(self._job, self._tp or self._job.tp_degrees[0], "")
        arguments.pop("model")
        notes = {
            "device_after": nvidia_state(),
            "engine_arguments": arguments,
            "modules": self._found.get("modules", {}),
            "emulation": "one GPU with the shapes of one rank, one block, dummy weights",
        }
        return Provenance("vllm", {}, {"measured": notes})

    def start_rank(self, tp: int) -> None:
        """
        Raises:
            RunError: the engine does not start; NotSupportedError: its model has other layers than described.
        """
        if tp == self._tp:
            return
        self._stop()
        # One process: an error in the worker arrives as itself. The older model runner has the interface used
        # here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        from vllm import LLM

        (self._folder / "config.json").write_text(json.dumps(hf_config(self._job)))
        try:
            self._engine = LLM(**engine_arguments(self._job, tp, str(self._folder)))
        except (RuntimeError, ValueError, TypeError) as error:
            raise RunError(f"--source vllm: the engine for tp {tp} does not start: {error}") from error
        described = self._job.architecture.model_dump(mode="json", by_alias=True)
        self._found = self._call("servesim_prepare", described, self._job.model.num_experts_per_tok)
        self._tp = tp

    def kv_capacity_tokens(self) -> int:
        """One block belongs to the engine, and every sequence may leave one not quite full."""
        spare = 1 + self._job.max_num_seqs + 1
        return int(self._found["num_blocks"] - spare) * BLOCK_SIZE

    def grid(self) -> SweepGrid:
        return SweepGrid.of(self._job)

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        steps = [self._time(chunk=count, history=0, decodes=[]) for count in tokens]
        return {layer: [self._per_call(layer, step) for step in steps] for layer in layers}

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        steps = [self._time(chunk=0, history=0, decodes=[(count, _SHORT_KV)]) for count in sequences]
        return {layer: [self._per_call(layer, step) for step in steps] for layer in layers}

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        layer = self._job.architecture.attention_layer
        return [
            self._per_call(layer, self._time(chunk=chunk, history=history, decodes=list(decodes)))
            for chunk, history, decodes in batches
        ]

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        layer = next(iter(self._job.architecture.catalog.moe))
        return [
            self._per_call(layer, self._time(chunk=tokens, history=0, decodes=[], activated=activated))
            for tokens, activated in points
        ]

    def all_reduce_us(self, payloads: Sequence[int]) -> list[float]:
        raise NotImplementedError("collectives are not measured so far; the grid asks for none")

    def other_attention(self) -> dict[str, list[Row]]:
        """None: the average block is measured."""
        return {}

    def exchange_rows(self) -> list[Row]:
        """None."""
        return []

    def skew_rows(self) -> list[Row]:
        """None: they are fitted to skew.csv."""
        return []

    def close(self) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _time(self, **shot: Any) -> dict[str, float]:
        times: dict[str, float] = self._call("servesim_time", {**shot, "iterations": self._iterations})
        return times

    def _per_call(self, layer: str, times: dict[str, float]) -> float:
        calls = calls_of(self._job.architecture, layer, _BLOCKS)
        if not times.get(layer):
            raise RunError(
                f"--source vllm: no GPU kernel was seen in layer {layer} (modules "
                f"{', '.join(self._found['modules'].get(layer, []))}); the engine may call it without its "
                "module"
            )
        return times[layer] / max(calls, 1)

    def _call(self, method: str, *arguments: Any) -> Any:
        assert self._engine is not None
        return self._engine.collective_rpc(method, args=arguments)[0]

    def _stop(self) -> None:
        if self._engine is None:
            return
        import gc

        import torch

        self._engine, self._tp = None, 0
        gc.collect()
        torch.cuda.empty_cache()


def hf_config(job: ProfileJob) -> dict[str, Any]:
    """The model's ``config.json`` as vLLM wants it.

    Raises:
        NotSupportedError: transformers knows no causal language model of this type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    model = job.model
    if model.model_type not in NAMES:
        raise NotSupportedError(
            f"{model.name}: transformers knows no causal language model of type {model.model_type}"
        )
    fields = model.model_dump(mode="json", exclude={"name", "quantization", "torch_dtype"}, exclude_none=True)
    if not model.is_moe:
        fields = {name: value for name, value in fields.items() if "expert" not in name and "moe" not in name}
    if model.model_type in ("mixtral", "phimoe"):
        fields["num_local_experts"] = fields.pop("num_experts")
        fields["intermediate_size"] = model.moe_intermediate_size
    return {
        **fields,
        "architectures": [_OWN_NAMES.get(model.model_type, NAMES[model.model_type])],
        "torch_dtype": model.torch_dtype
        if model.torch_dtype in ("float16", "bfloat16", "float32")
        else "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
    }


def engine_arguments(job: ProfileJob, tp: int, model: str) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``: one block with the shapes of one of ``tp`` ranks, on one GPU."""
    shapes = rank_shapes(job.model, tp)
    longest = job.max_kv + job.max_num_batched_tokens + BLOCK_SIZE
    overrides: dict[str, Any] = {
        "num_hidden_layers": _BLOCKS,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.head_dim,
        "vocab_size": shapes.vocab,
        "max_position_embeddings": longest,
    }
    if job.model.is_moe and job.model.model_type not in ("mixtral", "phimoe"):
        overrides["moe_intermediate_size"] = job.model.moe_intermediate_size // tp
    else:
        overrides["intermediate_size"] = (
            job.model.moe_intermediate_size or job.model.intermediate_size
        ) // tp
        if not job.model.is_moe:
            overrides["intermediate_size"] = shapes.intermediate
    arguments: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "tensor_parallel_size": 1,
        "block_size": BLOCK_SIZE,
        "dtype": job.dtype if job.dtype in ("float16", "bfloat16", "float32") else "bfloat16",
        "kv_cache_dtype": "fp8" if job.kv_dtype == "fp8" else "auto",
        # Beyond the engine's own limits, so that the corners of the grid can be measured.
        "max_num_batched_tokens": job.max_num_batched_tokens + job.max_num_seqs,
        "max_num_seqs": job.max_num_seqs + 1,
        "max_model_len": longest,
        "hf_overrides": overrides,
        "worker_extension_cls": _EXTENSION,
    }
    if job.dtype == "fp8":
        arguments["quantization"] = "fp8"
    return arguments
