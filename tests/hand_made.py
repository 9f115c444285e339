"""Run logs written by hand, small enough to check with a pencil."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from servesim.memory.plan import KvCapacity
from servesim.memory.sizing import GIB
from servesim.results.records import InstanceLog, RejectedRequest, RequestRecord, RunLog
from servesim.results.result import Result
from servesim.specs.instance_options import InstanceOptions
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload

MS = 1_000_000


class OneInstance:
    """The step times of one instance of one stage, as a loop asks for them."""

    def __init__(self, steps: Any) -> None:
        self.alone = steps

    def stages_ns(self, batches: Any) -> list[tuple[int, int]]:
        (batch,) = batches
        lengths = batch.num_decodes, batch.kv_sum, batch.kv_min, batch.kv_max
        drafts = getattr(self.alone, "per_token_ns", 0) * batch.draft_tokens
        return [(self.alone.mixed_ns(batch.chunks, *lengths) + drafts, 0)]


def capacity(num_blocks: int = 101, **changes: Any) -> KvCapacity:
    """100 usable blocks of 16 tokens at 1 MiB a token, beside 2 GiB of weights."""
    values: dict[str, Any] = {
        "num_blocks": num_blocks,
        "block_size": 16,
        "bytes_per_token": 1 << 20,
        "bytes_per_block": 16 << 20,
        "kv_bytes": num_blocks * (16 << 20),
        "weight_bytes": 2 * GIB,
        "activation_bytes": GIB,
        "non_torch_bytes": GIB // 4,
        "total_bytes": 8 * GIB,
        "utilization": 0.9,
        "overridden": False,
        "graph_bytes": 0,
        "band_blocks": (num_blocks, num_blocks),
        "engine": "0.11 to 0.20",
    }
    return KvCapacity(**{**values, **changes})


def instance_options(**changes: Any) -> InstanceOptions:
    values: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_dtype": "fp8",
        "kv_dtype": "fp8",
        "variant": "bf16-kvfp8",
        "block_size": 16,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "long_prefill_token_threshold": 2**31 - 1,
        "enable_chunked_prefill": True,
        "reserve_full_isl": True,
        "enable_prefix_caching": True,
        "disable_hybrid_kv_cache_manager": False,
        "async_scheduling": True,
        "enable_local_offloading": False,
        "enable_attn_offloading": False,
        "enable_sub_batch_interleaving": False,
        "enable_block_copy": True,
        "npu_memory_utilization": 0.9,
        "max_model_len": 8192,
    }
    return InstanceOptions(**{**values, **changes})


def instance(index: int = 0, **changes: Any) -> InstanceLog:
    spec: Any = SimpleNamespace(
        model_name="org/tiny",
        hardware="NPU1",
        num_npus=1,
        tp_size=1,
        pp_size=1,
        pd_type=None,
        ep_size=1,
        dp_group=None,
    )
    values: dict[str, Any] = {
        "node": 0,
        "spec": spec,
        "options": instance_options(),
        "capacity": capacity(),
        "bundle_source": "measured by hand",
        "host": "no host",
    }
    return InstanceLog(index=index, **{**values, **changes})


def add_step(log: InstanceLog, start_ms: float, end_ms: float, **columns: int) -> None:
    """One step; columns that are not given are 0."""
    each = [columns.pop(name, 0) for name in log.steps.EACH]
    step = log.steps.append(round(start_ms * MS), round(end_ms * MS), *each)
    for name, value in columns.items():
        getattr(log.steps, name).put(step, value)


def record(
    request: int, arrival_ms: float, token_steps: list[tuple[int, int, int]], log: RunLog, **changes: Any
) -> RequestRecord:
    """A record whose first token and end follow from its runs of steps."""
    ends = [log.instances[number].steps.end_ns for number, _, _ in token_steps]
    values: dict[str, Any] = {
        "instance": token_steps[0][0],
        "queued_ns": round(arrival_ms * MS),
        "scheduled_ns": round(arrival_ms * MS),
        "first_token_ns": ends[0][token_steps[0][1]],
        "end_ns": ends[-1][token_steps[-1][2]],
        "decode_instance": token_steps[-1][0],
    }
    return RequestRecord(
        request=request, arrival_ns=round(arrival_ms * MS), token_steps=token_steps, **{**values, **changes}
    )


def two_requests(*, rejected: bool = False) -> Result:
    """One instance, five steps ending at 10, 20, 32, 42 and 60 ms, and two or three requests.

    Request 0 (100 prompt tokens, arrives at 1 ms) has tokens at 10, 20, 32 and 42 ms. Request 1 (a follow-up
    in a session; 50 prompt tokens, 32 of them in the cache, arrives at 12 ms) has tokens at 20 and 32 ms, is
    preempted, and has its third at 60 ms.
    """
    log = RunLog([instance()], end_ns=60 * MS)
    steps = log.instances[0]
    add_step(steps, 2, 10, prefill_tokens=100, running=1, kv_blocks_used=7, lookup_tokens=100)
    add_step(
        steps,
        12,
        20,
        prefill_tokens=18,
        decode_tokens=1,
        running=2,
        kv_blocks_used=11,
        lookup_tokens=50,
        hit_tokens=32,
    )
    add_step(steps, 20, 32, decode_tokens=2, running=2, kv_blocks_used=11)
    add_step(steps, 32, 42, decode_tokens=1, running=1, waiting=1, kv_blocks_used=7, preempted=1)
    add_step(steps, 42, 60, prefill_tokens=52, running=1, kv_blocks_used=4)
    first = record(0, 1, [(0, 0, 3)], log, scheduled_ns=2 * MS)
    second = record(1, 12, [(0, 1, 2), (0, 4, 4)], log, npu_hit=32, preemptions=1, recomputed_tokens=52)
    log.requests = [first, second]
    requests = [
        Request(0, 100, 4, MS),
        Request(1, 50, 3, 0, session_id="chat, 1", sub_request=1, predecessor=0),
    ]
    if rejected:
        requests.append(Request(2, 9000, 1, 5 * MS))
        log.rejected.append(
            RejectedRequest(2, 0, 5 * MS, "9001 tokens do not fit the context length of 8192")
        )
    return Result(log, Workload(requests, "by hand"), RuntimeOptions(kv_cache_dtype="fp8"))
