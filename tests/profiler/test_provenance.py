"""What every bundle's meta.yaml says alike."""

from __future__ import annotations

from dataclasses import replace

from servesim.profiler.provenance import attention_axes, described, measured_reach, profiled
from servesim.profiler.silicon.provenance import Sources, provenance
from tests.profiler.roofline_toy import build_bundle, job
from tests.profiler.silicon_data import TOY, needs_silicon, toy_attention
from tests.profiler.silicon_data import table as kernel_table

JOB = job(dtype="fp8", kv_cache_dtype="fp8", tp_degrees=(1, 2))


def test_what_was_profiled_is_the_jobs() -> None:
    about = profiled(JOB)
    assert len(about.pop("architecture_sha256")) == 64
    assert about == {
        "hardware": "Toy",
        "architecture": "llama",
        "model": "meta-llama/Llama-3.1-8B",
        "variant": "fp8-kvfp8",
        "kv_dtype": "fp8",
        "tp_degrees": [1, 2],
        "engine_effective": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    }


@needs_silicon
def test_both_computing_sources_say_it_in_the_same_words() -> None:
    content = build_bundle(JOB)
    gemm = type("Gemm", (), {"table": kernel_table("gemm", [{"us": 1.0, "m": 4096}]), "dtype": "fp8"})()
    gemm.measured = lambda *_: True
    sources = Sources(gemm, [[toy_attention()]] * 2, None, [])
    silicon = described(JOB, provenance(JOB, replace(TOY, folder="a100_sxm"), content, sources))
    for meta in (content.meta, silicon):
        assert meta | profiled(JOB) == meta
        assert meta["attention_grid"] == attention_axes(JOB, content)


@needs_silicon
def test_silicon_says_how_far_it_was_measured() -> None:
    content = build_bundle(JOB)
    gemm = type("Gemm", (), {"table": kernel_table("gemm", [{"us": 1.0, "m": 4096}]), "dtype": "fp8"})()
    gemm.measured = lambda *_: True
    sources = Sources(gemm, [[toy_attention()]] * 2, None, [])
    gpu = replace(TOY, folder="a100_sxm")
    meta = described(JOB, provenance(JOB, gpu, content, sources))
    longest = toy_attention().longest_decode
    reach = meta["measured_up_to"]
    assert (reach["tokens"], reach["decode_kv"]) == (4096, {1: longest, 2: longest})
    assert f"up to {longest:,} tokens" not in meta["confidence"]
    beyond = described(JOB, provenance(replace(JOB, max_kv=longest * 2), gpu, content, sources))
    assert f"decode measured up to {longest:,} tokens" in beyond["confidence"]
    assert f"decodes over more than {longest} tokens of KV" in beyond["tables"]["beyond the measurements"]


def test_measured_tables_reach_as_far_as_their_rows() -> None:
    content = build_bundle(JOB)
    reach = measured_reach(content)["measured_up_to"]
    assert reach == {"prompt_tokens": 64 + 1024, "decode_kv": {1: 1024, 2: 1024}}
