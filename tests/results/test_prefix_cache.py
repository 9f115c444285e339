"""What is said about the prefix cache of a run, tier by tier."""

from __future__ import annotations

from servesim.explore.compare import Comparison
from servesim.results.banner import banner
from servesim.results.closing import closing
from servesim.results.heartbeat import Heartbeat
from servesim.results.prefix_cache import prefix_cache_entry
from servesim.results.records import TierMemory
from servesim.results.result import Result
from tests.hand_made import two_requests

GIB = 1 << 30


def with_tier(storage: str = "CPU", shared: bool = False) -> Result:
    """100 + 50 tokens looked up, 32 found: 12 on the NPU, 20 in a tier that was read 3 GiB and written 1."""
    result = two_requests()
    (log,) = result.instances
    log.tier = TierMemory(storage, 0, shared, 10 * GIB, 256, GIB, 60.0, 250)
    step = list(log.steps.hit_tokens).index(32)
    second = result.log.requests[1]
    second.npu_hit, second.storage_hit = 12, 20
    log.steps.recalled_tokens.put(step, 20)
    log.steps.recalled_bytes.put(step, 3 * GIB)
    log.steps.tier_bytes.put(step, 4 * GIB)
    return result


def test_hits_are_counted_per_tier() -> None:
    result = with_tier()
    assert prefix_cache_entry(result.instances, result.requests) == {
        "lookup_tokens": 150,
        "hit_tokens": 32,
        "hit_rate": 0.213333,
        "npu_hit_tokens": 12,
        "npu_hit_rate": 0.08,
        "storage": "CPU",
        "storage_pools": [{"bytes": 10 * GIB, "tokens": 2560}],
        "storage_hit_tokens": 20,
        "storage_hit_rate": 0.133333,
        "storage_read_bytes": 3 * GIB,
        "storage_written_bytes": GIB,
    }


def test_a_pool_that_instances_share_is_counted_once() -> None:
    result = with_tier(shared=True)
    (one,) = result.instances
    (two,) = with_tier(shared=True).instances
    assert len(prefix_cache_entry([one, two], result.requests)["storage_pools"]) == 1
    two.tier = TierMemory("CXL", 1, True, 5 * GIB, 256, GIB, 60.0, 250)
    entry = prefix_cache_entry([one, two], result.requests)
    assert [pool["tokens"] for pool in entry["storage_pools"]] == [2560, 1280]
    assert entry["storage"] == "CPU and CXL"


def test_the_closing_text_has_a_line_for_every_tier() -> None:
    lines = closing(with_tier()).splitlines()
    first = lines.index("prefix cache   32 of 150 prompt tokens found (21.3%)")
    assert lines[first + 1 : first + 3] == [
        "  on the NPU   12 (8.0%)",
        "  CPU tier     20 (13.3%), 3.0 GiB read, 1.0 GiB written",
    ]
    assert "tier" not in closing(two_requests())


def test_the_banner_says_where_and_how_much() -> None:
    result = with_tier("CXL", shared=True)
    assert result.options is not None
    shown = banner(result.options, result.workload, result.instances)
    size = "2560 tokens / 10 chunks of 256 (10.00 GiB, shared by the node)"
    assert f"  CXL tier: {size}, read at 60 GB/s after 250 ns" in shown.splitlines()


def test_the_heartbeat_counts_what_was_recalled_as_found() -> None:
    shown: list[str] = []
    result = with_tier()
    Heartbeat(60_000_000, shown.append).finish(result.log)
    assert shown[-1].endswith("hit=21.3%")


def test_a_comparison_shows_tiers_only_where_there_are_any() -> None:
    plain = Comparison(["a", "b"], [two_requests(), two_requests()])
    tiered = Comparison(["a", "b"], [two_requests(), with_tier()])
    keys = {row.key: row.values for row in tiered.rows}
    assert keys["npu_hit_percent"] == [21.3333, 8.0]
    assert keys["storage_hit_percent"] == [0.0, 13.3333]
    assert keys["storage_tokens"] == [0, 2560]
    assert (keys["storage_read_gib"], keys["storage_written_gib"]) == ([0.0, 3.0], [0.0, 1.0])
    names = {row.key for row in plain.rows}
    assert "npu_hit_percent" in names
    assert not {name for name in names if name.startswith("storage")}
