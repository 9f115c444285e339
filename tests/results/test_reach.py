"""A run that goes beyond what its kernel times were measured for says how far."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.errors import InputError
from servesim.results.closing import closing
from servesim.results.stated_errors import Reach, stated_error, uncertainty
from tests.cost.bundles import Toy
from tests.hand_made import two_requests


def run_with(reach: Reach | None) -> tuple[list[dict[str, int]], str]:
    """The summary's entry and the closing's line; prompts of 100 and 50 tokens, contexts of 103 and 52."""
    result = two_requests()
    result.instances[0].reach = reach
    text = " ".join(closing(result).split())
    _, found, line = text.partition("extrapolated ")
    return result.summary["extrapolated"], found + line


@pytest.mark.parametrize("reach", [None, Reach(100, 103, None), Reach(1000, 1000, None)])
def test_within_the_range_nothing_is_said(reach: Reach | None) -> None:
    assert run_with(reach) == ([], "")


def test_longer_prompts_are_counted_and_told() -> None:
    (entry,), line = run_with(Reach(60, 200, None))
    assert entry == {
        "instance": 0,
        "requests": 1,
        "prompt_tokens": 100,
        "measured_prompt_tokens": 60,
        "context_tokens": 103,
        "measured_context_tokens": 200,
    }
    assert line.startswith(
        "extrapolated 1 requests: prompts up to 100 tokens (kernel times rest on up to 60)"
    )
    assert "contexts" not in line
    assert "9 to 14 % off beyond 65,536 tokens" in line


def test_longer_contexts_are_counted_and_told() -> None:
    (entry,), line = run_with(Reach(100, 51, None))
    assert entry["requests"] == 2
    assert "2 requests: contexts up to 103 tokens (kernel times rest on up to 51)" in line


def test_the_range_comes_from_meta_yaml(root: Path) -> None:
    stated = {"prompt_tokens": 16384, "decode_kv": {1: 65536, 2: 131072}}
    bundle = Toy(meta={"source": "silicon", "measured_up_to": stated}).bundle(root)
    assert bundle.measured_reach(1) == (16384, 65536)
    assert bundle.measured_reach(2) == (16384, 131072)
    with pytest.raises(InputError, match=r"measured_up_to: must have prompt_tokens and decode_kv\.4"):
        bundle.measured_reach(4)


def test_a_measured_table_ends_where_it_ends(root: Path) -> None:
    assert Toy(meta={"source": "torch"}).bundle(root).measured_reach(1) == (64 + 128, 256)
    assert Toy(meta={"source": "roofline"}).bundle(root).measured_reach(1) is None


@pytest.mark.parametrize("source", [["silicon"], {"vllm": 1}, 7])
def test_a_source_of_another_type_is_no_fault(source: object) -> None:
    meta = {"source": source}
    assert stated_error(meta, "H100", "bfloat16") == stated_error({"source": "unknown"}, "H100", "bfloat16")
    known = uncertainty({"source": "unknown"}, "H100", calibrated=False)
    assert uncertainty(meta, "H100", calibrated=False) == known
