"""Ask vLLM 0.33's own models and planner what the KV cache of published models looks like: kv_plans.json.

    python make_kv_plans.py CONFIGS [NAME ...]
    python make_kv_plans.py CONFIGS --skip
    python make_kv_plans.py CONFIGS --blocks

CONFIGS is a folder of folders with a ``config.json`` each; with names, only those are asked (and kept beside
what the file holds already). Needs vllm 0.33.0 importable, with a CPU build of torch; no GPU and no weights.
Every model class is built on the meta device for one H100 (:mod:`pretend_gpu`), for tensor-parallel degrees
1, 2 and 8. Its layers give their cache specs; for a format that the H100's backends do not have, the layers
are given the backend that has it, which says how it packs a token. vLLM's planner then makes groups and
blocks of them. With ``--skip`` the plans are of :data:`SKIPPED`, layers whose cache stays in the model's
dtype, in kv_skip_plans.json; there every layer has the backend that vLLM chooses. With ``--blocks`` it is
asked which ``--block-size`` each model of :data:`BLOCKS` starts with: block_sizes.json.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pretend_gpu

pretend_gpu.install()

import torch  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

OUT = Path(__file__).parent / "kv_plans.json"
DEGREES = (1, 2, 8)
MEMORY_BYTES = 40 << 30
CONTEXT = 8192
FORMATS = {
    "auto": None,
    "fp8": None,
    "fp8_per_token_head": "TRITON_ATTN",
    "int8_per_token_head": "TRITON_ATTN",
    "int4_per_token_head": "TRITON_ATTN",
    "nvfp4": "FLASHINFER",
    "turboquant_k8v4": "TURBOQUANT",
    "turboquant_4bit_nc": "TURBOQUANT",
    "turboquant_k3v4_nc": "TURBOQUANT",
    "turboquant_3bit_nc": "TURBOQUANT",
}
"""KV formats, and the backend that has one where the H100's own does not."""


def build(
    path: Path, tp: int, kv: str = "auto", skip: Sequence[str] = (), block_size: int | None = None
) -> Any:
    """The engine's config of a model whose layers exist on the meta device; ``skip``: layers whose cache
    stays in the model's dtype; ``block_size``: as a user gives it."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.worker.workspace import init_workspace_manager

    config = EngineArgs(
        model=str(path), skip_tokenizer_init=True, load_format="dummy", enforce_eager=True,
        max_model_len=CONTEXT, kv_cache_dtype=kv, kv_cache_dtype_skip_layers=list(skip),
        block_size=block_size,
    ).create_engine_config()  # fmt: skip
    config.parallel_config.tensor_parallel_size = tp
    pretend_gpu.set_ranks(tp)
    init_workspace_manager(torch.device("meta"))
    dtype = set_default_torch_dtype(config.model_config.dtype)
    with set_current_vllm_config(config), dtype, torch.device("meta"), pretend_gpu.on_meta():
        model = initialize_model(config)
    return config, model


def give_format(config: Any, kv: str, backend: str | None) -> None:
    """Tell every attention layer of a built model to use a format, and the backend that has it if its own
    does not."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config.cache_config.cache_dtype = kv
    if (
        backend == "FLASHINFER"
    ):  # its module needs the package, which is there once its own layers are not asked
        pretend_gpu.mock_package("flashinfer")
    for layer in config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention):
            layer.kv_cache_dtype = kv
            layer.kv_cache_torch_dtype = STR_DTYPE_TO_TORCH_DTYPE[kv]
            if backend:
                layer.attn_backend = AttentionBackendEnum[backend].get_class()


