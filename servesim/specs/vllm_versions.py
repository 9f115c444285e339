"""Versions of vLLM that can be followed, and in what they differ as far as a simulation goes.

Only what was found in a version's own behaviour stands here: its scheduler driven over the goldens
(docs/parity.md), and its defaults for a server. ``python -m servesim.specs.vllm_versions`` lists it. The
memory plan has a table of its own, :mod:`servesim.memory.engine_memory`.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from servesim.slotted import dataclass

VllmVersion = Literal["0.24", "0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33"]
VERSIONS: tuple[VllmVersion, ...] = get_args(VllmVersion)
"""Oldest first."""
NEWEST: VllmVersion = "0.33"
"""The newest that goldens were recorded with; the default."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that vLLM does from a version on."""

    since: VllmVersion
    what: str

    def holds(self, version: VllmVersion) -> bool:
        """Whether ``version`` does so."""
        return VERSIONS.index(version) >= VERSIONS.index(self.since)


LONE_PREFILL = Difference(
    "0.31", "long_prefill_token_threshold does not bind while a single request is waiting or running"
)
LARGE_GPU_BATCHES = Difference("0.28", "servers on GPUs of 160 GiB or more take 16384 tokens a step")
COUNTS_VICTIMS = Difference(
    "0.28", "by priority, preempting a request that was not served before does not pass another one over"
)
SERVES_ON = Difference(
    "0.33", "by priority, the others are still served in a step in which a request preempts itself"
)
SETTLED_FREES = Difference(
    "0.28",
    "blocks behind a window are kept until the steps that read them have ended (0.25 to 0.27: unknown)",
)
STATE_STOPS = Difference(
    "0.28",
    "prefixes of models with states are cached by default, and chunks of a prompt end at every boundary of "
    "a state (0.25 to 0.27: unknown)",
)
SPARSE_WINDOWS = Difference(
    "0.33",
    "of windows and states, the prefix cache keeps those at the end of a prompt (0.29 to 0.32: unknown)",
)
SLOTS_BY_REQUEST = Difference(
    "0.28",
    "with speculative decoding, a draft model's slots are taken from the budget by the requests of the step, "
    "and a request admitted with one token to compute is padded to the others' drafts (0.25 to 0.27: "
    "unknown)",
)
LOOKAHEAD_HASHES = Difference(
    "0.33",
    "with speculative decoding, the identity of a block covers the token behind it, where before the last "
    "cached block was computed again; accepted tokens are cached at once (0.29 to 0.32: unknown)",
)
V2_NGRAM = Difference(
    "0.33",
    "n-gram drafts go with asynchronous scheduling, which they switch off before (0.29 to 0.32: unknown)",
)
AWAITS_BATCHES = Difference(
    "0.28",
    "in a pipeline, a request preempted while a batch in flight computes for it is admitted again only after "
    "that (0.25 to 0.27: unknown); before, simulated for chunks of prompts only, not where a token is due",
)
ONE_QUEUE = Difference(
    "0.33",
    "a preempted request comes before those that were passed over, for max_loras or since a batch of a "
    "pipeline still computed for them; before, these have a queue of their own (0.29 to 0.32: unknown)",
)
HOLDERS_FIRST = Difference(
    "0.33",
    "requests that hold blocks while a connector reads their KV come before all others that wait; before, "
    "they keep their places (0.29 to 0.32: unknown)",
)
SPARES_FLYING = Difference(
    "0.33",
    "where a connector reads KV, a running request is not preempted while a step in flight computes for it; "
    "before, it is, although its blocks are free only after that step (0.29 to 0.32: unknown)",
)
LOCAL_CADENCE = Difference(
    "0.33", "prefill_schedule_interval acts on every engine, not only on data-parallel groups with experts"
)
RUNNING_LORAS = Difference(
    "0.33",
    "max_loras counts the adapters of all running requests, where before it counted those of the step (0.29 "
    "to 0.32: unknown)",
)
ACTIVE_SEQS = Difference("0.31", "max_num_active_seqs limits the running requests below max_num_seqs")
ADAPTIVE_THRESHOLD = Difference(
    "0.31", "long_prefill_token_threshold_adaptive raises the threshold where few requests share a step"
)
LONG_THRESHOLD = Difference("0.27", "a long_prefill_token_threshold above max_model_len is refused")
SINCE = {"max_num_active_seqs": ACTIVE_SEQS, "long_prefill_token_threshold_adaptive": ADAPTIVE_THRESHOLD}
"""Option -> the version from which on it is there."""
QUEUE_LIMITS = Difference("0.29", "max_num_queued_reqs and max_num_queued_tokens turn requests away")
CUTS_ANSWERS = Difference(
    "0.32", "servers cut an answer that would not fit max_model_len; before, they refuse its request"
)
DIFFERENCES = (
    *(LONE_PREFILL, LARGE_GPU_BATCHES, COUNTS_VICTIMS, SERVES_ON),
    *(SETTLED_FREES, STATE_STOPS, SPARSE_WINDOWS, SLOTS_BY_REQUEST, LOOKAHEAD_HASHES),
    *(V2_NGRAM, RUNNING_LORAS, AWAITS_BATCHES, ONE_QUEUE, HOLDERS_FIRST, SPARES_FLYING),
    *(LOCAL_CADENCE, ACTIVE_SEQS, ADAPTIVE_THRESHOLD, CUTS_ANSWERS, LONG_THRESHOLD, QUEUE_LIMITS),
)


