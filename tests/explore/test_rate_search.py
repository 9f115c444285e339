"""The largest load that keeps a service level: against queueing theory, and where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import servesim
from servesim import InputError
from servesim.__main__ import main
from servesim.api import read_workload
from servesim.engine.build import Kept
from servesim.explore import rate_search
from servesim.explore.bisection import Range, largest
from servesim.explore.rate_search import LoadLimit
from servesim.explore.show_limit import limit_text
from servesim.explore.slo import parse_slo
from servesim.explore.warm_runs import Target, WarmRuns
from servesim.specs.cluster import load_cluster
from servesim.specs.options import RuntimeOptions
from servesim.workload.arrivals import reshuffle
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTER, WORKLOAD = "cluster.json", "workload.jsonl"


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        rng = np.random.default_rng(1)
        times = np.cumsum(rng.exponential(2e6, 60)).astype(int).tolist()
        write([{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": t} for i, t in enumerate(times)])
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


def write(lines: list[dict[str, Any]]) -> None:
    Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def search(bounds: str, **more: Any) -> LoadLimit:
    return servesim.slo(CLUSTER, WORKLOAD, bounds, **more)


def test_the_rate_agrees_with_a_queue_of_fixed_service() -> None:
    """M/D/1: mean wait = D rho / (2 (1 - rho)); a mean TTFT of 2 D allows rho = 2/3."""
    count = 10_000
    gaps = np.random.default_rng(3).exponential(1e6, count)
    gaps *= 1e6 * count / gaps.sum()
    write(
        [
            {"input_toks": 16, "output_toks": 1, "arrival_time_ns": int(t)}
            for t in np.cumsum(gaps).astype(int).tolist()
        ]
    )
    one = {"max_num_seqs": 1, "async_scheduling": False, "enable_prefix_caching": False}
    alone = servesim.simulate(CLUSTER, WORKLOAD, num_reqs=1, **one)
    service_ns = int(alone.requests["TTFT"][0])
    found = search(
        f"ttft:mean:{2 * service_ns / 1e6}",
        precision=0.008,
        patterns=8,
        kernel_error=False,
        effort="full",
        **one,
    )
    assert found.load == pytest.approx(2 / 3 * 1e9 / service_ns, rel=0.02)
    assert found.band is not None
    assert found.stable


def test_a_quick_search_stays_within_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    full = search("ttft:p95:60 tpot:50", effort="full", patterns=1, kernel_error=False)
    monkeypatch.setattr(rate_search, "QUICK_MS", 20.0)  # runs of 60 requests take about 8 ms each
    quick = search("ttft:p95:60 tpot:50")
    assert quick.load is not None
    assert full.load is not None
    assert quick.load <= full.load <= quick.load * (1 + quick.reached) * 1.05
    assert quick.reached > quick.precision
    assert quick.left_out == ["other arrival patterns", "the kernel times' stated error"]
    assert any(not point.complete for point in quick.curve)
    text = limit_text(quick)
    assert "--effort full" in text
    assert "+ ended once the bounds were certain to be missed" in text
    assert quick.to_dict()["left_out"] == quick.left_out


def test_the_answer_keeps_the_bounds_and_more_does_not() -> None:
    found = search("ttft:p95:60 tpot:50", patterns=1)
    assert found.load is not None
    kept = servesim.simulate(CLUSTER, WORKLOAD, request_rate=found.load)
    above = servesim.simulate(CLUSTER, WORKLOAD, request_rate=found.load * (1 + found.precision))
    slo = parse_slo("ttft:p95:60 tpot:50")
    assert slo.met(kept)
    assert not slo.met(above)
    assert found.band is None
    assert found.kernel_band is not None
    low, high = found.kernel_band
    assert low is not None
    assert high is not None
    assert low < found.load < high


def test_the_concurrency_found_keeps_the_bounds() -> None:
    found = search("tpot:1.5", by="concurrency", patterns=1, kernel_error=False)
    assert found.load is not None
    assert found.load == int(found.load)
    common = {"request_rate": math.inf}
    kept = servesim.simulate(CLUSTER, WORKLOAD, max_concurrency=int(found.load), **common)
    above = servesim.simulate(CLUSTER, WORKLOAD, max_concurrency=int(found.load) + 1, **common)
    assert kept.summary["p99_tpot_ms"] <= 1.5 < above.summary["p99_tpot_ms"]


def test_goodput_counts_requests_that_keep_every_bound() -> None:
    bounds = "ttft:40 e2el:80"
    found = search(bounds, goodput=0.9, patterns=1, kernel_error=False)
    assert found.load is not None
    share = parse_slo(bounds).goodput_share(servesim.simulate(CLUSTER, WORKLOAD, request_rate=found.load))
    assert share >= 0.9
    assert found.curve[-1].goodput < 0.9


def test_slow_links_are_what_binds() -> None:
    """A prompt of 40 to 99 tokens has 160 bytes of KV a token: 1e-5 GB/s moves it in about a second."""
    sides = [toy_instance(pd_type="prefill"), toy_instance(pd_type="decode")]
    Path(CLUSTER).write_text(json.dumps(toy_cluster(sides, link_bw=1e-5)), encoding="utf-8")
    found = search("ttft:6000", patterns=1, kernel_error=False)
    assert found.load is not None
    assert "KV on its way over links takes" in found.binding
    assert found.curve[0].waits["link"] > 0.5


def test_bounds_that_no_load_keeps_are_told_with_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slo", "--cluster-config", CLUSTER, "--dataset", WORKLOAD, "--slo", "ttft:0.001"]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "no load        keeps TTFT P99 up to 0.001 ms" in printed
    assert "TTFT P99 is " in printed


def test_bounds_that_every_load_keeps_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slo", "--cluster-config", CLUSTER, "--dataset", WORKLOAD, "--slo", "e2el:1e9", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["load"] == "inf"
    assert [point["load"] for point in told["curve"]] == ["inf"]


def test_the_answer_is_the_same_every_time() -> None:
    assert search("ttft:60").json_text() == search("ttft:60").json_text()


def test_a_run_that_is_given_up_would_have_missed() -> None:
    options = RuntimeOptions(cluster_config=CLUSTER, dataset=WORKLOAD)
    runs = WarmRuns(load_cluster(CLUSTER), read_workload(options), options, by_rate=True)
    runs.run(10.0)  # says how long a run is
    ended_early = 0
    for target in (
        Target(parse_slo("ttft:p95:30")),
        Target(parse_slo("ttft:mean:20 tpot:median:2")),
        Target(parse_slo("ttft:30 tpot:9"), 0.8),
    ):
        for rate in (20.0, 60.0, 100.0, 400.0, 2000.0):
            whole = runs.run(rate, 1)
            assert whole.complete
            watched = runs.run(rate, 1, target=target)
            if watched.complete:
                assert watched.result.requests.tobytes() == whole.result.requests.tobytes()
            else:
                ended_early += 1
                assert whole.score(target) > 1
                assert watched.score(target) > 1
    assert ended_early > 0


def test_what_is_kept_between_runs_changes_no_result() -> None:
    from servesim.engine.build import run

    kept = Kept()
    options = RuntimeOptions(dataset=WORKLOAD)
    other = toy_cluster([toy_instance(tp_size=2)], link_bw=3, link_latency=50)
    for described in (toy_cluster([toy_instance()]), other, toy_cluster([toy_instance(tp_size=2)])):
        cluster, workload = load_cluster(described), read_workload(options)
        fresh = run(cluster, workload, options)
        again = run(cluster, workload, options, None, kept)
        assert again.requests == fresh.requests


def test_a_seed_without_a_draw_is_noted() -> None:
    """The workload's own pattern is no draw; others are, and arrivals where a file has none."""
    note = "--seed 7 has no effect here: nothing in this run is random"
    own = {"patterns": 1, "kernel_error": False, "seed": 7}
    assert note in search("ttft:60", **own).notes
    assert note in search("ttft:60", by="concurrency", **own).notes
    assert note not in search("ttft:60", **{**own, "patterns": 2}).notes
    write([{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": 0} for i in range(30)])
    assert note not in search("ttft:60", **own).notes


def test_whole_numbers_end_at_neighbours() -> None:
    """Between 11 and 12 requests at once nothing is left to try, however fine the precision."""
    found = search("tpot:4", by="concurrency", patterns=1, kernel_error=False, effort="full")
    assert found.load is not None
    assert found.reached == pytest.approx(1 / found.load)
    assert found.reached > found.precision
    assert not found.wide
    assert "--effort full" not in limit_text(found)


def test_reshuffled_gaps_are_the_same_gaps() -> None:
    workload = read_workload(RuntimeOptions(dataset=WORKLOAD))
    before = [request.arrival_ns for request in workload]
    reshuffle(workload, (42, 1))
    after = [request.arrival_ns for request in workload]
    assert after != before
    assert sorted(np.diff(after)) == sorted(np.diff(before))
    assert (after[0], after[-1]) == (before[0], before[-1])


@pytest.mark.parametrize(
    ("edge", "first"), [(edge, first) for edge in (1.0, 3.3, 250.0) for first in (0.5, 3.0, 100.0, 1000.0)]
)
def test_a_search_ends_beside_the_edge(edge: float, first: float) -> None:
    asked = []

    def score(load: float) -> float:
        asked.append(load)
        return (load / edge) ** 3

    found = largest(score, Range(0.01, 1e4, 0.02), first, 2.0)
    assert found.passes is not None
    assert found.fails is not None
    assert found.passes <= edge < found.fails <= found.passes * 1.02 * (1 + 1e-9)
    assert len(asked) == len(set(asked)) <= 20


def test_a_search_over_whole_numbers_ends_at_neighbours() -> None:
    found = largest(lambda n: math.inf if n > 17 else 0.5, Range(1, 128, 0.001, whole=True), 60, 2.0)
    assert (found.passes, found.fails) == (17, 18)
    assert largest(lambda _: 2.0, Range(1, 128, 0.1, whole=True), 60, 2.0).passes is None
    assert largest(lambda _: 0.5, Range(1, 128, 0.1, whole=True), 60, 2.0).fails is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bounds": ""}, "--slo: no bound given"),
        ({"bounds": "ttft:p95:50", "goodput": 0.9}, "leave the statistic out"),
        ({"bounds": "ttft:50", "goodput": 1.5}, "--goodput: 1.5 is not allowed"),
        ({"bounds": "ttft:50", "by": "gpus"}, "--by: 'gpus' is not allowed"),
        ({"bounds": "ttft:50", "precision": 0}, "--precision: 0 is not allowed"),
        ({"bounds": "ttft:50", "effort": "some"}, "--effort: 'some' is not allowed"),
        ({"bounds": "ttft:50", "patterns": 0}, "--patterns: 0 is not allowed"),
        ({"bounds": "ttft:50", "request_rate": 3.0}, "--request-rate: is what slo searches for"),
        ({"bounds": "ttft:50", "by": "concurrency", "max_concurrency": 3}, "--max-concurrency: is what slo"),
        ({"bounds": "ttft:50", "ensemble": 3}, "--ensemble: has no effect on slo"),
        ({"bounds": "ttft:50", "summary": "x.json"}, "summary: slo prints nothing"),
    ],
)
def test_what_a_search_cannot_use_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(**given)


def test_the_plot_has_the_same_bytes_every_time() -> None:
    pytest.importorskip("matplotlib")
    found = search("ttft:60", patterns=1, kernel_error=False, num_reqs=20)
    for name in ("a.svg", "b.svg", "a.png"):
        found.save_plot(name)
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_says_rate_band_and_what_binds() -> None:
    text = limit_text(search("ttft:60"))
    for label in ("largest rate", "band", "binds", "keeps", "misses"):
        assert label in text


def test_who_is_turned_away_is_told_by_the_load() -> None:
    """A full server turns away by the load: that is what binds, and nothing holds at any load."""
    found = search("e2el:1e9", max_num_queued_reqs=4, patterns=1, kernel_error=False)
    assert found.load is not None
    assert math.isfinite(found.load)
    assert found.notes == []
    assert "requests are rejected; the server is full (--max-num-queued-reqs" in found.binding
    kept = servesim.simulate(CLUSTER, WORKLOAD, request_rate=found.load, max_num_queued_reqs=4)
    assert kept.rejected == []
    assert found.curve[-1].turned_away > 0
