#!/usr/bin/env bash
# Rebuilds every bundle that is committed below profiler/perf. Needs: pip install 'servesim[silicon]'
# With the package version named in the bundles' meta.yaml the result is byte for byte the same.
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-python}" - "${OUTPUT_ROOT:-profiler/perf}" <<'EOF'
import sys
from itertools import product
from pathlib import Path

from servesim.__main__ import main
from servesim.profiler.bundle_writer import share_tables

# One process for all: bundles that share an attention shape share its rows.
LLAMA, LARGE = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
ALL = tuple(product(("bfloat16", "fp8"), ("auto", "fp8")))
SHIPPED = [
    *(("RTXPRO6000", model, "1,2,4,8", ALL) for model in (LLAMA, "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507")),
    *((hardware, LLAMA, "1,2", ALL) for hardware in ("H100", "H200", "B200", "L40S")),
    ("A100", LLAMA, "1,2", (("bfloat16", "auto"),)),  # nothing else was measured there
    *((hardware, LARGE, "2,4,8", ALL) for hardware in ("H100", "H200")),
    *(("H100", model, "1,2", ALL[:2]) for model in ("Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B")),
    *((hardware, "openai/gpt-oss-20b", "1,2", ALL[:2]) for hardware in ("H100", "H200", "B200")),
    *((hardware, "openai/gpt-oss-120b", "1,2", ALL[:2]) for hardware in ("H100", "H200", "B200")),
]
LIMITS = ["--max-num-batched-tokens", "8192", "--max-num-seqs", "1024", "--max-kv", "131072", "--force"]
for hardware, model, degrees, variants in SHIPPED:
    for dtype, kv_cache_dtype in variants:
        options = ["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype, "--tp", degrees, "--output-root", sys.argv[1]]
        if status := main(["profile", model, "--hardware", hardware, "--source", "silicon", *options, *LIMITS]):
            sys.exit(status)
share_tables(Path(sys.argv[1]))
EOF