def minor_version(text: object) -> object:
    """``v0.33.1`` and ``0.33.1`` -> ``0.33``; anything else as it is."""
    match = re.fullmatch(r"v?(\d{1,3}\.\d{1,3})(\.\d{1,3})?", text) if isinstance(text, str) else None
    return match[1] if match else text


_EXPERTS_BY_CHUNK = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "kimi_k2"),
    *("gpt_oss", "granitemoe", "llama4", "llama4_text", "nemotron_h"),
    *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_vl_moe_text"),
)


def experts_by_chunk(model_type: str, tp: int, ep: int) -> bool:
    """Whether each of ``tp`` ranks takes its own chunk of the member's tokens to ``ep`` ranks of experts.

    vLLM does so where members of several ranks share experts (``ParallelConfig.use_sequence_parallel_moe``),
    in the models whose blocks ask for it (in 0.24 and in 0.28 the same ones); other models exchange whole
    batches between ranks of the same number, and all-reduce what the experts give.
    """
    return 1 < tp < ep and model_type in _EXPERTS_BY_CHUNK


_EARLY_V2 = ("llama", "mistral", "qwen3", "qwen2_moe", "deepseek_v2", "granitemoe")
_V2_MOE = ("qwen2_moe", "deepseek_v2", "deepseek_v4", "granitemoe", "kimi_k3")


def runs_v2(version: VllmVersion, model_type: str, *, moe: bool) -> bool:
    """Whether this version runs a model with its second model runner if nobody asks for one.

    That one prepares inputs on the GPU, so that a step with a prefill chunk does not wait for the host. As
    ``VllmConfig.use_v2_model_runner`` decides in 0.24, 0.28 and 0.33; others go by the one before them.
    """
    position = VERSIONS.index(version)
    if position < VERSIONS.index("0.28"):
        return model_type in _EARLY_V2
    if position < VERSIONS.index("0.33"):
        return model_type in _V2_MOE or not moe
    return True


def table() -> str:
    """All differences, the oldest first: a version and what vLLM does since, in lines of 110 characters."""
    from textwrap import wrap

    rows = sorted(DIFFERENCES, key=lambda difference: VERSIONS.index(difference.since))
    return "\n".join(
        f"{row.since if number == 0 else '':5} {line}"
        for row in rows
        for number, line in enumerate(wrap(row.what, 104))
    )


if __name__ == "__main__":
    print(table())
