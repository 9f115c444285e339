"""GEMMs in the weights' format: 16 and 32 bit as they are, fp8 and int8 with 8-bit activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from servesim.profiler.torch_source.device import Device

Gemm = Callable[[Any], Any]
"""Activations (T, k) -> (T, n)."""
_FP8_MAX = 448.0  # greatest float8_e4m3
_INT_ROWS = 32  # an int8 GEMM on a GPU wants more than 16 rows


def activation_dtype(torch: Any, dtype: str) -> Any:
    """What activations are in: the weights' own format, bfloat16 beside 8-bit weights."""
    return {"float16": torch.float16, "float32": torch.float32}.get(dtype, torch.bfloat16)


def kv_torch_dtype(torch: Any, kv_dtype: str) -> Any:
    """What the KV cache is stored in."""
    return {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "fp8": torch.float8_e4m3fn,
        "int8": torch.int8,
    }[kv_dtype]


def weight_bytes(dtype: str, n: int, k: int) -> int:
    """Bytes of an (n, k) weight."""
    return n * k * dtype_bytes(dtype)


def random_weight(device: Device, shape: tuple[int, ...], dtype: str) -> Any:
    """A weight of random numbers: all-zero operands draw less power and clock higher."""
    torch = device.torch
    plain = torch.randn(
        shape, device=device.name, dtype=torch.float32 if dtype == "float32" else torch.bfloat16
    )
    if dtype == "int8":
        return (plain * 40).clamp(-127, 127).to(torch.int8)
    if dtype == "fp8":
        return plain.to(torch.float8_e4m3fn)
    return (plain * 0.02).to(activation_dtype(torch, dtype))


def gemm(device: Device, weight: Any, dtype: str) -> Gemm:
    """The GEMM with one weight (n, k), with quantisation of the activations where it is needed."""
    torch = device.torch
    if dtype == "fp8":
        return _fp8_gemm(device, weight)
    if dtype == "int8":
        return _int8_gemm(device, weight)
    linear = torch.nn.functional.linear
    return lambda x: linear(x, weight)


def _fp8_gemm(device: Device, weight: Any) -> Gemm:
    torch = device.torch
    one = torch.ones((), device=device.name)
    per_row = not device.is_cuda or torch.cuda.get_device_capability() >= (9, 0)
    columns = torch.ones((1, weight.shape[0]), device=device.name) if per_row else one
    quantise = row_quantiser(device) if per_row else lambda x: (x.to(torch.float8_e4m3fn), one)

    def run(x: Any) -> Any:
        quantised, scale = quantise(x)
        return torch._scaled_mm(
            quantised, weight.t(), scale_a=scale, scale_b=columns, out_dtype=torch.bfloat16
        )

    return run


def row_quantiser(device: Device) -> Callable[[Any], tuple[Any, Any]]:
    """Activations (T, k) -> (fp8 (T, k), scale (T, 1)) from each row's greatest value."""
    torch = device.torch
    if device.is_cuda:
        from servesim.profiler.torch_source.triton_kernels import quantise_rows

        return quantise_rows

    def quantise(x: Any) -> tuple[Any, Any]:
        scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-6) / _FP8_MAX
        return (x / scale).to(torch.float8_e4m3fn), scale

    return quantise


def _int8_gemm(device: Device, weight: Any) -> Gemm:
    torch = device.torch

    def run(x: Any) -> Any:
        rows = x.shape[0]
        scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-6) / 127.0
        quantised = (x / scale).round().to(torch.int8)
        if device.is_cuda and rows < _INT_ROWS:
            quantised = torch.nn.functional.pad(quantised, (0, 0, 0, _INT_ROWS - rows))
        return (torch._int_mm(quantised, weight.t())[:rows] * scale).to(torch.bfloat16)

    return run


def check_format(device: Device, dtype: str, kv_dtype: str) -> None:
    """Find out with a tiny GEMM whether this device and this PyTorch can do the format at all.

    Raises:
        NotSupportedError: they cannot.
    """
    torch = device.torch
    try:
        x = torch.ones((32, 64), device=device.name, dtype=activation_dtype(torch, dtype))
        gemm(device, random_weight(device, (64, 64), dtype), dtype)(x)
        x.to(kv_torch_dtype(torch, kv_dtype)).to(x.dtype)
        if device.is_cuda:
            torch.cuda.synchronize()
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotSupportedError(
            f"--dtype {dtype} with a {kv_dtype} KV cache: {device.label} with PyTorch {torch.__version__} "
            "cannot "
            f"compute it ({reason}); measure another format, or on another device"
        ) from error