def plan(config: Any, *, hybrid: bool = True) -> dict[str, Any]:
    """Groups and blocks for :data:`MEMORY_BYTES`."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_planning as planning
    from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs
    from vllm.v1.worker.utils import customize_attention_spec

    with set_current_vllm_config(config):
        current_platform.update_block_size_for_backend(config)
        specs, backends = {}, []
        for name, layer in config.compilation_config.static_forward_context.items():
            if not isinstance(layer, AttentionLayerBase):
                continue
            spec = layer.get_kv_cache_spec(config)
            if spec is None:
                continue
            backend = layer.get_attn_backend()
            if isinstance(spec, AttentionSpec):
                spec = customize_attention_spec(backend, spec)
                backends.append(backend)
            specs[name] = spec
        config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
        config.cache_config.kv_cache_layout = None
        layouts = [[layout.name for layout in get_supported_kv_cache_layouts(dict.fromkeys(backends))]]
        layout = resolve_kv_cache_layout(config, layouts, specs.values())
        groups = planning.get_global_kv_cache_groups(config, [dict(specs)])
        (made,) = planning.get_kv_cache_configs(config, [specs], [MEMORY_BYTES], groups)
    found = []
    for group in groups:
        inner = list(iter_layer_specs(group.kv_cache_spec))
        pages: dict[int, int] = {}
        names = group.layer_names
        for spec in inner if len(inner) == len(names) else inner * len(names):
            pages[spec.page_size_bytes] = pages.get(spec.page_size_bytes, 0) + 1
        found.append(
            {
                "kind": type(inner[0]).__name__,
                "layers": len(names),
                "block_size": group.kv_cache_spec.block_size,
                "pages": sorted([size, count] for size, count in pages.items()),
            }
        )
    cache = config.cache_config
    return {
        "layout": layout.name,
        "block_size": cache.block_size,
        "bytes_per_block": planning._pool_bytes_per_block(config, groups),
        "num_blocks": made.num_blocks,
        "groups": found,
        **({"state_mode": cache.mamba_cache_mode} if any(g["kind"] == "MambaSpec" for g in found) else {}),
    }


_CACHE_FIELDS = (
    "block_size",
    "cache_dtype",
    "mamba_block_size",
    "mamba_page_size_padded",
    "skip_page_size_padded",
)


def asked(path: Path, tp: int) -> dict[str, Any]:
    """Plans of one model and degree: format -> plan, or why vLLM makes none."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    config, model = build(path, tp)
    sizes = [(weight.numel(), weight.element_size()) for weight in model.parameters()]
    plans: dict[str, Any] = {"weight_bytes": sum(count * size for count, size in sizes)}
    layers = config.compilation_config.static_forward_context.values()
    latent = any(isinstance(layer, MLAAttention) for layer in layers)
    before = {name: getattr(config.cache_config, name) for name in _CACHE_FIELDS}

    def attempt(name: str, *, hybrid: bool = True, engine: Any = config) -> None:
        try:
            plans[name] = plan(engine, hybrid=hybrid)
        except (ValueError, AssertionError, NotImplementedError, KeyError, RuntimeError, TypeError) as error:
            plans[name] = {"refused": (str(error).splitlines() or [type(error).__name__])[0][:160]}
            if "-v" in sys.argv:
                traceback.print_exc()
        for field, value in before.items():
            setattr(engine.cache_config, field, value)

    attempt("auto")
    if len(plans["auto"].get("groups", ())) > 1:
        attempt("auto, one manager", hybrid=False)
    if latent:
        try:
            other, _ = build(path, tp, "fp8")
            attempt("fp8", engine=other)
        except ValueError as error:
            plans["fp8"] = {"refused": str(error).splitlines()[0][:160]}
        return plans
    if not any(isinstance(layer, Attention) for layer in layers):
        return plans  # layers of a class of their own have a format of their own
    own = [(layer, layer.attn_backend) for layer in layers if hasattr(layer, "attn_backend")]
    for kv, backend in FORMATS.items():
        if kv != "auto":
            give_format(config, kv, backend)
            attempt(kv)
            for layer, used in own:
                layer.attn_backend = used
    return plans


SKIPPED = (
    ("meta-llama__Meta-Llama-3.1-70B", "fp8", ("0", "1")),
    ("meta-llama__Meta-Llama-3.1-70B", "fp8", ("40",)),
    ("meta-llama__Meta-Llama-3.1-70B", "int8_per_token_head", ("5", "79")),
    ("meta-llama__Meta-Llama-3.1-70B", "int8_per_token_head", ("0",)),
    ("meta-llama__Meta-Llama-3.1-70B", "int4_per_token_head", ("5",)),
    ("meta-llama__Meta-Llama-3.1-70B", "int4_per_token_head", ("0", "5")),
    ("meta-llama__Meta-Llama-3.1-70B", "turboquant_k8v4", ()),
    ("meta-llama__Meta-Llama-3.1-70B", "turboquant_3bit_nc", ()),
    ("meta-llama__Meta-Llama-3.1-70B", "turboquant_4bit_nc", ("2", "3")),
    ("openai__gpt-oss-120b", "fp8", ("sliding_window",)),
    ("openai__gpt-oss-120b", "fp8", ("0", "2")),
    ("openai__gpt-oss-120b", "fp8", ("1",)),
    ("openai__gpt-oss-120b", "int4_per_token_head", ("sliding_window",)),
    ("google__gemma-4-26B-A4B", "fp8", ("sliding_window",)),
    ("blis__llama-4-scout-17b-16e-instruct-fp8-dynamic", "fp8", ("3",)),
    ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "fp8", ("5",)),
    ("Qwen__Qwen3.5-27B", "fp8", ("3", "7")),
    ("blis__deepseek-v2-lite", "fp8", ("0", "1")),
    ("deepseek-ai__DeepSeek-R1", "fp8", ("60",)),
)
"""Model, KV format, layers left out of it. TurboQuant's formats add the first and last two by themselves."""


