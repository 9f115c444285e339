"""Layers whose KV cache stays in 16 bit: words, names of variants, what a run has of them."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from servesim import RuntimeOptions
from servesim.cost.finding import profile_command, variant_dtypes
from servesim.errors import InputError
from servesim.memory.plan import kv_cache_capacity
from servesim.specs.block_layers import attention_groups
from servesim.specs.cluster_changes import cluster_of
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import resolve
from servesim.specs.kv_skip import (
    as_kept,
    skip_words,
    skipped_layers,
    variant_with,
    wide_layers,
    with_wide_layers,
    without_skipped,
)
from servesim.specs.kv_support import why_not
from servesim.specs.model import load_model
from servesim.specs.serve_line import read_serve_line, write_serve_line
from servesim.specs.shape import shape_of

LLAMA, GPT_OSS, NEXT = "meta-llama/Llama-3.1-8B", "openai/gpt-oss-120b", "Qwen/Qwen3-Next-80B-A3B-Instruct"


def resolved(name: str, **flags):
    options = RuntimeOptions(model=name, hardware="H100", **flags)
    instance = next(spec for _, spec in cluster_of(options).instances)
    return resolve(options, instance, load_model(name)), instance


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["1", "0"], "0,1"),
        ("0 1,sliding_window", "0,1,sliding_window"),
        ([3, "sliding_window", 3], "3,sliding_window"),
        (None, None),
    ],
)
def test_words_in_any_form(given, words):
    assert skip_words(given) == words


@pytest.mark.parametrize("word", ["first", "-1", "0.5", "full_attention"])
def test_other_words_are_refused(word):
    with pytest.raises(InputError, match="numbers of layers"):
        RuntimeOptions(kv_cache_dtype_skip_layers=word)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="must be 0 to 31"):
        resolved(LLAMA, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers="32")


def test_a_16_bit_cache_leaves_nothing_out():
    assert resolved(LLAMA, kv_cache_dtype_skip_layers="0")[0].skipped == ()


def test_turboquant_leaves_out_both_ends():
    """The first two and the last two layers; none of a model with states."""
    model = load_model(LLAMA).layers
    assert skipped_layers(model, None, "turboquant_k8v4") == (0, 1, 30, 31)
    assert skipped_layers(model, "5", "turboquant_3bit_nc") == (0, 1, 5, 30, 31)
    assert skipped_layers(load_model(NEXT).layers, None, "turboquant_k8v4") == ()


def test_windows_of_gpt_oss():
    model = load_model(GPT_OSS).layers
    assert skipped_layers(model, "sliding_window", "fp8") == tuple(range(0, 36, 2))


def test_variants_and_back():
    model = load_model(LLAMA).layers
    assert variant_with("bf16-kvfp8", model, (0, 1, 5, 30, 31)) == "bf16-kvfp8-skip0-1_5_30-31"
    assert variant_with("bf16-kvfp8", model, ()) == "bf16-kvfp8"
    assert without_skipped("bf16-kvfp8-skip0-1_5") == ("bf16-kvfp8", "0,1,5")
    windows = load_model(GPT_OSS).layers
    name = variant_with("fp8-kvfp8", windows, tuple(range(0, 36, 2)))
    assert name == "fp8-kvfp8-skipwindows"
    assert without_skipped(name) == ("fp8-kvfp8", "sliding_window")
    assert variant_dtypes(name) == ("fp8", "fp8")


def test_the_command_that_makes_such_a_bundle():
    command = profile_command("H100", LLAMA, "bf16-kvfp8-skip0-1", 1)
    assert "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 1 --tp 1" in command


def test_capacity_by_hand():
    """32 layers of 8 heads of 128: 31 take 2,048 bytes a token, one 4,096, in blocks of 32 tokens."""
    options, instance = resolved(LLAMA, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers="7")
    capacity = kv_cache_capacity(load_model(LLAMA), instance, options)
    assert (capacity.block_size, capacity.bytes_per_block) == (32, 32 * (31 * 2048 + 4096))
    assert capacity.request_blocks(100) == ceil(100 / 32)


def test_layers_of_two_formats_are_groups_of_their_own():
    """The narrow one first, whose table is attention.csv."""
    options, _ = resolved(LLAMA, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers="0 1")
    model = options.kept(load_model(LLAMA))
    narrow, wide = attention_groups(model.layers)
    assert (narrow.label, len(narrow.blocks)) == ("attention", 30)
    assert (wide.label, wide.blocks, wide.attention.kv_format) == ("attention_full", (0, 1), "bfloat16")


def test_the_shape_tells_bundles_apart():
    model = load_model(LLAMA)
    kept = as_kept(model, (0, 1), "bfloat16")
    assert shape_of(kept) == {**shape_of(model), "kv_16_bit": "0,1"}
    assert wide_layers(kept.layers) == (0, 1)
    assert wide_layers(model.layers) == ()
    assert replace(kept.layers, layers=model.layers.layers) == model.layers


def test_what_moves_kv_is_refused_beside_it():
    drafts = '{"method":"ngram","num_speculative_tokens":2}'
    for beside in ({"speculative_config": drafts}, {"prefix_storage": "CPU"}):
        with pytest.raises(InputError, match="not simulated with"):
            resolved(LLAMA, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers="0", **beside)
    with pytest.raises(InputError, match="leaves out the first and last two"):
        resolved(LLAMA, kv_cache_dtype="turboquant_k8v4", prefix_storage="CPU")


def test_as_a_serve_line():
    text = f"vllm serve {LLAMA} --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 1 --block-size 32"
    options = read_serve_line(text).options
    assert options["kv_cache_dtype_skip_layers"] == "0 1"
    told = RuntimeOptions(**options).kv_cache_dtype_skip_layers
    assert told == "0,1"
    assert write_serve_line({**options, "kv_cache_dtype_skip_layers": told}).split() == text.split()


def test_turboquant_runs_where_windows_are_left_out():
    gemma, gpu = load_model("google/gemma-3-27b").layers, load_hardware("H100")
    assert "sliding window" in str(why_not("turboquant_k8v4", gemma, gpu))
    skipped = skipped_layers(gemma, "sliding_window", "turboquant_k8v4")
    assert why_not("turboquant_k8v4", with_wide_layers(gemma, skipped, "bfloat16"), gpu) is None
