"""The emulated server, spoken to by the ``openai`` package and by plain HTTP."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import servesim
from servesim.__main__ import main
from servesim.workload.request import Request, Workload
from tests.engine.toy_world import DENSE, toy_cluster, toy_instance, toy_world
from tests.server.serving import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

FAST = "--cluster-config one.json --speed 50"


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        for name, instances in (("one", [toy_instance()]), ("two", [toy_instance(), toy_instance()])):
            (root / f"{name}.json").write_text(json.dumps(toy_cluster(instances)))
        yield


@pytest.fixture(scope="module")
def server(toys: None) -> Iterator[Served]:
    del toys
    with serving(FAST) as served:
        yield served


def client_of(server: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300)


# ---------------------------------------------------------------------- a client that is not ours


def test_openai_lists_the_model(server: Served) -> None:
    (model,) = client_of(server).models.list().data
    assert model.id == DENSE


def test_openai_gets_a_completion(server: Served) -> None:
    got = client_of(server).completions.create(model=DENSE, prompt="one two three", max_tokens=7, n=2)
    assert [choice.finish_reason for choice in got.choices] == ["length", "length"]
    assert [len(choice.text.split()) for choice in got.choices] == [7, 7]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (3, 14)


def test_openai_gets_token_ids_through(server: Served) -> None:
    got = client_of(server).completions.create(model=DENSE, prompt=[[1, 2, 3], [4, 5]], max_tokens=2)
    assert len(got.choices) == 2
    assert got.usage is not None
    assert got.usage.prompt_tokens == 5


def test_openai_streams_a_chat(server: Served) -> None:
    parts = list(
        client_of(server).chat.completions.create(
            model=DENSE,
            messages=[{"role": "user", "content": "tell me"}],
            max_completion_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [part.choices[0].delta.content for part in parts if part.choices]
    assert texts[0] == ""
    assert len(texts) == 7
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 6


def test_openai_gets_a_response(server: Served) -> None:
    client = client_of(server)
    got = client.responses.create(model=DENSE, input="tell me", max_output_tokens=5)
    assert len(got.output_text.split()) == 5
    with client.responses.stream(model=DENSE, input="tell me", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
    assert kinds.count("response.output_text.delta") == 5
    assert kinds[-1] == "response.completed"


def test_openai_sees_errors_in_its_form(server: Served) -> None:
    client = client_of(server)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=DENSE, prompt=[1] * 3000, max_tokens=1)
    with pytest.raises(openai.APIStatusError, match="not emulated") as told:
        client.embeddings.create(model=DENSE, input="a")
    assert told.value.status_code == 501


def test_a_stop_text_ends_the_answer(server: Served) -> None:
    whole = client_of(server).completions.create(model=DENSE, prompt="a", max_tokens=40)
    assert whole.choices[0].finish_reason == "length"
    stop = "e"
    got = client_of(server).completions.create(model=DENSE, prompt="a", max_tokens=40, stop=stop)
    assert got.choices[0].finish_reason == "stop"
    assert stop in got.choices[0].text
    assert stop not in got.choices[0].text.rsplit(" ", 1)[0]


# ---------------------------------------------------------------------- the engine behind it


def call_all(server: Served, bodies: list[dict[str, Any]]) -> list[Any]:
    """One client each, who leaves with its answer."""

    def one(number: int) -> Any:
        status, body = server.post("/v1/completions", bodies[number], **{"x-request-id": f"{number:03d}"})
        assert status == 200, body
        server.post("/virtual_time", {"leave": True})
        return body

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, range(len(bodies))))


def test_times_are_those_of_the_simulation() -> None:
    """Six requests that arrive at once: the sums of the server's histograms are those of a run."""
    lengths = [(40 + 7 * number, 5 + number) for number in range(6)]
    entries = [Request(index, prompt, output, 0) for index, (prompt, output) in enumerate(lengths)]
    expected = servesim.simulate(cluster="one.json", workload=Workload(entries))
    with serving("--cluster-config one.json --virtual-time 6") as server:
        call_all(server, [{"prompt": [n + 1] * p, "max_tokens": o} for n, (p, o) in enumerate(lengths)])
        ttft_s = server.metric("vllm:time_to_first_token_seconds_sum")
        latency_s = server.metric("vllm:e2e_request_latency_seconds_sum")
    summary = expected.summary
    assert ttft_s * 1000 / 6 == pytest.approx(summary["mean_ttft_ms"])
    assert latency_s * 1000 / 6 == pytest.approx(summary["mean_e2el_ms"])


