"""The meter of the ``torch`` source: one rank of a model on one device, for any tensor-parallel degree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.meter import Provenance
from servesim.profiler.torch_source.experts import RankExperts
from servesim.profiler.torch_source.flashinfer_attention import FlashInferAttention
from servesim.profiler.torch_source.formats import check_format
from servesim.profiler.torch_source.layers import RankLayers
from servesim.profiler.torch_source.sdpa import SdpaAttention
from servesim.specs.dtypes import dtype_bytes
from servesim.specs.rank_shapes import block_windows, rank_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.bundle_writer import BundleContent, Row
    from servesim.profiler.meter import AttentionBatch, ProfileJob
    from servesim.profiler.torch_source.device import Device

POOL_SHARE = 0.7
"""Of the free memory, for the KV pool; the rest is for weights, their copies and activations."""
CPU_POOL_BYTES = 2 * 2**30
_SEED = 0


class TorchMeter:
    """Builds a rank's layers on first use and times them."""

    computes = False

    def __init__(
        self, device: Device, job: ProfileJob, *, attention: str = "auto", kv_memory_gib: float | None = None
    ) -> None:
        """
        Args:
            device: where to measure.
            job: what to measure.
            attention: ``flashinfer``, ``sdpa``, or ``auto``: FlashInfer on a GPU.
            kv_memory_gib: memory for the KV pool; None: as much as is free, within reason.

        Raises:
            NotSupportedError: the format is none that this source can do on this device.
        """
        check_format(device, job.dtype, job.kv_dtype)
        self._device, self._job = device, job
        self._backend = attention if attention != "auto" else ("flashinfer" if device.is_cuda else "sdpa")
        if self._backend == "flashinfer" and not device.is_cuda:
            raise InputError(
                "--attention flashinfer: needs a GPU; on a CPU attention is PyTorch's own (sdpa)"
            )
        if kv_memory_gib is not None and not kv_memory_gib > 0:
            raise InputError(f"--kv-memory-gib {kv_memory_gib:g}: is not allowed; must be above 0")
        self._kv_memory_gib = kv_memory_gib
        self._tp = 0
        self._layers: RankLayers | None = None
        self._attention: SdpaAttention | FlashInferAttention | None = None
        self._experts: RankExperts | None = None
        self._before = device.notes()

    @property
    def conditions(self) -> dict[str, Any]:
        return {"source": "torch", **self._device.conditions(), "attention_kernel": self._kernel()}

    def provenance(self, content: BundleContent) -> Provenance:
        del content
        notes = {
            "device_before": self._before,
            "device_after": self._device.notes(),
            "attention": "includes writing the step's keys and values; decodes read one token more than "
            "kv_decode",
            "attention_windows": {str(window): share for window, share in block_windows(self._job.model)},
            "emulation": "one device with the shapes of one rank",
        }
        return Provenance("torch", {}, {"measured": notes})

    def start_rank(self, tp: int) -> None:
        if tp == self._tp:
            return
        self.close()
        shapes = rank_shapes(self._job.model, tp)
        self._device.torch.manual_seed(_SEED)
        self._tp = tp
        self._layers = RankLayers(self._device, self._job, shapes)

    def grid(self) -> SweepGrid:
        return SweepGrid.of(self._job)

    def kv_capacity_tokens(self) -> int:
        return self._pool().capacity_tokens

    def layers_us(self, layers: Sequence[str], tokens: Sequence[int]) -> dict[str, list[float]]:
        return self._times(layers, tokens)

    def heads_us(self, layers: Sequence[str], sequences: Sequence[int]) -> dict[str, list[float]]:
        return self._times(layers, sequences)

    def attention_us(self, batches: Sequence[AttentionBatch]) -> list[float]:
        """The mean over the model's blocks, where some of them slide."""
        pool, windows = self._pool(), block_windows(self._job.model)
        with self._device.torch.inference_mode():
            return [
                sum(share * self._device.time_us(pool.calls(batch, window)) for window, share in windows)
                for batch in batches
            ]

    def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
        if self._experts is None:
            self._experts = RankExperts(self._device, self._job, self._tp)
        with self._device.torch.inference_mode():
            return [self._device.time_us(self._experts.calls(*point)) for point in points]

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
        self._layers = self._attention = self._experts = None
        self._tp = 0
        if self._device.is_cuda:
            self._device.torch.cuda.empty_cache()

    def _times(self, layers: Sequence[str], counts: Sequence[int]) -> dict[str, list[float]]:
        assert self._layers is not None
        with self._device.torch.inference_mode():
            return {
                layer: [self._device.time_us(self._layers.calls(layer, count)) for count in counts]
                for layer in layers
            }

    def _kernel(self) -> str:
        if self._backend != "flashinfer":
            return self._backend
        try:
            import flashinfer
        except ImportError:
            return "flashinfer"  # its absence is reported when it is needed
        return f"flashinfer {getattr(flashinfer, '__version__', 'of unknown version')}"

    def _pool(self) -> SdpaAttention | FlashInferAttention:
        """Attention with its KV pool: as large as the sweep can use and the memory allows."""
        if self._attention is None:
            job = self._job
            shapes = rank_shapes(job.model, self._tp)
            per_token = 2 * shapes.kv_heads * shapes.head_dim * dtype_bytes(job.kv_dtype)
            widest = (job.max_num_seqs + 1) * (job.max_kv + 1) + job.max_num_batched_tokens
            free = self._device.free_bytes() * POOL_SHARE
            if not self._device.is_cuda:
                free = min(free, CPU_POOL_BYTES)
            if self._kv_memory_gib is not None:
                free = self._kv_memory_gib * 2**30
            tokens = min(widest + widest // 8 + 64, int(free) // per_token)
            build = FlashInferAttention if self._backend == "flashinfer" else SdpaAttention
            self._attention = build(self._device, job, shapes, tokens)
        return self._attention
