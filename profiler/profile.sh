#!/usr/bin/env bash
# Makes profile bundles: the kernel times that the simulator looks up.
#
#   ./profiler/profile.sh                          weights and KV cache in bf16
#   KV_CACHE_DTYPE=fp8 ./profiler/profile.sh       the -kvfp8 variant
#   MODEL=Qwen/Qwen3-32B TP_DEGREES=1,2 ./profiler/profile.sh
#
# Edit the defaults below, or set any of them in the environment for one run.
set -euo pipefail

MODEL="${MODEL:-meta-llama/Llama-3.1-8B}"   # <org>/<name> below configs/model, or a folder with a config.json
HARDWARE="${HARDWARE:-RTXPRO6000}"          # names configs/hardware/<name>.yaml and the bundle's folder
TP_DEGREES="${TP_DEGREES:-1,2,4,8}"         # tensor-parallel degrees
DTYPE="${DTYPE:-bfloat16}"                  # weights: bfloat16 float16 fp8
KV_CACHE_DTYPE="${KV_CACHE_DTYPE:-auto}"    # KV cache: auto (16 bit) or fp8
SOURCE="${SOURCE:-silicon}"                 # silicon: public kernel measurements, needs no GPU
MAX_NUM_BATCHED_TOKENS="${MAX_NUM_BATCHED_TOKENS:-8192}"   # largest step the bundle should cover
MAX_NUM_SEQS="${MAX_NUM_SEQS:-1024}"        # most sequences of a step
MAX_KV="${MAX_KV:-131072}"                  # longest context
COLLECTIVES="${COLLECTIVES:-auto}"          # auto measured none: see servesim profile --help
OUTPUT_ROOT="${OUTPUT_ROOT:-profiler/perf}"
PYTHON="${PYTHON:-python}"

cd "$(dirname "$0")/.."
exec "$PYTHON" -m serving profile "$MODEL" \
  --hardware "$HARDWARE" --source "$SOURCE" --tp "$TP_DEGREES" \
  --dtype "$DTYPE" --kv-cache-dtype "$KV_CACHE_DTYPE" \
  --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --max-num-seqs "$MAX_NUM_SEQS" --max-kv "$MAX_KV" \
  --collectives "$COLLECTIVES" --output-root "$OUTPUT_ROOT"