def test_virtual_time_is_the_same_twice() -> None:
    """Clients of different speed, sleeps and turns: the same counts to the last digit."""

    def day() -> str:
        with serving("--cluster-config two.json --virtual-time 4") as server:

            def client(number: int) -> None:
                for turn in range(3):
                    server.post("/virtual_time", {"sleep_s": 3600 * number + turn})
                    body = {"prompt": [number + 1] * (50 + turn), "max_tokens": 4 + number}
                    server.post("/v1/completions", body, **{"x-request-id": f"{number}-{turn}"})
                server.post("/virtual_time", {"leave": True})

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(client, range(4)))
            assert server.get("/virtual_time")["now_s"] > 3600 * 9
            counted: str = server.get("/metrics")
        return "\n".join(line for line in counted.splitlines() if "_created" not in line)

    assert day() == day()


def test_the_next_turn_hits_the_prefix_cache(server: Served) -> None:
    client = client_of(server)
    said: list[Any] = [{"role": "user", "content": " ".join(f"word{n}" for n in range(60))}]
    first = client.chat.completions.create(model=DENSE, messages=said, max_completion_tokens=40)
    said += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "go on"},
    ]
    second = client.chat.completions.create(model=DENSE, messages=said, max_completion_tokens=4)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    whole = (first.usage.total_tokens - 1) // 16 * 16  # the last token's KV was never computed
    assert second.usage.prompt_tokens_details.cached_tokens == whole
    server.wait_until_idle()
    assert server.post("/reset_prefix_cache")[0] == 200
    third = client.chat.completions.create(model=DENSE, messages=said, max_completion_tokens=4)
    assert third.usage is not None
    assert third.usage.prompt_tokens_details is not None
    assert third.usage.prompt_tokens_details.cached_tokens == 0


def test_a_salt_keeps_prefixes_apart(server: Served) -> None:
    body = {"prompt": [9] * 200, "max_tokens": 1}
    server.post("/v1/completions", body)
    cached = [
        server.post("/v1/completions", {**body, "cache_salt": salt})[1]["usage"]["prompt_tokens_details"]
        for salt in ("", "mine", "mine")
    ]
    assert [each["cached_tokens"] for each in cached] == [192, 0, 192]


def test_adapters_take_slots_and_have_prefixes_of_their_own() -> None:
    words = "--cluster-config two.json --lora-modules sql=/adapters/sql chat"
    with serving(f"{words} --enable-lora --max-loras 1 --virtual-time 1") as server:
        assert [each["id"] for each in server.get("/v1/models")["data"]] == [DENSE, "sql", "chat"]
        idle = 'lora_requests_info{max_lora="1",running_lora_adapters="",waiting_lora_adapters=""}'
        assert idle in server.get("/metrics")
        usages = [
            server.post("/v1/completions", {"model": name, "prompt": [9] * 200, "max_tokens": 1})[1]["usage"]
            for name in (DENSE, "sql", "chat", "sql", "chat", DENSE)
        ]
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in usages] == [0, 0, 0, 192, 192, 192]


def test_metrics_name_the_adapters_that_have_requests() -> None:
    words = "--cluster-config two.json --enable-lora --lora-modules sql --max-loras 3 --virtual-time 2"
    with serving(words) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(
            server.post, "/v1/completions", {"model": "sql", "prompt": [9] * 200, "max_tokens": 400}
        )
        server.post("/v1/completions", {"prompt": [8] * 20, "max_tokens": 2})  # time stands still after it
        told = server.get("/metrics")
        server.post("/virtual_time", {"leave": True})
        assert long.result()[0] == 200
    assert 'lora_requests_info{max_lora="3",running_lora_adapters="sql",waiting_lora_adapters="sql"}' in told


