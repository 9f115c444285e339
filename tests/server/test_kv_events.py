"""What the emulated server publishes of its prefix caches, read with classes laid out as vLLM's."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq

from servesim.__main__ import main
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world
from tests.server.serving import serving

if TYPE_CHECKING:
    from collections.abc import Iterator


class Event(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM 0.33's events are structs with their class name as a tag."""


class BlockStored(Event):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    group_idx: int | None = None


class BlockRemoved(Event):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


DECODE = msgspec.msgpack.Decoder(Batch).decode


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        cluster = toy_cluster([toy_instance(num_gpu_blocks=41)])
        (root / "tight.json").write_text(json.dumps(cluster))
        yield


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def replayed(port: int, first: int) -> list[Batch]:
    """Batches from number ``first`` on, as the replay socket gives them."""
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.RCVTIMEO, 20_000)
        asking.connect(f"tcp://127.0.0.1:{port}")
        asking.send(first.to_bytes(8, "big"))
        batches = []
        frames = asking.recv_multipart()
        # a REQ socket drops further replies, so numbers are asked for one by one
        while frames[-1]:
            batches.append(DECODE(frames[-1]))
            asking.close(linger=0)
            return [*batches, *replayed(port, first + 1)]
        return batches


def test_events_add_up_to_the_cache() -> None:
    """Replaying stores and removals gives what the server still hits."""
    events, replay = free_port(), free_port()
    words = f"--cluster-config tight.json --speed 1000 --kv-events tcp://127.0.0.1:{events}"
    with serving(f"{words} --kv-events-replay tcp://127.0.0.1:{replay}") as server:
        for first in (1, 2, 3, 4, 1):
            body = {"prompt": [first] * 200, "max_tokens": 30}
            assert server.post("/v1/completions", body)[0] == 200
        server.wait_until_idle()
        batches = replayed(replay, 0)
        held: dict[Any, tuple[Any, list[int]]] = {}
        for batch in batches:
            assert batch.data_parallel_rank == 0
            for event in batch.events:
                if isinstance(event, BlockStored):
                    before = event.parent_block_hash
                    assert before is None or before in held
                    assert len(event.token_ids) == 16 * len(event.block_hashes)
                    for place, number in enumerate(event.block_hashes):
                        held[number] = before, event.token_ids[16 * place : 16 * place + 16]
                        before = number
                elif isinstance(event, BlockRemoved):
                    for number in event.block_hashes:
                        del held[number]
        hits = server.post("/v1/completions", {"prompt": [1] * 200, "max_tokens": 1})[1]["usage"]
        first_block = next(
            number for number, (before, ids) in held.items() if before is None and ids == [1] * 16
        )
        chain, known = 0, first_block
        while known is not None:
            chain += 1
            known = next(
                (n for n, (before, ids) in held.items() if before == known and ids == [1] * 16), None
            )
        assert hits["prompt_tokens_details"]["cached_tokens"] == min(chain * 16, 192)
        server.wait_until_idle()
        assert server.post("/reset_prefix_cache")[0] == 200
        assert isinstance(replayed(replay, len(batches))[-1].events[-1], AllBlocksCleared)


def test_subscribers_get_what_happens() -> None:
    port = free_port()
    with (
        serving(f"--cluster-config tight.json --speed 1000 --kv-events tcp://127.0.0.1:{port}") as server,
        zmq.Context() as context,
        context.socket(zmq.SUB) as told,
    ):
        told.setsockopt(zmq.RCVTIMEO, 500)
        told.connect(f"tcp://127.0.0.1:{port}")
        told.subscribe(b"")
        for attempt in range(40):  # a subscription takes a while to arrive
            server.post("/v1/completions", {"prompt": [5] * (40 + attempt), "max_tokens": 1})
            try:
                topic, number, payload = told.recv_multipart()
            except zmq.Again:
                server.post("/reset_prefix_cache")
                continue
            break
        assert (topic, len(number)) == (b"", 8)
        assert DECODE(payload).events


def test_events_name_the_adapter() -> None:
    replay = free_port()
    words = f"--kv-events tcp://127.0.0.1:{free_port()} --kv-events-replay tcp://127.0.0.1:{replay}"
    lora = "--enable-lora --lora-modules chat sql"
    with serving(f"--cluster-config tight.json --speed 1000 {words} {lora}") as server:
        for name, salt in (("sql", ""), ("sql", "mine"), (None, "mine")):
            body = {"prompt": [7] * 40, "max_tokens": 1, "cache_salt": salt}
            server.post("/v1/completions", body | ({"model": name} if name else {}))
        server.wait_until_idle()
        stored = [event for batch in replayed(replay, 0) for event in batch.events]
    assert all(isinstance(event, BlockStored) for event in stored)
    assert [(event.lora_id, event.lora_name) for event in stored] == [(2, "sql"), (2, "sql"), (None, None)]
    assert len({event.block_hashes[0] for event in stored}) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--kv-events-replay tcp://127.0.0.1:1", "--kv-events-replay"),
        ("--kv-events nonsense", "--kv-events nonsense"),
        ('--speculative-config {"method":"ngram","num_speculative_tokens":3}', "--speculative-config"),
        ("--speed 0", "--speed"),
        ("--speed 2 --virtual-time 3", "--speed"),
        ("--virtual-time 0", "--virtual-time"),
        ("--port 70000", "--port"),
        ("--tokenizer nowhere", "--tokenizer"),
        ("--output-tokens nonsense", "--output-tokens"),
        ("--host not.a.host.invalid", "--host"),
    ],
)
def test_flags_that_cannot_be(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--cluster-config", "tight.json", *words.split()]) == 2
    assert named in capsys.readouterr().err
