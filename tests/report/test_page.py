"""Reports: what is in them, and that they are whole in themselves."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

import servesim
from servesim.__main__ import main
from servesim.report.found import compare_page, slo_page, sweep_page
from servesim.report.page import Chart, Page, Section, Series, TableBlock
from servesim.report.run import run_page
from servesim.results.blame import PARTS, TITLES, blame
from servesim.results.units import MS

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.results.result import Result

TIGHT = {"num_reqs": 120, "num_gpu_blocks": 2000, "request_rate": 40.0}


@pytest.fixture(scope="module")
def tight() -> Result:
    """A run with preemptions."""
    return servesim.simulate(**TIGHT)  # type: ignore[arg-type]


def embedded(page: str) -> list[dict[str, object]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    charts: list[dict[str, object]] = json.loads(found[1])
    return charts


def test_a_report_loads_nothing_from_elsewhere(tight: Result) -> None:
    page = run_page(tight).html()
    assert len(page.encode()) < 4_000_000
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", outside)
    assert "default-src 'none'" in page
    assert "sourceMappingURL" not in page
    assert page.count("</script>") == 3


def test_a_report_of_the_same_run_is_the_same(tight: Result) -> None:
    assert run_page(tight).html() == run_page(servesim.simulate(**TIGHT)).html()  # type: ignore[arg-type]


def test_every_chart_has_its_place(tight: Result) -> None:
    page = run_page(tight)
    text = page.html()
    titles = [chart["title"] for chart in embedded(text)]
    assert re.findall(r'id="chart-(\d+)"', text) == [str(at) for at in range(len(titles))]
    for expected in (
        "Distribution of TTFT",
        "TTFT by arrival",
        "Tokens per second",
        "Running requests",
        "Waiting requests",
        "KV cache in use",
        "Preemptions",
        "TTFT by prompt length",
        "Where the time of the slowest requests went",
    ):
        assert expected in titles


def test_the_slowest_requests_stand_first_with_their_blame(tight: Result) -> None:
    blocks = next(each for each in run_page(tight).sections if each.title.startswith("Why")).blocks
    table = next(block for block in blocks if isinstance(block, TableBlock))
    rows = tight.requests
    slowest = int(rows["request_id"][rows["latency"].argmax()])
    assert table.rows[0][0] == str(slowest)
    assert "preemption ms" in table.header
    chart = next(block for block in blocks if isinstance(block, Chart))
    parts = blame(tight)
    at = int(rows["latency"].argmax())
    drawn = {series.name: series.y[1] for series in chart.series}
    assert drawn == {TITLES[name]: parts[name][at] / MS for name in PARTS if parts[name].any()}
    assert sum(drawn.values()) == pytest.approx(rows["latency"][at] / MS)


def test_tokens_per_second_count_every_token(tight: Result) -> None:
    chart = next(each for each in run_page(tight).charts() if each.title == "Tokens per second")
    width_s = tight.log.end_ns / 1e9 / len(chart.series[0].y)
    assert sum(chart.series[0].y) * width_s == pytest.approx(tight.summary["total_output_tokens"])


def test_itl_over_time_is_within_all_of_them(tight: Result) -> None:
    chart = next(each for each in run_page(tight).charts() if each.title == "ITL over time")
    median, p99 = (series.y for series in chart.series)
    gaps = np.concatenate([tight.inter_token_latencies(row) for row in tight.requests["request_id"].tolist()])
    assert gaps.min() / MS <= min(median) <= np.median(gaps) / MS <= max(median)
    assert all(one <= other for one, other in zip(median, p99, strict=True))


def test_load_over_time_is_the_mean_of_the_steps(tight: Result) -> None:
    chart = next(each for each in run_page(tight).charts() if each.title == "Running requests")
    steps = tight.steps
    busy = ((steps["end_ns"] - steps["start_ns"]) * steps["running"]).sum()
    width_ns = tight.log.end_ns / len(chart.series[0].y)
    assert sum(chart.series[0].y) * width_ns == pytest.approx(busy, rel=0.01)


def test_what_users_write_cannot_break_the_page() -> None:
    series = Series("</script><b>", [1.0], [2.0], ["<i>"])
    page = Page("<b>&", "", [Section("x", [Chart("<t>", "scatter", "", "", [series])])]).html()
    assert "<b>&" not in page
    assert page.count("</script>") == 3
    assert embedded(page)[0]["series"][0]["name"] == "</script><b>"  # type: ignore[index]


def test_a_logarithmic_axis_needs_values_far_apart() -> None:
    near = Chart("", "line", "", "", [Series("", [1.0, 2.0], [1.0, 100.0])], x_log=True, y_log=True)
    assert (near.log("x"), near.log("y")) == (False, True)
    assert not Chart("", "line", "", "", [Series("", [0.0, 2.0], [1.0, 1.0])], x_log=True).log("x")


def test_a_run_in_which_nothing_ran_is_told(tmp_path: Path) -> None:
    assert main(["run", "--max-model-len", "16", "--report", str(tmp_path / "r.html")]) == 1
    assert "Every request was rejected" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_comparisons_searches_and_sweeps_have_pages() -> None:
    small = {"num_reqs": 40}
    compared = servesim.compare(sets={"a": {}, "b": {"max_num_seqs": 4}}, **small)  # type: ignore[arg-type]
    titles = {chart.title for chart in compare_page(compared).charts()}
    assert {"Throughput against TPOT", "Distribution of TTFT", "Running requests"} <= titles
    tight = {"workload": "workloads/long_context.jsonl", "num_reqs": 60}
    pages = compare_page(servesim.compare(**tight))  # type: ignore[arg-type]
    assert "At the ends of the KV capacity's band" in pages.html().replace("&#x27;", "'")
    limit = servesim.slo(bounds="tpot:25", patterns=1, kernel_error=False, num_reqs=150)
    names = [series.name for series in slo_page(limit).charts()[1].series]
    assert names == ["P50", "P99", "TPOT P99 bound"]
    swept = servesim.sweep({"grid": {"max_num_seqs": [2, 8]}}, **small)  # type: ignore[arg-type]
    front = sweep_page(swept).charts()[0].series[0]
    assert front.name == "Pareto front"
    assert front.labels is not None
    assert front.labels[0].startswith("max_num_seqs ")


def test_plots_are_images_of_the_same_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    words = ["run", "--num-reqs", "30", "--plots", str(folder)]
    assert main(words) == 0
    names = sorted(path.stem for path in folder.glob("*.png"))
    assert "distribution-of-ttft" in names
    assert names == sorted(path.stem for path in folder.glob("*.svg"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(words) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["run", "--num-reqs", "5", "--plots", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--num-reqs", "20"],
        ["slo", "--slo", "tpot:60", "--num-reqs", "20", "--patterns", "1"],
        ["sweep", "--grid", "--max-num-seqs 2,4", "--num-reqs", "10"],
    ],
    ids=lambda words: words[0],
)
def test_commands_write_reports(root: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--report", "r.txt"]) == 2
    assert "must end in .html" in capsys.readouterr().err
    assert main([*words, "--report", "r.html"]) == 0
    assert (root / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_flags_of_a_runs_files_are_not_passed_over() -> None:
    from servesim.cli.slo import NOT_SEARCHED
    from servesim.specs.options import output_fields

    assert set(output_fields()) <= set(NOT_SEARCHED)
