"""What each column of the public kernel tables counts, and from what that is known.

The package states no units beside its tables. Each is read from one of:

- *query*: the package's own models ask the table so (``sdk/models``, ``sdk/operations``, ``sdk/common.py``);
- *physics*: over all ten GPUs of ``configs/hardware``, every other reading beats a peak rate of the GPU, its
  memory or its links, or falls far below all of them. ``tests/profiler/test_silicon_columns.py`` repeats it.

Every column that the source reads is listed; one that is not has no known unit and must not be used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """``unit`` is what one counts; ``evidence`` is how that is known."""

    unit: str
    evidence: str


MILLISECONDS = Column(
    "ms",
    "physics: the quickest GEMMs of a GPU reach 0.82 to 0.99 of its bf16 peak rate and 0.87 to 0.99 of "
    "its memory bandwidth when read as ms",
)
COLUMNS: dict[str, dict[str, Column]] = {
    "gemm_perf": {
        "latency": MILLISECONDS,
        "m": Column(
            "rows: tokens of the step", "physics: 2*m*n*k reaches 0.82 to 0.99 of the bf16 peak rate"
        ),
        "n": Column("columns of the result on one GPU", "physics: as m"),
        "k": Column("inner size on one GPU", "physics: as m; n and k apart by the weights' bytes, n*k"),
        "gemm_dtype": Column(
            "dtype of weights and arithmetic",
            "physics: fp8 rows read half the weight bytes at the same 0.8 to 0.95 of the memory bandwidth",
        ),
    },
    "context_attention_perf": {
        "latency": MILLISECONDS,
        "batch_size": Column(
            "sequences of isl tokens each",
            "physics: 2*b*heads*head_dim*isl*(isl+1) reaches 0.58 to 0.80 of the bf16 peak rate",
        ),
        "isl": Column("query tokens of one sequence, all of them new", "physics: as batch_size; causal"),
        "num_heads": Column("query heads on one GPU", "query: heads / tp; physics: as batch_size"),
        "num_key_value_heads": Column("KV heads on one GPU", "query: KV heads / tp, at least one"),
        "head_dim": Column("elements of one head", "physics: as batch_size"),
        "window_size": Column("tokens; 0: the whole context", "query: sliding layers ask with their window"),
        "kv_cache_dtype": Column(
            "dtype of the KV cache", "query; arithmetic too on data-centre Blackwell: 1.16 of the bf16 rate"
        ),
    },
    "generation_attention_perf": {
        "latency": MILLISECONDS,
        "batch_size": Column(
            "sequences of one new token each",
            "physics: b*(step+1) tokens of KV reach 0.85 to 0.98 of the memory bandwidth beyond 4 times L2",
        ),
        "step": Column(
            "tokens in the cache before the new one",
            "query: lengths asked for are isl + step, isl always 1 and step 2^i - 1",
        ),
        "num_heads": Column("query heads on one GPU", "query: heads / tp"),
        "num_key_value_heads": Column("KV heads on one GPU", "query: KV heads / tp; physics: as batch_size"),
        "head_dim": Column("elements of one head", "physics: as batch_size"),
        "window_size": Column("tokens; 0: the whole context", "query: sliding layers ask with their window"),
        "kv_cache_dtype": Column("dtype of the KV cache", "physics: half the bytes at the same bandwidth"),
    },
    "moe_perf": {
        "latency": MILLISECONDS,
        "num_tokens": Column(
            "tokens of all ranks together, each sent to topk experts",
            "physics: 6*tokens*topk*hidden*inter / (tp*ep) reaches up to 0.74 of the peak rate; tokens of "
            "one rank would be 77 times it at moe_ep_size 256",
        ),
        "topk": Column("experts of one token", "physics: as num_tokens"),
        "num_experts": Column(
            "experts of the layer, over all ranks", "query: of the model; physics: weight bytes"
        ),
        "hidden_size": Column("elements of one token", "query: of the model"),
        "inter_size": Column(
            "width of one expert before it is cut in moe_tp_size slices",
            "query: of the model; physics: the slice's width would be 2.3 times the peak rate at tp 4",
        ),
        "moe_tp_size": Column("slices that each expert is cut in", "physics: as inter_size"),
        "moe_ep_size": Column("ranks that share the experts", "physics: as num_tokens"),
        "moe_dtype": Column("dtype of the experts' weights", "query"),
        "distribution": Column("load of the experts, by name", "query: workload_distribution"),
    },
    "custom_allreduce_perf": {
        "latency": MILLISECONDS,
        "num_gpus": Column("ranks", "query: tp"),
        "message_size": Column(
            "elements that one rank brings, of the allreduce_dtype: not bytes",
            "query: 2048 tokens of hidden size 8192 give the row 16777216; physics: as 16-bit elements eight "
            "H100 reach 469 GB/s of bus bandwidth (link 450, with reduction in the switch at most 700), as "
            "bytes none of ten GPUs more than 0.52 of its link; NCCL's table counts alike, and there gathers "
            "of int8 and half take the same time (within 1 %) at the same bytes when read as elements; read "
            "as bytes, half would take 1.8 to 2 times as long",
        ),
        "allreduce_dtype": Column("dtype of an element", "query: comm quant mode half, 2 bytes"),
        "backend": Column("launched one by one (eager) or in a CUDA graph", "query: vLLM asks for graph"),
    },
}
"""Table -> column -> what it counts."""
