"""What vLLM takes beside weights and KV cache, against the parts that start-up logs name."""

from __future__ import annotations

import pytest

from servesim.errors import InputError
from servesim.memory.engine_memory import activations, cuda_graphs, engine_memory, outside_torch
from servesim.memory.sizing import GIB
from servesim.specs.model import ModelSpec, load_model

LLAMA, LLAMA_70B, QWEN = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B"


@pytest.mark.parametrize(("model", "logged_gib"), [(LLAMA, 4.76), (LLAMA_70B, 4.84), (QWEN, 5.64)])
def test_activations_are_those_of_h100_start_ups(model: str, logged_gib: float) -> None:
    estimate = activations(load_model(model), 8192, 1024, 2, 1, engine_memory(None))
    assert estimate.likely / GIB == pytest.approx(logged_gib, rel=0.01)
    assert estimate.low <= logged_gib * GIB <= estimate.high


def test_a_large_vocabulary_takes_more() -> None:
    # gpt-oss: vocabulary 201,088, hidden 2,880; the log says 7.38 GiB
    model = load_model(LLAMA).model_copy(update={"vocab_size": 201_088, "hidden_size": 2880})
    estimate = activations(model, 8192, 1024, 1, 1, engine_memory(None))
    assert estimate.likely / GIB == pytest.approx(7.38, rel=0.01)


def test_vllm_0_10_took_a_quarter_of_it() -> None:
    model = load_model(LLAMA)
    old, new = (activations(model, 2048, 256, 1, 1, engine_memory(each)) for each in ("0.10.1", "0.19"))
    hidden = 2 * 2048 * 4096
    assert (new.likely - hidden) / (old.likely - hidden) == pytest.approx(3.83)


def test_a_long_step_of_few_sequences_peaks_in_the_mlp() -> None:
    # gate, up and their product of 14336 columns, 5 hidden states, 2 bytes
    estimate = activations(load_model(LLAMA), 16384, 16, 1, 1, engine_memory(None))
    assert estimate.likely == 2 * 16384 * (3 * 14336 + 5 * 4096)
    assert (estimate.low, estimate.high) == (estimate.likely // 2, estimate.likely * 3 // 2)


def test_experts_take_a_hidden_state_for_every_choice() -> None:
    model: ModelSpec = load_model("Qwen/Qwen3-30B-A3B-Instruct-2507")
    estimate = activations(model, 32768, 8, 1, 1, engine_memory(None))
    assert estimate.likely == 2 * 32768 * (8 * (2048 + 768) + 5 * 2048)  # 2 x 768 is less than 2048


def test_nccl_takes_memory_where_gpus_work_together() -> None:
    assert outside_torch(alone=True).likely / GIB == pytest.approx(0.13)
    assert outside_torch(alone=False).likely / GIB == pytest.approx(0.545)


def test_newer_vllm_takes_cuda_graphs_from_the_cache() -> None:
    assert cuda_graphs(engine_memory("0.20.2"), captured=True).high == 0
    assert cuda_graphs(engine_memory("0.21.0"), captured=True).low > 0
    assert cuda_graphs(engine_memory("0.33"), captured=False).high == 0


@pytest.mark.parametrize("wrong", ["0", "new", "0.x", "-1.2"])
def test_a_version_is_a_number(wrong: str) -> None:
    with pytest.raises(InputError, match="is not a version of vLLM"):
        engine_memory(wrong)
