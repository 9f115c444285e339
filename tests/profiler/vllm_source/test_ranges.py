"""Hooks around layers, and kernels added up under them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from servesim.profiler.vllm_source.extension import LayerRanges, kernel_us


def _event(name: str, *children: SimpleNamespace, kernels: tuple[float, ...] = ()) -> SimpleNamespace:
    launched = [SimpleNamespace(name="gemm", duration=us) for us in kernels]
    event = SimpleNamespace(name=name, cpu_children=list(children), cpu_parent=None, kernels=launched)
    for child in children:
        child.cpu_parent = event
    return event


def _all(event: SimpleNamespace) -> list[SimpleNamespace]:
    return [event, *(found for child in event.cpu_children for found in _all(child))]


def test_kernels_count_for_the_range_they_were_launched_under() -> None:
    step = _event(
        "step",
        _event("servesim:norm", _event("aten::add", kernels=(1.0,)), kernels=(2.0,)),
        _event("servesim:norm", _event("aten::add", _event("inner", kernels=(4.0,)))),
        _event("aten::mul", kernels=(100.0,)),
    )
    assert kernel_us(_all(step)) == {"norm": 7.0}


def test_a_range_inside_another_counts_once() -> None:
    step = _event("servesim:moe", _event("servesim:act_fn", kernels=(1.0,)), kernels=(5.0,))
    assert kernel_us(_all(step)) == {"moe": 6.0}


def test_the_devices_copy_of_a_range_counts_nothing() -> None:
    host, device = _event("servesim:norm", kernels=(2.0,)), _event("servesim:norm", kernels=(2.0,))
    device.device_type = SimpleNamespace(name="CUDA")
    assert kernel_us([host, device]) == {"norm": 2.0}


def test_hooks_open_and_close_around_every_call_of_a_real_module() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.linear(self.norm(self.norm(x)))

    block = Block()
    ranges = LayerRanges(torch.profiler.record_function)
    ranges.attach({"layernorm": [("norm", block.norm)], "proj": [("linear", block.linear)]})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        block(torch.ones(2, 4))
        ranges.detach()
        block(torch.ones(2, 4))
    events = profiler.events()
    assert [event.name for event in events if event.name.startswith("servesim:")].count(
        "servesim:layernorm"
    ) == 2
    inside = {child.name for event in events if event.name == "servesim:proj" for child in event.cpu_children}
    assert "aten::linear" in inside
    assert kernel_us(events) == {"layernorm": 0.0, "proj": 0.0}  # a CPU launches no kernels


def test_a_range_closes_when_its_layer_fails() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")

    class Broken(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            raise ValueError(x)

    broken = Broken()
    ranges = LayerRanges(torch.profiler.record_function)
    ranges.attach({"broken": [("", broken)]})
    with pytest.raises(ValueError, match="1"):
        broken(1)
    assert ranges._open == []


@pytest.mark.parametrize(
    ("tokens", "activated", "top_k"), [(1, 2, 2), (4, 8, 2), (16, 8, 2), (5, 3, 2), (64, 128, 8)]
)
def test_a_steered_router_touches_exactly_the_experts_asked_for(
    tokens: int, activated: int, top_k: int
) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")
    from servesim.profiler.vllm_source.extension import steered_logits

    logits = steered_logits(torch.zeros(tokens, 128, dtype=torch.bfloat16), activated, top_k)
    chosen = torch.softmax(logits.float(), dim=-1).topk(top_k).indices
    assert set(chosen.flatten().tolist()) == set(range(activated))
