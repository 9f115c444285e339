"""Which blocks of the KV cache a model starts with, against vLLM itself, and how others are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servesim.api import simulate
from servesim.errors import InputError
from servesim.explore.kv_dial import kv_dial
from servesim.specs.cluster import load_cluster
from servesim.specs.families import read_layers
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import resolve
from servesim.specs.kv_support import block_step
from servesim.specs.layers import Recurrent
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.specs.clusters import cluster, instance

if TYPE_CHECKING:
    from servesim.specs.layers import ModelLayers

GOLDEN = Path(__file__).parents[1] / "golden"
ASKED = json.loads((GOLDEN / "block_sizes.json").read_text())
"""Of vLLM 0.33 on an H100: sizes that were asked for; of a model those it starts with, and its own choice."""
PUBLISHED = Path(
    os.environ.get("SERVESIM_HF_CONFIGS", Path(__file__).parents[2].parent / "shared/data/hf_configs")
)
LLAMA, SPARSE = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-V3.2"
ONE = Workload([Request(0, 20, 2, 0)], "w")


def layers_of(name: str) -> ModelLayers:
    path = GOLDEN / "models" / f"{name}.json"
    path = path if path.exists() else PUBLISHED / name / "config.json"
    if not path.exists():
        pytest.skip(f"no config of {name} here")
    return read_layers(json.loads(path.read_text()), name)


@pytest.mark.parametrize("name", list(ASKED["models"]))
def test_models_start_with_the_blocks_that_vllm_takes(name: str) -> None:
    model, golden = layers_of(name), ASKED["models"][name]
    step = block_step(model, load_hardware("H100"))
    assert [size for size in ASKED["asked"] if size % step == 0] == golden["starts"]
    if not any(isinstance(layer.attention, Recurrent) for layer in model.layers):
        assert max(step, 16) == golden["chosen"]


def resolved_size(model: str, hardware: str, tp: int, **flags: Any) -> int:
    options = RuntimeOptions(model=model, hardware=hardware, tp=tp, **flags)
    own = instance(model_name=model, hardware=hardware, tp_size=tp, num_npus=tp)
    [(_, spec)] = load_cluster(cluster(own)).instances
    return resolve(options, spec, load_model(model)).block_size


def test_blocks_are_the_smallest_where_none_are_asked_for() -> None:
    assert resolved_size(LLAMA, "H100", 1) == 16
    assert resolved_size(SPARSE, "H200", 8) == 64
    assert resolved_size(SPARSE, "H200", 8, block_size=128) == 128
    assert resolved_size(SPARSE, "MI300X", 8) == 16  # nobody knows


@pytest.mark.parametrize("size", [1, 7, 24])
def test_blocks_that_no_kernel_takes_are_refused(size: int) -> None:
    refusal = (
        f"--block-size: {size} is not allowed for {LLAMA} on RTXPRO6000; must be a multiple of 16 tokens, as "
        f"no attention backend of vLLM takes other blocks; leave it out, or give {16 if size < 16 else 32}"
    )
    file = cluster(instance(block_size=size))
    for run in (
        lambda: simulate(file, ONE),
        lambda: simulate(cluster(instance()), ONE, block_size=size),
        lambda: simulate(None, ONE, model=LLAMA, hardware="RTXPRO6000", block_size=size),
        lambda: kv_dial(LLAMA, "RTXPRO6000", block_size=size),
    ):
        with pytest.raises(InputError) as caught:
            run()
        assert str(caught.value) == refusal


def test_blocks_of_16_are_refused_by_a_sparse_model() -> None:
    with pytest.raises(InputError, match=r"must be a multiple of 64 tokens, .*; leave it out, or give 64$"):
        resolved_size(SPARSE, "H200", 8, block_size=16)


def test_nothing_is_refused_where_kernels_are_not_known() -> None:
    assert resolved_size(LLAMA, "MI300X", 1, block_size=7) == 7
