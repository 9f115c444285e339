"""``python tests/server/events_by_vllm.py ADDRESS``: read KV events with vLLM's own classes, where it is
installed, and say what came. ADDRESS is that of ``servesim serve --kv-events-replay``.
"""

from __future__ import annotations

import sys
from collections import Counter

import msgspec
import zmq
from vllm.distributed.kv_events import KVEventBatch


def main(address: str) -> None:
    """Ask for all batches from number 0 on."""
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    with zmq.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.connect(address)
        asking.send_multipart((b"", (0).to_bytes(8, "big")))
        found: Counter[str] = Counter()
        while (frames := asking.recv_multipart())[-1]:
            batch = decode(frames[-1])
            found.update(type(event).__name__ for event in batch.events)
            found["batches"] += 1
    print(dict(found))


if __name__ == "__main__":
    main(sys.argv[1])
