"""What every bundle's meta.yaml says alike."""

from __future__ import annotations

from dataclasses import replace

from servesim.profiler.provenance import attention_axes, profiled
from servesim.profiler.roofline.build import build_bundle
from servesim.profiler.silicon.provenance import Sources
from servesim.profiler.silicon.provenance import describe as describe_silicon
from tests.profiler.roofline_toy import job
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
    silicon = describe_silicon(
        JOB, replace(TOY, folder="a100_sxm"), content, Sources(gemm, [toy_attention()] * 2, None, [])
    )
    for meta in (content.meta, silicon):
        assert meta | profiled(JOB) == meta
        assert meta["attention_grid"] == attention_axes(JOB, content)
