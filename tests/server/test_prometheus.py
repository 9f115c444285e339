"""A real Prometheus scrapes the emulated server. It is a program of its own, so the tests run where it is."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.toy_world import DENSE, toy_cluster, toy_instance, toy_world
from tests.server.serving import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is no program of this machine (Debian: apt-get install prometheus)")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        (root / "two.json").write_text(json.dumps(toy_cluster([toy_instance(), toy_instance()])))
        with serving("--cluster-config two.json --speed 50") as served:
            for number in range(6):
                served.post("/v1/completions", {"prompt": [number] * 40, "max_tokens": 10 + number})
            served.wait_until_idle()
            yield served


@contextmanager
def prometheus(server: Served, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that looks at the server every 200 ms."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    target = server.url.removeprefix("http://")
    config = folder / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n- job_name: vllm\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n"
        f"  static_configs: [{{targets: ['{target}']}}]\n"
    )
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen(
        [program("prometheus"), *words, f"--web.listen-address={address}", "--log.level=error"]
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(300)


def asked(address: str, query: str) -> list[dict[str, Any]]:
    """What a query finds now; nothing while Prometheus starts."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?query={urllib.parse.quote(query)}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:
        return []
    return found


def test_prometheus_sees_what_the_server_counts(server: Served, tmp_path: Path) -> None:
    with prometheus(server, tmp_path) as address:
        until = monotonic() + 300
        while sum(float(each["value"][1]) for each in asked(address, "vllm:generation_tokens_total")) != 75:
            assert monotonic() < until
            sleep(0.1)
        assert [each["value"][1] for each in asked(address, "up")] == ["1"]
        (ended,) = asked(
            address, 'sum by (model_name) (vllm:request_success_total{finished_reason="length"})'
        )
        assert (ended["metric"], ended["value"][1]) == ({"model_name": DENSE}, "6")
        # the histogram that the server sums up by itself
        (gaps,) = asked(address, "sum(vllm:inter_token_latency_seconds_count)")
        assert gaps["value"][1] == str(75 - 6)
        (most,) = asked(address, 'sum(vllm:inter_token_latency_seconds_bucket{le="+Inf"})')
        assert most["value"][1] == gaps["value"][1]
        (median,) = asked(
            address, "histogram_quantile(0.5, sum by (le) (vllm:inter_token_latency_seconds_bucket))"
        )
        assert 0 < float(median["value"][1]) < 80
        assert {each["metric"]["engine"] for each in asked(address, "vllm:kv_cache_usage_perc")} == {"0", "1"}


def test_promtool_objects_to_vllms_names_alone(server: Served) -> None:
    text = server.get("/metrics").encode()
    checked = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True)
    assert checked.returncode in (0, 3)  # 1: it cannot read them
    complaints = {line.split(" ", 1)[1] for line in checked.stderr.decode().splitlines()}
    assert complaints <= {
        "metric names should not contain ':'",
        'non-counter metrics should not have "_total" suffix',  # vllm:iteration_tokens_total
    }
