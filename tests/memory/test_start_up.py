"""What a real server refuses at its start is refused here, with figures and a way out that works."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim.api import simulate
from servesim.engine import build
from servesim.errors import InputError
from servesim.memory.memory_map import MemoryMap
from servesim.memory.sizing import GIB
from servesim.memory.start_up import StartUp, start_up
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.specs import clusters

if TYPE_CHECKING:
    from pathlib import Path

LLAMA, QWEN = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B"


def cluster(**changes: Any) -> dict[str, Any]:
    """One H100, with the memory of its hardware file."""
    on_h100 = {"hardware": "H100", "npu_mem": ..., "num_npus": ...}
    return clusters.cluster(clusters.instance(**{**on_h100, **changes}))


def started(instance: dict[str, Any], **flags: Any) -> StartUp:
    loaded, asked = load_cluster(cluster(**instance)), RuntimeOptions(**flags)
    spec = loaded.instances[0][1]
    model = load_model(spec.model_name)
    options = resolve(asked, spec, model)
    memories = MemoryMap(loaded, {spec.model_name: model}, [options])
    return start_up(0, spec, model, options, asked, memories)


# ------------------------------------------------------------------ one request of the longest context


def test_a_context_that_does_not_fit_is_refused() -> None:
    # 131,072 tokens of 128 KiB are 16 GiB; 15 GiB of weights leave 5.5 of 24 GB
    with pytest.raises(
        InputError, match=r"131072 tokens, takes 16\.00 GiB .* --max-model-len \d+ \(or auto\)"
    ):
        started({"hardware": "RTX4090"})
    assert started({"hardware": "RTX4090"}, max_model_len=32768).options.max_model_len == 32768


def test_the_length_in_the_message_is_the_longest_that_starts() -> None:
    with pytest.raises(InputError) as error:
        started({"hardware": "RTX4090"})
    longest = int(str(error.value).split("--max-model-len ")[1].split()[0])
    started({"hardware": "RTX4090"}, max_model_len=longest)
    with pytest.raises(InputError, match=f"{longest + 1} tokens, takes"):
        started({"hardware": "RTX4090"}, max_model_len=longest + 1)


def test_auto_is_the_longest_that_fits() -> None:
    found = started({"hardware": "RTX4090"}, max_model_len="auto")
    assert found.options.max_model_len == found.capacity.usable_blocks * 16
    assert found.notes == (
        f"Auto-fit max_model_len: reduced from 131072 to {found.options.max_model_len} to fit in available "
        f"KV cache memory ({found.capacity.num_blocks * 2 / 1024:.2f} GiB)",
    )
    whole = started({}, max_model_len="auto")
    assert whole.options.max_model_len == 131072
    assert "full model context length 131072 fits" in whole.notes[0]


def test_a_context_that_fits_only_by_luck_is_noted() -> None:
    capacity = started({"model_name": QWEN}, max_model_len=1000).capacity
    low, high = (blocks * 16 for blocks in capacity.band_blocks)
    assert low < capacity.tokens < high
    (note,) = started({"model_name": QWEN}, max_model_len=capacity.tokens - 16).notes
    assert f"--max-model-len {low - 16} fits there too" in note
    assert started({"model_name": QWEN}, max_model_len=low - 16).notes == ()
    with pytest.raises(InputError, match=f"it would, with num_gpu_blocks {high // 16}"):
        started({"model_name": QWEN}, max_model_len=high - 16)


def test_blocks_that_are_given_may_be_few() -> None:
    found = started({"num_gpu_blocks": 100})
    assert "num_gpu_blocks holds 1600 tokens, less than the longest context of 131072" in found.notes[0]
    assert started({"num_gpu_blocks": 100}, max_model_len=1584).notes == ()
    assert started({"num_gpu_blocks": 100}, max_model_len="auto").options.max_model_len == 1584


def test_images_are_said_not_to_be_simulated() -> None:
    seeing = started({"model_name": "google/gemma-3-27b-it"}, max_model_len=16384)
    assert any("images are not simulated" in note for note in seeing.notes)
    assert not started({}).notes


def test_layers_with_a_window_keep_less(tmp_path: Path) -> None:
    shape = load_model(LLAMA).model_dump(exclude_none=True, exclude={"name"})
    kinds = ["sliding_attention", "full_attention"] * 16
    path = tmp_path / "half" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**shape, "layer_types": kinds, "sliding_window": 1024}))
    # A block is half as many layers. Those with a window keep 1023 tokens and a step of 2048, in 192 + 1
    # blocks: 44,832 tokens become 86,608. From 0.28 on vLLM reckons with both steps in flight.
    found = started({"hardware": "RTX4090", "model_name": str(path)}, max_model_len="auto")
    usable = found.capacity.usable_blocks
    assert found.options.max_model_len == (usable - 193) * 16
    newer = started(
        {"hardware": "RTX4090", "model_name": str(path)}, max_model_len="auto", vllm_version="0.33"
    )
    assert newer.options.max_model_len == (newer.capacity.usable_blocks - 321) * 16


# ------------------------------------------------------------------ token budget, quantised blocks


def test_a_step_must_hold_a_context_without_chunks() -> None:
    with pytest.raises(InputError, match="2048 is not allowed without chunked prefill; must be >= 131072"):
        started({}, enable_chunked_prefill=False)
    for flags in ({"max_num_batched_tokens": 0}, {"max_model_len": 2048}):
        started({}, enable_chunked_prefill=False, **flags)


@pytest.fixture
def in_blocks(tmp_path: Path) -> str:
    """A model whose experts are 768 wide, quantised in blocks of 128."""
    shape = load_model("Qwen/Qwen3-30B-A3B-Instruct-2507").model_dump(exclude_none=True, exclude={"name"})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = tmp_path / "blocks" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**shape, "torch_dtype": "bfloat16", "quantization_config": quantised}))
    return str(path)


def test_a_shard_must_be_whole_blocks(in_blocks: str) -> None:
    with pytest.raises(InputError) as error:
        started({"model_name": in_blocks, "tp_size": 8})
    assert "a rank's part of the experts, 96 wide, is no multiple of 128" in str(error.value)
    assert "choose tp_size 1 or 2 or ep_size 8" in str(error.value)
    for way_out in ({"tp_size": 2}, {"tp_size": 8, "ep_size": 8}, {"tp_size": 8, "dtype": "bfloat16"}):
        started({"model_name": in_blocks, **way_out})


def test_other_matrices_must_be_whole_blocks_too(tmp_path: Path) -> None:
    shape = load_model(LLAMA).model_dump(exclude_none=True, exclude={"name"})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = tmp_path / "dense" / "config.json"
    path.parent.mkdir()
    for changes, what in (
        ({"intermediate_size": 14400}, "the MLP, 7200 wide"),
        ({"head_dim": 64, "num_key_value_heads": 2}, "the keys, 64 wide"),
    ):
        path.write_text(json.dumps({**shape, **changes, "quantization_config": quantised}))
        with pytest.raises(InputError, match=f"a rank's part of {what}, is no multiple of 128"):
            started({"model_name": str(path), "tp_size": 2})


# ------------------------------------------------------------------ before any bundle


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"hardware": "RTX4090"}, "one request of the longest context"),
        ({"hardware": "RTX4090", "model_name": QWEN}, "the bfloat16 weights of Qwen/Qwen3-32B take"),
        ({"enable_chunked_prefill": False}, "without chunked prefill"),
    ],
)
def test_no_bundle_is_looked_up_before(
    instance: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.Costs, "bundle", lambda *_: pytest.fail("a bundle was asked for"))
    with pytest.raises(InputError, match=message):
        simulate(cluster(**instance), Workload([Request(0, 10, 10, 0)], "w"))


def test_longer_requests_are_cut_or_rejected() -> None:
    requests = [Request(0, 900, 100, 0), Request(1, 901, 100, 0)]
    result = simulate(cluster(max_model_len=1000), Workload(requests, "w"))
    assert [record.request for record in result.records] == [0, 1]
    assert result.requests["output"].tolist() == [100, 99]
    requests = [Request(0, 900, 100, 0), Request(1, 1000, 1, 0), Request(2, 5, 1001, 0)]
    result = simulate(cluster(max_model_len=1000), Workload(requests, "w"))
    assert [record.request for record in result.records] == [0]
    requests = [Request(0, 900, 100, 0), Request(1, 901, 100, 0)]
    result = simulate(cluster(max_model_len=1000), Workload(requests, "w"), vllm_version="0.31")
    assert [record.request for record in result.records] == [0]
    assert "901 prompt + 100 output tokens exceed the longest context of 1000" in result.rejected[0].reason


# ------------------------------------------------------------------ the memory of the NPUs


def test_memory_is_the_hardware_files() -> None:
    assert started({}).capacity.total_bytes == int(79.18 * GIB)
    assert started({"npu_mem": {"mem_util": 0.5}}).capacity.total_bytes == int(79.18 * GIB)


def test_memory_that_differs_is_said() -> None:
    (note,) = started({"npu_mem": {"mem_size": 96}}).notes
    assert note == "npu_mem.mem_size is 96 GiB, and an H100 has 79.18 (its hardware file)"
    assert started({"npu_mem": {"mem_size": 79.18}}).notes == ()


def test_memory_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"nodes\[0\]\.instances\[0\]\.npu_mem\.mem_size: is missing"):
        load_cluster(cluster(hardware="Nobody"))
    load_cluster(cluster(hardware="Nobody", npu_mem={"mem_size": 80}))


@pytest.mark.parametrize(("key", "value"), [("mem_bw", 2000), ("mem_latency", 100)])
def test_a_memory_speed_that_does_nothing_is_refused(key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"instance 0: npu_mem\.{key}: {value} is not allowed"):
        started({"npu_mem": {key: value}})
    placed = {"default": {"weights": "cpu"}}
    started({"npu_mem": {key: value}, "placement": placed})


def test_memory_bandwidth_moves_computed_kernel_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servesim.specs.paths.user_data_dir", lambda: tmp_path)
    monkeypatch.delenv("SERVESIM_AUTO_PROFILE", raising=False)

    def run(**memory: float) -> servesim.Result:
        return servesim.simulate(cluster(hardware="NPU-X", npu_mem=memory), num_reqs=4)

    file, slow, twice = run(), run(mem_bw=2500), run(mem_bw=5000)
    assert slow.figure("mean_tpot_ms") > 1.5 * file.figure("mean_tpot_ms")
    assert twice.figure("mean_tpot_ms") == file.figure("mean_tpot_ms")  # NPU-X has 5000 GB/s
    (note,) = started({"hardware": "NPU-X", "npu_mem": {"mem_bw": 2500}}).notes
    assert note.startswith("npu_mem.mem_bw is 2500 GB/s, and an NPU-X has 5000 (its hardware file): kernel")
