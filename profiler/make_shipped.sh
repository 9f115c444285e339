#!/usr/bin/env bash
# Rebuilds every bundle that is committed below profiler/perf. Needs: pip install 'servesim[silicon]'
# With the package version named in the bundles' meta.yaml the result is byte for byte the same.
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-python}" - "${OUTPUT_ROOT:-profiler/perf}" <<'EOF'
import sys
from itertools import product

from serving.__main__ import main

# One process for all: bundles that share an attention shape share its rows.
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507")
LIMITS = ["--max-num-batched-tokens", "8192", "--max-num-seqs", "1024", "--max-kv", "131072"]
for model, dtype, kv_cache_dtype in product(MODELS, ("bfloat16", "fp8"), ("auto", "fp8")):
    options = ["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype, "--tp", "1,2,4,8", "--output-root", sys.argv[1]]
    if status := main(["profile", model, "--hardware", "RTXPRO6000", "--source", "silicon", *options, *LIMITS]):
        sys.exit(status)
EOF