@pytest.mark.parametrize(
    ("words", "told"),
    [("sql", "needs --enable-lora"), ("=x --enable-lora", "NAME=PATH"), ("{} --enable-lora", "{}")],
)
def test_adapters_that_cannot_be_served(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--cluster-config", "two.json", "--lora-modules", *words.split()]) == 2
    assert told in capsys.readouterr().err


def test_requests_are_spread_over_instances() -> None:
    with serving("--cluster-config two.json --virtual-time 2 --request-routing-policy RR") as server:
        call_all(server, [{"prompt": [n + 1] * 20, "max_tokens": 3} for n in range(2)])
        lines = server.get("/metrics").splitlines()
    assert {line for line in lines if line.startswith("vllm:generation_tokens_total")} == {
        f'vllm:generation_tokens_total{{engine="{engine}",model_name="{DENSE}"}} 3.0' for engine in "01"
    }


# ---------------------------------------------------------------------- clients that misbehave


def open_stream(server: Served, tokens: int) -> socket.socket:
    """A streaming call of which the client has read the first bytes."""
    body = json.dumps({"prompt": [3] * 100, "max_tokens": tokens, "stream": True}).encode()
    line = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=300)
    connection.sendall(line.encode() + body)
    assert connection.recv(100)
    return connection


def test_an_aborted_stream_frees_its_blocks() -> None:
    with serving("--cluster-config one.json --speed 0.01") as server:
        streams = [open_stream(server, 1500) for _ in range(20)]
        assert server.get("/servesim")["open"] == 20
        for stream in streams:
            stream.close()
        status = server.wait_until_idle()
        assert status["free_blocks"] == status["usable_blocks"]
        assert status["whole"] == [True]
        assert server.metric("vllm:request_success_total") == 20


def test_too_many_are_refused() -> None:
    with serving("--cluster-config one.json --speed 0.01 --max-open 2 --max-body-mib 1") as server:
        streams = [open_stream(server, 1500) for _ in range(2)]
        status, body = server.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (503, 503)
        for stream in streams:
            stream.close()
        server.wait_until_idle()
        assert server.post("/v1/completions", b"{" + b" " * (2 << 20))[0] == 413


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "object"),
        (b"{}", "prompt"),
        (b'{"prompt": 3}', "prompt"),
        (b'{"prompt": [-1]}', "token ids"),
        (b'{"prompt": [1, true]}', "token ids"),
        (b'{"prompt": [64]}', "below 64"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1e9}', "max_tokens"),
        (b'{"prompt": "a", "n": 1000000}', "n:"),
        (b'{"prompt": "a", "stop": [1]}', "stop"),
        (b'{"prompt": "a", "logprobs": 3}', "logprobs"),
        (b'{"prompt": "a", "min_tokens": 5, "max_tokens": 2}', "min_tokens"),
        (b'{"prompt": "a", "stream": "yes"}', "stream"),
        (b'{"prompt": "a", "model": 7}', "model"),
    ],
)
def test_bad_bodies_are_told(server: Served, body: bytes, named: str) -> None:
    status, told = server.post("/v1/completions", body)
    assert status == 400
    assert named in told["error"]["message"]
    assert set(told["error"]) == {"message", "type", "param", "code"}


def test_only_the_key_opens_the_door() -> None:
    with serving(f"{FAST} --api-key secret") as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong").models.list()
        assert client_of(server, "secret").models.list().data
        assert server.get("/health") == ""


def test_a_sleeping_engine_takes_nothing(server: Served) -> None:
    server.wait_until_idle()
    assert server.post("/sleep")[0] == 200
    assert server.get("/is_sleeping") == {"is_sleeping": True}
    assert server.post("/v1/completions", {"prompt": "a"})[0] == 503
    assert server.post("/wake_up")[0] == 200
    assert server.post("/v1/completions", {"prompt": "a"})[0] == 200


def test_tokens_of_a_text_and_back(server: Served) -> None:
    status, told = server.post("/tokenize", {"prompt": "one two three"})
    assert (status, told["count"]) == (200, 3)
    assert server.post("/detokenize", {"tokens": told["tokens"]})[0] == 200


# ---------------------------------------------------------------------- what is counted


VLLM_NAMES = (Path(__file__).parent / "vllm_metric_names.txt").read_text().split()


def test_metrics_have_vllms_names(server: Served) -> None:
    server.post("/v1/completions", {"prompt": "a b c", "max_tokens": 3})
    families = list(text_string_to_metric_families(server.get("/metrics")))
    names = {family.name for family in families}
    assert len(names) > 25
    known = {name.removeprefix("vllm:") for name in names if not name.endswith("_created")}
    assert known <= set(VLLM_NAMES)
    for family in families:
        for sample in family.samples:
            assert "engine" in sample.labels
            assert sample.labels.get("model_name", DENSE) == DENSE