def ask_skipped(folder: Path, version: str) -> None:
    """Plans with layers left out of the format: kv_skip_plans.json."""
    plans: dict[str, dict[str, Any]] = {}
    for name, kv, skip in SKIPPED:
        for tp in (1, 2):
            key = f"{kv} {','.join(skip)}".strip()
            own = plans.setdefault(name, {}).setdefault(str(tp), {})
            for hybrid in (True, False):
                try:
                    config, _ = build(folder / name, tp, kv, skip)
                    made = plan(config, hybrid=hybrid)
                    made["left_out"] = sorted(config.cache_config.kv_cache_dtype_skip_layers)
                except Exception as error:  # whatever a start ends in
                    if "-v" in sys.argv:
                        traceback.print_exc()
                    made = {"refused": (str(error).splitlines() or [type(error).__name__])[0][:160]}
                own[key if hybrid else f"{key}, one manager"] = made
                if hybrid and len(made.get("groups", ())) < 2 and "refused" not in made:
                    break
            print(name, tp, key, str(own[key])[:150], flush=True)
            gc.collect()
    _write(version, plans, OUT.with_name("kv_skip_plans.json"))


BLOCKS = (
    *(
        "meta-llama__Meta-Llama-3.1-70B",
        "openai__gpt-oss-20b",
        "Qwen__Qwen3.5-27B",
        "google__gemma-4-26B-A4B",
    ),
    *("deepseek-ai__DeepSeek-R1", "deepseek-ai__DeepSeek-V3.2", "zai-org__GLM-5", "nvidia__MiniMax-M3-NVFP4"),
    "deepseek-ai__DeepSeek-V4-Flash",
)
SIZES = (1, 7, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def ask_blocks(folder: Path) -> None:
    """Of each model: the sizes of :data:`SIZES` that it starts with, and the one that vLLM chooses."""
    found: dict[str, Any] = {}
    for name in BLOCKS:
        starts = []
        for size in (None, *SIZES):
            try:
                chosen = kernel_blocks(build(folder / name, 1, block_size=size)[0])
            except ValueError as error:
                print(name, size, str(error)[-150:], flush=True)
                continue
            if size is None:
                found[name] = {"chosen": chosen}
            else:
                starts.append(size)
        found[name]["starts"] = starts
        print(name, found[name], flush=True)
    lines = ",\n".join(f'"{name}":{json.dumps(one)}' for name, one in found.items())
    asked_for = json.dumps(SIZES)
    path = OUT.with_name("block_sizes.json")
    path.write_text(f'{{"vllm":"0.33.0","gpu":"H100","asked":{asked_for},"models":{{\n{lines}\n}}}}\n')


def kernel_blocks(config: Any) -> int:
    """Tokens of a block as the worker would lay it out.

    Raises:
        ValueError: no kernel takes such blocks.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import select_common_block_size

    with set_current_vllm_config(config):
        current_platform.update_block_size_for_backend(config)
        config.validate_block_size()
        alike: dict[tuple[str, int], dict[Any, Any]] = {}
        for layer in config.compilation_config.static_forward_context.values():
            spec = layer.get_kv_cache_spec(config) if isinstance(layer, AttentionLayerBase) else None
            if isinstance(spec, AttentionSpec):
                key = (type(spec).__name__, spec.block_size)
                alike.setdefault(key, {})[layer.get_attn_backend()] = spec
        for (_, size), own in alike.items():
            select_common_block_size(size, list(own), list(own.values()))
    return int(config.cache_config.block_size)


def main() -> None:
    import vllm

    for name in ("loguru", "torchvision"):  # packages that plans do not depend on
        pretend_gpu.mock_package(name)
    if "--blocks" in sys.argv:
        pretend_gpu.before_models()
        ask_blocks(Path(sys.argv[1]))
        return
    if "--skip" in sys.argv:
        pretend_gpu.before_models()
        ask_skipped(Path(sys.argv[1]), vllm.__version__)
        return
    folder, names = Path(sys.argv[1]), [arg for arg in sys.argv[2:] if not arg.startswith("-")]
    pretend_gpu.before_models()
    known = json.loads(OUT.read_text()) if OUT.exists() and names else {}
    plans = known.get("plans", {})
    for path in sorted(folder.iterdir()):
        if not (path / "config.json").exists() or (names and path.name not in names):
            continue
        plans[path.name] = {}
        for tp in DEGREES:
            try:
                plans[path.name][str(tp)] = asked(path, tp)
            except Exception as error:  # whatever a model class makes of a degree that does not fit it
                plans[path.name][str(tp)] = {"refused": (str(error).splitlines() or ["?"])[0][:160]}
            gc.collect()
        print(path.name, str(plans[path.name]["1"])[:150], flush=True)
        _write(vllm.__version__, plans)


def _write(version: str, plans: dict[str, Any], path: Path = OUT) -> None:
    head = {"vllm": version, "gpu": "H100", "memory_bytes": MEMORY_BYTES, "context": CONTEXT}
    path.write_text(
        json.dumps({**head, "plans": plans}, indent=None, separators=(",", ":")).replace('},"', '},\n"')
        + "\n"
    )


if __name__ == "__main__":
    main()
