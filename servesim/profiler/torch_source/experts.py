"""One rank's expert layer: router, two GEMMs per touched expert, activation between, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError
from servesim.profiler.torch_source.device import Calls
from servesim.profiler.torch_source.formats import activation_dtype, gemm, random_weight, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.torch_source.device import Device


def assigned_experts(tokens: int, top_k: int, activated: int) -> list[list[int]]:
    """Experts of every token so that ``activated`` of them, no more and no fewer, share the work evenly.

    Slots are dealt out in turn; ``top_k <= activated <= tokens * top_k`` keeps a token's experts different.
    """
    return [[(token * top_k + i) % activated for i in range(top_k)] for token in range(tokens)]


class RankExperts:
    """The expert layer of one of ``tp`` ranks: every expert, each ``tp`` times narrower.

    The router's GEMM and choice are computed and timed; whom the tokens go to is then set by hand, so that
    a shot touches exactly the experts it should.
    """

    def __init__(self, device: Device, job: ProfileJob, tp: int) -> None:
        if job.model.moe_intermediate_size % tp:
            raise NotSupportedError(
                f"{job.model.name}: experts of width {job.model.moe_intermediate_size} cannot be split over "
                f"tp {tp}"
            )
        if device.is_cuda and job.dtype in ("int8", "float32"):
            raise NotSupportedError(
                f"--dtype {job.dtype}: the grouped GEMM of experts on a GPU takes 16 bit or fp8"
            )
        self._device, self._torch, self._model = device, device.torch, job.model
        self._dtype = job.dtype
        self._width = job.model.moe_intermediate_size // tp
        self._activations = activation_dtype(device.torch, job.dtype)
        experts, hidden = job.model.num_experts, job.model.hidden_size
        self._router = torch_randn(device, (experts, hidden), self._activations)
        sizes = ((2 * self._width, hidden), (hidden, self._width))
        if device.is_cuda:
            self._stacked = [random_weight(device, (experts, *size), job.dtype) for size in sizes]
        else:
            self._each = [
                [gemm(device, random_weight(device, size, job.dtype), job.dtype) for _ in range(experts)]
                for size in sizes
            ]

    def calls(self, tokens: int, activated: int) -> Calls:
        """The layer over ``tokens`` tokens that touch ``activated`` experts, other ones every call."""
        torch, model = self._torch, self._model
        x = torch_randn(self._device, (tokens, model.hidden_size), self._activations)
        ids = torch.tensor(
            assigned_experts(tokens, model.num_experts_per_tok, activated), device=self._device.name
        )
        sizes = ((2 * self._width, model.hidden_size), (model.hidden_size, self._width))
        read = sum(activated * weight_bytes(self._dtype, *size) for size in sizes)
        turns = model.num_experts // activated if self._device.cold else 1
        build = self._grouped if self._device.is_cuda else self._looped
        functions = [build(x, (ids + turn * activated) % model.num_experts) for turn in range(min(turns, 8))]
        return Calls(functions, read)

    def _route(self, x: Any) -> Any:
        """Weights of each token's experts (tokens, k)."""
        functional = self._torch.nn.functional
        logits = functional.linear(x, self._router)
        weights, _ = functional.softmax(logits, dim=-1, dtype=self._torch.float32).topk(
            self._model.num_experts_per_tok
        )
        return weights / weights.sum(dim=-1, keepdim=True)

    def _looped(self, x: Any, ids: Any) -> Callable[[], object]:
        torch, width = self._torch, self._width
        touched = [
            (int(expert), *torch.where(ids == expert)) for expert in torch.unique(ids)
        ]  # (expert, token of each of its slots, place among that token's experts)

        def run() -> Any:
            weights = self._route(x)
            out = torch.zeros_like(x)
            for expert, rows, place in touched:
                both = self._each[0][expert](x[rows])
                inner = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
                part = self._each[1][expert](inner) * weights[rows, place, None].to(x.dtype)
                out.index_add_(0, rows, part.to(x.dtype))
            return out

        return run

    def _grouped(self, x: Any, ids: Any) -> Callable[[], object]:
        from servesim.profiler.torch_source import triton_kernels as kernels

        torch, width, top_k = self._torch, self._width, self._model.num_experts_per_tok
        tiles = kernels.tiles_of(ids, self._model.num_experts)
        both = torch.empty((tiles.num_slots, 2 * width), device=x.device, dtype=x.dtype)
        inner = torch.empty((tiles.num_slots, width), device=x.device, dtype=x.dtype)
        parts = torch.empty((tiles.num_slots, x.shape[1]), device=x.device, dtype=x.dtype)
        quantised = self._dtype == "fp8"

        def run() -> Any:
            weights = self._route(x).flatten()
            left, scale = kernels.quantise_rows(x) if quantised else (x, None)
            kernels.grouped_gemm(left, self._stacked[0], both, tiles, top_k, scale)
            kernels.silu_mul(both, inner)
            left, scale = kernels.quantise_rows(inner) if quantised else (inner, None)
            kernels.grouped_gemm(left, self._stacked[1], parts, tiles, 1, scale, weights)
            return parts.view(x.shape[0], top_k, -1).sum(dim=1)

        return run


def torch_randn(device: Device, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers on the device."""
    return device.torch.randn(shape, device=device.name, dtype=dtype)
