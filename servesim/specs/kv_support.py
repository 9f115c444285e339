"""Which formats of the KV cache a GPU can run, as vLLM 0.33.0 decides: by its attention backends.

Every line of :data:`BACKENDS` is what one backend states of itself (``supported_kv_cache_dtypes``,
``supports_compute_capability``, ``supports_sink`` in ``vllm/v1/attention/backends``) and what it checks when
it starts. A format runs where at least one backend takes it. AMD and other accelerators are not in the
table; whether they run a format is unknown here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from servesim.slotted import dataclass
from servesim.specs.layers import Attention, CompressedAttention, LatentAttention, Recurrent

if TYPE_CHECKING:
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.layers import AnyAttention, ModelLayers

AttentionKind = Literal["heads", "mla", "sparse_mla", "compressed"]
"""Keys and values a head; latent vectors; latent vectors with an indexer; those of compressed tokens."""
SIXTEEN = ("float16", "bfloat16")
_FP8 = ("fp8", "fp8_e4m3")
_TURBO = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
_AMPERE, _ADA, _ANY = 8.0, 8.9, 99.0


@dataclass(frozen=True, slots=True)
class Backend:
    """One attention backend and some of the formats that it takes."""

    name: str
    kind: AttentionKind
    formats: tuple[str, ...]
    since: float
    """Least compute capability."""
    until: float = _ANY
    """Greatest compute capability."""
    sinks: bool = False
    """Whether it takes attention sinks on these GPUs."""
    windows: bool = True
    """Whether it takes sliding windows."""
    source: str = ""
    """File of vLLM 0.33.0 below ``vllm/v1/attention/backends``."""


BACKENDS: tuple[Backend, ...] = (
    Backend("FLASH_ATTN", "heads", SIXTEEN, _AMPERE, sinks=True, source="flash_attn.py"),
    Backend("FLASH_ATTN", "heads", _FP8, 9.0, 9.0, sinks=True, source="fa_utils.py"),
    Backend("FLASHINFER", "heads", (*SIXTEEN, *_FP8, "fp8_e5m2"), _AMPERE, 12.1, source="flashinfer.py"),
    Backend("FLASHINFER", "heads", ("nvfp4",), _AMPERE, 9.0, source="flashinfer.py"),
    Backend("FLASHINFER", "heads", ("nvfp4",), 10.0, 10.3, sinks=True, source="flashinfer.py"),
    Backend("FLASHINFER", "heads", ("nvfp4",), 12.0, 12.1, source="flashinfer.py"),
    Backend("TRITON_ATTN", "heads", ("float16",), 0.0, sinks=True, source="triton_attn.py"),
    Backend("TRITON_ATTN", "heads", ("bfloat16",), _AMPERE, sinks=True, source="triton_attn.py"),
    Backend(
        "TRITON_ATTN",
        "heads",
        (*_FP8, "fp8_e5m2", "fp8_per_token_head"),
        _ADA,
        sinks=True,
        source="triton_attn.py",
    ),
    Backend(
        "TRITON_ATTN",
        "heads",
        ("int8_per_token_head", "int4_per_token_head"),
        0.0,
        sinks=True,
        source="triton_attn.py",
    ),
    Backend("TURBOQUANT", "heads", _TURBO, 0.0, windows=False, source="turboquant_attn.py"),
    Backend("TRITON_MLA", "mla", SIXTEEN, 0.0, source="mla/triton_mla.py"),
    Backend("TRITON_MLA", "mla", _FP8, _ADA, source="mla/triton_mla.py"),
    Backend("FLASHMLA_SPARSE", "sparse_mla", ("bfloat16", "fp8_ds_mla"), 9.0, 10.3,
            source="mla/flashmla_sparse.py"),
    Backend("FLASHINFER_MLA_SPARSE", "sparse_mla", (*SIXTEEN, *_FP8), 10.0, 10.3,
            source="mla/flashinfer_mla_sparse.py"),
    Backend("FLASHINFER_MLA_SPARSE_SM90", "sparse_mla", ("bfloat16", *_FP8), 9.0, 9.0,
            source="mla/flashinfer_mla_sparse_sm90.py"),
    Backend("FLASHINFER_MLA_SPARSE_SM120", "sparse_mla", ("fp8_ds_mla",), 12.0, 12.1,
            source="mla/flashinfer_mla_sparse.py"),
    Backend("FLASHMLA_SPARSE_DSV4", "compressed", (*_FP8, "fp8_ds_mla"), 9.0, 10.3,
            source="vllm/models/deepseek_v4/nvidia/flashmla.py"),
    Backend("FLASHINFER_MLA_SPARSE_DSV4", "compressed", (*_FP8, "fp8_ds_mla"), 12.0, 12.1,
            source="vllm/models/deepseek_v4/nvidia/flashinfer_sparse.py"),
)  # fmt: skip
VLLM = "0.33"
_BLOCK_STEPS: dict[AttentionKind, int] = {"heads": 16, "mla": 16, "sparse_mla": 64, "compressed": 256}
"""Tokens that blocks are a multiple of: of the backends of a kind one takes them, and none takes others.

