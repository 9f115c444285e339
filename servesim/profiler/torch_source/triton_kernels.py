"""Fused GPU kernels an engine has and PyTorch does not: norm, activation, rotary, fp8, grouped GEMM.

Written in Triton, which comes with PyTorch for NVIDIA GPUs. Each kernel does the work, and moves the bytes,
of the one it stands for; ``TRITON_INTERPRET=1`` runs them on the CPU, which is how their results are checked.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from servesim.slotted import dataclass

_FP8_MAX = 448.0


@triton.jit
def _add_norm_kernel(x, residual, weight, out, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * width + at, value.to(residual.dtype.element_ty), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (value * scale * weights).to(out.dtype.element_ty), mask=inside)


def add_norm(x: Any, residual: Any | None, weight: Any, out: Any, eps: float = 1e-5) -> None:
    """RMS norm of ``x + residual`` (rows, width) into ``out``; the sum goes to ``residual``, if any."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 16)
    _add_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        width,
        eps,
        block,
        residual is not None,
        num_warps=warps,
    )


@triton.jit
def _silu_mul_kernel(x, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(x: Any, out: Any) -> None:
    """``silu(x[:, :w]) * x[:, w:]`` of x (rows, 2 w) into out (rows, w)."""
    rows, width = out.shape
    _silu_mul_kernel[(rows, triton.cdiv(width, 1024))](x, out, width, 1024)


@triton.jit
def _rotary_kernel(positions, x, cos_sin, heads, HALF: tl.constexpr, HEADS: tl.constexpr):  # noqa: N803
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    at = tl.arange(0, HALF)
    cos = tl.load(cos_sin + position * 2 * HALF + at)[None, :]
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + at)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (at < HALF)[None, :]
    first = x + token * heads * 2 * HALF + head * 2 * HALF + at[None, :]
    low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (low * cos - high * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (high * cos + low * sin).to(x.dtype.element_ty), mask=inside)


def rotary(positions: Any, x: Any, cos_sin: Any) -> None:
    """Rotate the heads of x (tokens, heads, head_dim) in place; cos_sin: cosines, then sines."""
    tokens, heads, head_dim = x.shape
    _rotary_kernel[(tokens,)](positions, x, cos_sin, heads, head_dim // 2, triton.next_power_of_2(heads))


@triton.jit
def _quantise_kernel(x, out, scales, width, limit, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-6) / limit
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (value / scale).to(out.dtype.element_ty), mask=inside)


def quantise_rows(x: Any) -> tuple[Any, Any]:
    """x (rows, width) -> (fp8 (rows, width), float32 scale (rows, 1)) from each row's greatest value."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 16)
    _quantise_kernel[(rows,)](x, out, scales, width, _FP8_MAX, block, num_warps=warps)
    return out, scales


@triton.jit
def _grouped_kernel(
    a,
    b,
    c,
    a_scale,
    slots,
    experts,
    factors,
    num_slots,
    n,
    k,
    SHARE: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
    WEIGHTED: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    expert = tl.load(experts + tile).to(tl.int64)
    used = slot < num_slots
    row = (slot // SHARE).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            a + row[:, None] * k + inner[None, :], mask=used[:, None] & (inner < k)[None, :], other=0.0
        )
        right = tl.load(
            b + expert * n * k + columns[None, :].to(tl.int64) * k + inner[:, None],
            mask=(columns < n)[None, :] & (inner < k)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    if SCALED:
        total *= tl.load(a_scale + row, mask=used, other=0.0)[:, None]
    if WEIGHTED:
        total *= tl.load(factors + slot, mask=used, other=0.0)[:, None]
    where = c + slot[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(where, total.to(c.dtype.element_ty), mask=used[:, None] & (columns < n)[None, :])


@dataclass(frozen=True, slots=True)
class Tiles:
    """Slots (token x its k-th expert) by expert, cut into tiles of ``block`` slots of one expert each."""

    slots: Any
    """(tiles * block,) slot numbers; filled up with ``num_slots``."""
    experts: Any
    """(tiles,) expert of each tile."""
    num_slots: int
    block: int


def tiles_of(expert_ids: Any, experts: int) -> Tiles:
    """The tiles for expert_ids (tokens, k)."""
    flat = expert_ids.flatten().to(torch.int64)
    num_slots = flat.numel()
    touched = max(int(torch.unique(flat).numel()), 1)
    block = min(max(triton.next_power_of_2(triton.cdiv(num_slots, touched)), 16), 128)
    counts = torch.bincount(flat, minlength=experts)
    per_expert = (counts + block - 1) // block
    slots = torch.full((int(per_expert.sum()) * block,), num_slots, dtype=torch.int32, device=flat.device)
    first = (torch.cumsum(per_expert, 0) - per_expert) * block  # where an expert's tiles start
    order = torch.argsort(flat, stable=True)
    rank = torch.arange(num_slots, device=flat.device) - (torch.cumsum(counts, 0) - counts)[flat[order]]
    slots[first[flat[order]] + rank] = order.to(torch.int32)
    numbers = torch.arange(experts, device=flat.device, dtype=torch.int32)
    return Tiles(slots, torch.repeat_interleave(numbers, per_expert), num_slots, block)


def grouped_gemm(
    a: Any,
    weights: Any,
    out: Any,
    tiles: Tiles,
    share: int,
    scale: Any | None = None,
    factors: Any | None = None,
) -> None:
    """``out[slot] = a[slot // share] @ weights[expert of slot].T`` times the row's scale and slot's factor.

    a (rows, k), weights (experts, n, k), out (slots, n), scale (rows, 1), factors (slots,).
    """
    _, n, k = weights.shape
    wide = 128 if tiles.block >= 64 else 64
    _grouped_kernel[(tiles.experts.numel(), triton.cdiv(n, wide))](
        a,
        weights,
        out,
        a if scale is None else scale,
        tiles.slots,
        tiles.experts,
        out if factors is None else factors,
        tiles.num_slots,
        n,
        k,
        share,
        scale is not None,
        factors is not None,
        tiles.block,
        wide,
        128 if a.element_size() == 1 else 64,
        num_warps=8 if tiles.block >= 128 else 4,
    )
