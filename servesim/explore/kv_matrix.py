"""Two overviews: what every shipped model keeps, and which GPU runs which format for one model."""

from __future__ import annotations

from collections import Counter

from servesim.explore.kv_dial import FORMATS_OF_HEADS
from servesim.memory.kv_groups import plan_groups
from servesim.memory.kv_layers import kv_layers
from servesim.memory.sizing import GIB
from servesim.results.table import Table
from servesim.specs import paths
from servesim.specs.hardware import load_hardware
from servesim.specs.kv_support import VLLM, attention_kind, why_not
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
        "others. KV B/token: 16 bit (DeepSeek V4: fp8_ds_mla), one GPU, of one more token of a long request.",
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
    only = model.layers.kv_format if attention_kind(model.layers) == "compressed" else None
    return f"{plan_groups(kv_layers(model.layers, only or 'bfloat16')).bytes_per_token:,.0f}"