``get_supported_kernel_block_sizes`` and ``supports_block_size`` in vLLM 0.24, 0.28 and 0.33 of
``flash_attn.py``, ``flashinfer.py``, ``triton_attn.py``, ``flex_attention.py`` and ``turboquant_attn.py``; of
``mla/triton_mla.py``; of ``mla/indexer.py``; of ``vllm/models/deepseek_v4/sparse_mla.py``. Asked of vLLM 0.33
itself for tests/golden/block_sizes.json."""
_INDEXED_BLOCK = 128
"""The same where an indexer stands beside attention a head (``vllm/models/minimax_m3/common/indexer.py``)."""


def attention_kind(model: ModelLayers) -> AttentionKind:
    """What its attention layers keep."""
    if any(isinstance(layer.attention, CompressedAttention) for layer in model.layers):
        return "compressed"
    latent = [layer.attention for layer in model.layers if isinstance(layer.attention, LatentAttention)]
    if not latent:
        return "heads"
    return "sparse_mla" if any(a.index_top_k for a in latent) else "mla"


def block_step(model: ModelLayers, hardware: HardwareSpec) -> int:
    """Tokens that a block of the KV cache has to be a multiple of, or vLLM does not start; 1: any will do, or
    nobody knows."""
    own = [layer.attention for layer in model.layers]
    attentions = [a.beside if isinstance(a, Recurrent) else a for a in own]
    if not is_known(hardware) or not any(attentions):
        return 1
    if any(isinstance(a, Attention) and a.index_dim for a in attentions):
        return _INDEXED_BLOCK
    return _BLOCK_STEPS[attention_kind(model)]


def _slides(a: AnyAttention | None) -> bool:
    """Whether a layer has a window and the instance's own KV format."""
    return isinstance(a, Attention) and a.kind == "sliding" and a.kv_format is None


def has_sinks(model: ModelLayers) -> bool:
    """Whether its attention has sinks, which not every backend takes."""
    return any(tensor.name.endswith("sinks") for layer in model.layers for tensor in layer.tensors)


def why_not(kv_format: str, model: ModelLayers, hardware: HardwareSpec) -> str | None:
    """Why vLLM does not run the format on the GPU, in a line; None: it does, or nobody knows. Layers of
    ``model`` with a format of their own do not count."""
    kind = attention_kind(model)
    taking = [each for each in BACKENDS if each.kind == kind and kv_format in each.formats]
    if not taking:
        what = {"heads": "attention a head", "compressed": "attention over compressed tokens"}.get(
            kind, "latent attention (MLA)"
        )
        return f"no attention backend of vLLM {VLLM} takes it for {what}"
    if sinks := has_sinks(model):
        taking = [each for each in taking if each.sinks]
    if not taking:
        return f"no attention backend of vLLM {VLLM} takes it beside attention sinks"
    if any(_slides(layer.attention) for layer in model.layers):
        taking = [each for each in taking if each.windows]
    if not taking:
        return f"no attention backend of vLLM {VLLM} takes it for layers with a sliding window"
    if hardware.compute_capability is None:
        return None
    have = float(hardware.compute_capability)
    if any(each.since <= have <= each.until for each in taking):
        return None
    wanted = " or ".join(dict.fromkeys(map(_range, taking)))
    beside = " beside attention sinks" if sinks else ""
    return (
        f"{hardware.name} has compute capability {hardware.compute_capability}; vLLM {VLLM} runs it on "
        f"{wanted}{beside}"
    )


def is_known(hardware: HardwareSpec) -> bool:
    """Whether the table has the accelerator at all."""
    return hardware.compute_capability is not None


def _range(backend: Backend) -> str:
    if backend.until == _ANY:
        return f"{backend.since:g} and later ({backend.name})"
    if backend.since == backend.until:
        return f"{backend.since:.1f} ({backend.name})"
    return f"{backend.since:.1f} to {backend.until:.1f} ({backend.name})"
