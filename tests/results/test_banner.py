"""What is printed before and after a run."""

from __future__ import annotations

from servesim.results.banner import banner, kv_cache_line
from servesim.results.closing import closing
from servesim.specs.options import RuntimeOptions
from tests.hand_made import GIB, capacity, instance, instance_options, two_requests


def test_the_kv_cache_line_is_the_documented_one() -> None:
    plan = capacity(36578, bytes_per_token=131072, bytes_per_block=131072 * 16, kv_bytes=36578 * 16 * 131072)
    log = instance(capacity=plan, options=instance_options(kv_dtype="bfloat16"))
    assert kv_cache_line(log) == (
        "KV cache: 585248 tokens / 36578 blocks of 16 (71.44 GiB per NPU at utilization 0.90), "
        "131072 bytes/token (kv bf16)"
    )


def test_the_banner_says_how_sure_the_cache_is() -> None:
    plan = capacity(100, band_blocks=(90, 115), graph_bytes=GIB // 2)
    text = banner(RuntimeOptions(), two_requests().workload, [instance(capacity=plan)])
    assert "1440 to 1840 tokens (-10.0%, +15.0%): " in text
    assert "as vLLM 0.11 to 0.20 starts" in text
    assert "CUDA graphs 0.50, other 0.25 GiB" in text
    assert "  band" not in banner(RuntimeOptions(), two_requests().workload, [instance()])


def test_instances_that_are_alike_are_described_once() -> None:
    logs = [instance(0), instance(1), instance(2, options=instance_options(block_size=32)), instance(3)]
    text = banner(RuntimeOptions(), two_requests().workload, logs)
    assert "instances 0-1, 3: org/tiny on 1 x NPU1" in text
    assert "instance 2: org/tiny" in text
    assert "options   block-size 32" in text  # only where they differ
    assert text.count("KV cache:") == 2
    assert max(map(len, text.splitlines())) <= 115


def test_options_are_shown_as_resolved() -> None:
    log = instance(options=instance_options(max_num_seqs=2**31 - 1))
    text = banner(RuntimeOptions(max_num_seqs=0, request_rate=3.0), two_requests().workload, [log])
    assert "max-num-seqs unlimited" in text
    assert "request-rate 3.0" in text
    assert "sub-batch" not in text
    assert "weights 2.00, activations 1.00, other 0.25 GiB" in text
    assert "bf16-kvfp8: measured by hand" in text


def test_the_closing_table_names_every_figure() -> None:
    text = closing(two_requests(rejected=True), wall_s=0.03)
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert rows["TTFT"][1:] == ["8.50", "8.50", "8.90", "8.95", "8.99"]
    assert rows["ITL"][1:3] == ["14.40", "12.00"]
    assert "2 completed, 1 rejected in 0.06 simulated seconds, 5 steps" in text
    assert "rejected request 2: 9001 tokens do not fit" in text
    assert "1, 52 tokens recomputed" in text
    assert "not modelled" in text
    assert "1.97 times real time" in text  # 59 ms from the first arrival, as the duration is
    assert "wall time" not in closing(two_requests())


def test_a_gigabyte_is_two_to_the_thirty() -> None:
    assert "8.00 GiB per NPU" in banner(RuntimeOptions(), two_requests().workload, [instance()])
    assert capacity().total_bytes == 8 * GIB
