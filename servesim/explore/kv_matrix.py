"""Two overviews: what every shipped model keeps, and which GPU runs which format for one model."""

from __future__ import annotations

from collections import Counter

from servesim.errors import NotSupportedError
from servesim.explore.kv_dial import FORMATS_OF_HEADS
from servesim.memory.kv_groups import kv_layers, plan_groups
from servesim.memory.sizing import GIB
from servesim.results.table import Table
from servesim.specs import paths
from servesim.specs.hardware import load_hardware
from servesim.specs.kv_support import VLLM, why_not
from servesim.specs.layers import Attention, Recurrent
from servesim.specs.model import ModelSpec, known_models, load_model
from servesim.specs.runnable import why_not_simulated
from servesim.specs.weights import checkpoint_bytes

_TOYS = "servesim/"
_TIMED = ("bfloat16", "fp8")
_ROWS = ("bfloat16", *FORMATS_OF_HEADS[:1], "fp8_ds_mla", *FORMATS_OF_HEADS[1:])


def models_text() -> str:
    """One line a shipped model: layers, checkpoint, KV bytes of a token, whether steps are simulated."""
    table = Table(["model", "layers", "weights", "GiB", "KV B/token", "steps"])
    names = [name for name in known_models() if not name.startswith(_TOYS)]
    simulated = 0
    for name in names:
        model = load_model(name)
        runs = why_not_simulated(model) is None
        simulated += runs
        layers = model.layers
        size = f"{checkpoint_bytes(layers, mtp=False) / GIB:,.1f}"
        label = layers.formats.label or layers.formats.plain
        table.rows.append([name, _kinds(model), label, size, _token_bytes(model), "yes" if runs else "no"])
    lines = [
        f"{len(names)} models; the steps of {simulated} are simulated. `servesim kv` gives the memory of the",
        "others. KV B/token: 16 bit, one GPU, of one more token of a long request; -: not modelled.",
    ]
    return "\n".join([table.plain(), "", *lines])


def formats_text(name: str) -> str:
    """Formats down, GPUs across, for one model."""
    model = load_model(name)
    files = sorted(path.stem for path in paths.find_all("configs/hardware/*.yaml"))
    gpus = [spec for spec in map(load_hardware, files) if spec.compute_capability is not None]
    gpus.sort(key=lambda gpu: (float(gpu.compute_capability or 0), gpu.name))
    table = Table(["KV format", *(gpu.name for gpu in gpus)])
    for kv_format in _ROWS:
        cells = [
            "-" if why_not(kv_format, model.layers, gpu) else "T" if kv_format in _TIMED else "s"
            for gpu in gpus
        ]
        table.rows.append([kv_format, *cells])
    others = ", ".join(name for name in files if name not in {gpu.name for gpu in gpus})
    lines = [
        table.plain(),
        "",
        f"T: vLLM {VLLM} runs it, and kernel times exist or can be made. s: it runs, its bytes are known and",
        f"its times derived. -: vLLM {VLLM} has no kernel for it on this GPU and this model.",
        f"Not known: {others}.",
    ]
    if reason := why_not_simulated(model):
        lines.append(f"Steps of {model.name} are not simulated: {reason}.")
    return "\n".join(lines)


def _kinds(model: ModelSpec) -> str:
    """``18 sliding, 18 full``."""
    counts: Counter[str] = Counter()
    for layer in model.layers.layers:
        attention = layer.attention
        if attention is None:
            continue
        kind = "state" if isinstance(attention, Recurrent) else attention.kind.replace("_", " ")
        if isinstance(attention, Attention) and attention.index_dim:
            kind = "indexed"
        counts[kind] += 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _token_bytes(model: ModelSpec) -> str:
    try:
        return f"{plan_groups(kv_layers(model.layers, 'bfloat16')).bytes_per_token:,.0f}"
    except NotSupportedError:
        return "-"


_KINDS: tuple[tuple[str, str], ...] = (
    ("full attention, bf16", "attention/context_attention_perf"),
    ("windows, heads of 64 to 512", "attention/generation_attention_perf"),
    ("latent attention (MLA)", "mla/mla_generation_module_perf"),
    ("with an indexer (DSA)", "sparse_attention/dsa_generation_module_perf"),
    ("MiniMax M3's (MSA)", "msa/msa_generation_module_perf"),
    ("compressed tokens (DeepSeek V4)", "sparse_attention/dsv4_csa_generation_module_perf"),
    ("gated delta net", "linear_attention/gdn_perf"),
    ("Kimi delta attention", "kda/kda_perf"),
    ("products", "gemm/gemm_perf"),
    ("experts", "moe/moe_perf"),
    ("all-reduce", "comm/custom_allreduce_perf"),
)
"""What a step runs -> the public table of it."""


def kernels_text() -> str:
    """What was measured on which GPU, with which vLLM; what was not is derived or computed.

    Raises:
        InputError: the extra with the public measurements is not installed.
    """
    from servesim.profiler.silicon import tables

    files = sorted(path.stem for path in paths.find_all("configs/hardware/*.yaml"))
    gpus = [spec for spec in map(load_hardware, files) if spec.silicon is not None]
    table = Table(["kernels", *(gpu.name for gpu in gpus)])
    for what, place in _KINDS:
        family, name = place.split("/")
        found = [tables.table_versions(str(gpu.silicon), family, name) for gpu in gpus]
        if what.startswith("windows"):  # older tables do not tell windows apart
            for index, gpu in enumerate(gpus):
                rows = tables.read_table(str(gpu.silicon), family, name)
                found[index] = found[index] if max(rows.columns.get("window_size", (0,))) else []
        table.rows.append([what, *(versions[-1] if versions else "-" for versions in found)])
    for what, column, name, family in (
        ("formats of products", "gemm_dtype", "gemm_perf", "gemm"),
        ("formats of experts", "moe_dtype", "moe_perf", "moe"),
        ("formats of KV", "kv_cache_dtype", "generation_attention_perf", "attention"),
    ):
        counts = [len(tables.read_table(str(gpu.silicon), family, name).values(column)) for gpu in gpus]
        table.rows.append([what, *map(str, counts)])
    others = [name for name in files if name not in {gpu.name for gpu in gpus}]
    lines = [
        f"Newest vLLM that a kernel was measured with ({tables.package_name()} {tables.package_version()}).",
        "-: not measured there; derived from other kernels, or computed from bytes and peak rates, as Mamba",
        f"is everywhere. Computed: {', '.join(others)}.",
    ]
    return "\n".join([table.plain(), "", *lines])
