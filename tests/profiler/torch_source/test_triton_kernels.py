"""The GPU kernels give the results of PyTorch's own operations (in Triton's interpreter: no GPU needed)."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for GPUs")

from servesim.profiler.torch_source import triton_kernels as kernels  # noqa: E402
from servesim.profiler.torch_source.device import Device  # noqa: E402
from servesim.profiler.torch_source.experts import RankExperts, assigned_experts  # noqa: E402
from servesim.profiler.torch_source.formats import gemm  # noqa: E402
from servesim.profiler.torch_source.layers import RankLayers, rotary_table, rotate_heads  # noqa: E402
from servesim.specs.rank_shapes import rank_shapes  # noqa: E402
from tests.profiler.measure.fake_meter import job  # noqa: E402


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_fused_norm_adds_the_residual_and_norms_the_sum() -> None:
    x, residual, weight = _random(3, 100), _random(3, 100) + 1, _random(100)
    total, out = residual + x, torch.empty_like(x)
    kernels.add_norm(x, residual, weight, out)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(total, (100,), weight, eps=1e-5))


def test_the_norm_of_a_head_leaves_its_input_alone() -> None:
    x, weight = _random(5, 32), _random(32)
    before, out = x.clone(), torch.empty_like(x)
    kernels.add_norm(x, None, weight, out)
    assert torch.equal(x, before)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (32,), weight, eps=1e-5))


def test_the_activation_is_silu_of_one_half_times_the_other() -> None:
    x, out = _random(2, 2600), torch.empty(2, 1300)
    kernels.silu_mul(x, out)
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :1300]) * x[:, 1300:])


def test_the_rotary_kernel_turns_heads_as_the_plain_formula_does() -> None:
    x, positions, table = _random(4, 3, 16), torch.tensor([0, 1, 7, 30]), rotary_table(torch, 31, 16)
    expected = x.clone()
    rotate_heads(positions, expected, table)
    kernels.rotary(positions, x, table)
    torch.testing.assert_close(x, expected)
    assert torch.equal(x[0], _random(4, 3, 16)[0])  # position 0 does not turn


def test_quantised_rows_come_back_within_the_steps_of_fp8() -> None:
    x = _random(3, 70) * torch.tensor([[1.0], [100.0], [0.01]])
    quantised, scale = kernels.quantise_rows(x)
    assert quantised.dtype == torch.float8_e4m3fn
    error = (quantised.float() * scale - x).abs() / x.abs().amax(dim=1, keepdim=True)
    assert float(error.max()) < 1 / 16


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 4), (37, 2, 4), (40, 3, 5)])
def test_the_grouped_gemm_is_each_slots_own_experts_product(tokens: int, top_k: int, experts: int) -> None:
    a, weights = _random(tokens, 48), _random(experts, 24, 48)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    factors = torch.rand(tokens * top_k)
    out = torch.empty(tokens * top_k, 24)
    kernels.grouped_gemm(a, weights, out, kernels.tiles_of(ids, experts), top_k, factors=factors)
    slots = range(tokens * top_k)
    expected = torch.stack(
        [weights[ids.flatten()[slot]] @ a[slot // top_k] * factors[slot] for slot in slots]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_the_grouped_gemm_scales_the_rows_of_8_bit_activations() -> None:
    a, weights, scale = _random(6, 32), _random(2, 16, 32), torch.rand(6, 1)
    out, ids = torch.empty(6, 16), torch.tensor([[0], [1], [0], [1], [1], [1]])
    kernels.grouped_gemm(a, weights, out, kernels.tiles_of(ids, 2), 1, scale=scale)
    expected = torch.stack([weights[int(ids[row])] @ a[row] * scale[row] for row in range(6)])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_tiles_hold_every_slot_once_and_one_expert_each() -> None:
    ids = torch.tensor([[2, 0], [2, 3], [2, 0]])
    tiles = kernels.tiles_of(ids, 4)
    slots = tiles.slots.view(-1, tiles.block)
    for row, expert in zip(slots, tiles.experts, strict=True):
        used = row[row < tiles.num_slots]
        assert (ids.flatten()[used.long()] == expert).all()
    assert sorted(s for s in tiles.slots.tolist() if s < tiles.num_slots) == list(range(6))


class PretendedGpu(Device):
    """The CPU, taking the paths of a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.mark.parametrize(
    "layer", ["layernorm", "final_layernorm", "qk_norm", "rotary_emb", "act_fn", "sampler"]
)
def test_every_small_layer_runs_as_it_would_on_a_gpu(layer: str) -> None:
    what = job("servesim/tiny-moe")
    if layer == "act_fn":
        what = job()
    RankLayers(PretendedGpu(torch, "cpu"), what, rank_shapes(what.model, 2)).calls(layer, 3).functions[0]()


def test_experts_in_one_launch_give_what_a_loop_over_experts_gives() -> None:
    what = job("servesim/tiny-moe", dtype="float16")
    torch.manual_seed(5)
    looped, grouped = (
        RankExperts(Device(torch, "cpu"), what, 2),
        RankExperts(PretendedGpu(torch, "cpu"), what, 2),
    )
    grouped._router = looped._router
    first, second = grouped._stacked
    looped._each = [
        [gemm(looped._device, weight, "float16") for weight in stack] for stack in (first, second)
    ]
    x = torch.randn(7, 256, dtype=torch.float16)
    ids = torch.tensor(assigned_experts(7, 2, 6))
    torch.testing.assert_close(grouped._grouped(x, ids)(), looped._looped(x, ids)(), rtol=2e-2, atol=2e-3)
