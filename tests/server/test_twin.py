"""The twin finds again what a server was made with: the truth behind its counters is known here."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.api import read_cluster
from servesim.bench.twin import Scrape, draw_lengths, parse_scrape, save_scrapes, traffic, workload_like
from servesim.engine.clock import NEVER
from servesim.errors import InputError
from servesim.server.live import LiveEngine, Stream
from servesim.server.metrics import Metrics
from servesim.specs.options import RuntimeOptions
from tests.engine.toy_world import DENSE, toy_cluster, toy_instance, toy_world
from tests.server.serving import serving

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator
    from pathlib import Path

HOST_US, FRONT_US = 4000.0, 9000.0


class HandClock:
    """Time goes on as the test says."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns

    async def wait(self, due_ns: int, woken: asyncio.Event) -> None:
        raise NotImplementedError


def watched(seconds: int, rate: float, shared: int = 0) -> list[Scrape]:
    """Scrapes of a server whose host takes ``HOST_US`` a step, once a second."""
    host = {"decode_step_overhead_us": HOST_US, "prefill_step_overhead_us": HOST_US, "front_end_us": FRONT_US}
    options = RuntimeOptions()
    pace = HandClock()
    engine = LiveEngine(read_cluster(options, toy_cluster([toy_instance(engine=host)])), options, pace)
    metrics = Metrics(engine, DENSE)
    rng = np.random.default_rng(4)
    arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.5)))
    scrapes = [parse_scrape(0.0, metrics.text().decode())]
    for at_s in sorted([*arrivals[arrivals < seconds].tolist(), *range(1, seconds + 1)]):
        pace.ns = round(at_s * 1e9)
        engine.advance(pace.ns)
        if isinstance(at_s, int):
            scrapes.append(parse_scrape(float(at_s), metrics.text().decode()))
            continue
        ids = rng.integers(0, 60, int(rng.integers(40, 400)))
        ids[:shared] = 61
        answer = rng.integers(0, 60, int(rng.integers(20, 120)))
        engine.submit([Stream(engine.new_request(ids, answer, None))])
        engine.advance(pace.ns)
    assert engine.advance(10**15) == NEVER
    return scrapes


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        (root / "one.json").write_text(json.dumps(toy_cluster([toy_instance()])))
        save_scrapes("scrapes.jsonl", watched(60, 8.0))
        yield root


def test_counters_give_the_traffic() -> None:
    seen = traffic(watched(40, 5.0, shared=32), "here")
    assert seen.arrivals.sum() == pytest.approx(200, abs=40)
    assert seen.mean_prompt == pytest.approx(220, rel=0.1)
    assert seen.mean_output == pytest.approx(70, rel=0.15)
    assert 0.1 < seen.hit_share < 0.2  # 32 of 220
    like = workload_like(seen, seed=1)
    assert len(like) == seen.arrivals.sum()
    assert np.mean([request.input_tokens for request in like]) == pytest.approx(seen.mean_prompt, rel=0.01)
    assert np.mean([request.output_tokens for request in like]) == pytest.approx(seen.mean_output, rel=0.01)
    assert all(0 <= request.arrival_ns <= 40e9 for request in like)


def test_the_twin_finds_the_host_times(capsys: pytest.CaptureFixture[str]) -> None:
    """One fit, and the rows that were not fitted follow as well."""
    words = ["twin", "scrapes.jsonl", "--cluster-config", "one.json", "--json"]
    assert main(words) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["fitted"]["host_step_us"] == pytest.approx(HOST_US, rel=0.1)
    assert told["fitted"]["front_end_us"] == pytest.approx(FRONT_US, rel=0.25)
    for row in told["followed"]:
        if row["what"] != "waiting requests":
            assert row["twin"] == pytest.approx(row["server"], rel=0.15), row


def test_a_change_is_tried_on_the_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    what_if = "two: --dp 2"
    assert main(["twin", "scrapes.jsonl", "--cluster-config", "one.json", "--what-if", what_if]) == 0
    printed = capsys.readouterr().out
    assert "fitted on its means" in printed
    assert "as it is" in printed
    assert "two" in printed


def test_a_running_server_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("--cluster-config one.json --speed 1") as server:
        for number in range(3):
            server.post("/v1/completions", {"prompt": [number] * 50, "max_tokens": 5})
        words = ["twin", server.url, "--for", "0.4", "--every", "0.1", "--cluster-config", "one.json"]
        assert main(words) == 2
        assert "no request ended" in capsys.readouterr().err


def test_lengths_keep_buckets_and_mean() -> None:
    drawn = draw_lengths({10.0: 50, 100.0: 50, math.inf: 0}, 40.0, 4000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(40, rel=0.02)
    assert drawn.min() >= 1
    assert np.median(drawn[drawn < 20]) < np.median(drawn[drawn > 20])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("one.json", "one.json:1"),
        ("scrapes.jsonl --for 3", "--for"),
        ("scrapes.jsonl --api-key k", "--api-key"),
        ("http://127.0.0.1:1 --for 3", "127.0.0.1:1"),
        ("http://127.0.0.1:1 --for 1 --every 5", "--every"),
        ("scrapes.jsonl --what-if fp8", "fp8"),
    ],
)
def test_bad_sources_are_told(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["twin", *words.split(), "--cluster-config", "one.json"]) == 2
    assert named in capsys.readouterr().err


def test_a_page_without_vllm_is_no_server() -> None:
    with pytest.raises(InputError, match="no metric of vLLM"):
        parse_scrape(0.0, "# HELP other\nother_metric 3\n")
