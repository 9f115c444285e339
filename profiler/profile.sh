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
MAX_KV="${MAX_KV:-${ATTENTION_MAX_KV:-131072}}"            # longest context
COLLECTIVES="${COLLECTIVES:-auto}"          # auto measured none: see servesim profile --help
OUTPUT_ROOT="${OUTPUT_ROOT:-profiler/perf}"
PYTHON="${PYTHON:-python}"

# Settings of measurements (SOURCE=vllm or torch); those of a source that measures nothing are refused.
#   MEASUREMENT_ITERATIONS=5       rounds of a shot
#   FORCE=1                        measure again what is there, replace a bundle of another source
#   ONLY_SKEW=1                    only the sweep of decodes of unequal length; the other tables stay
#   SKIP_SKEW=1 SKIP_DENSE=1 …     leave a table out: DENSE, PER_SEQUENCE, ATTENTION, MOE, SKEW
#   ATTENTION_CHUNK_FACTOR, ATTENTION_DECODE_FACTOR, ATTENTION_KV_FACTOR, SKEW_FACTOR=2.0   growth of the axes
TABLES=(dense per_sequence attention moe skew)

on() {  # whether the setting is switched on; anything but a switch is refused
  local value="${!1:-}"
  case "${value,,}" in
    1 | true | yes | on) return 0 ;;
    "" | 0 | false | no | off) return 1 ;;
    *) echo "error: $1=$value is not allowed; must be 1 or 0" >&2; exit 2 ;;
  esac
}

KNOWN=" ONLY_SKEW SKEW_FACTOR ATTENTION_MAX_KV ATTENTION_CHUNK_FACTOR ATTENTION_DECODE_FACTOR ATTENTION_KV_FACTOR "
for name in $(compgen -e); do
  case "$name" in
    VARIANT)
      echo "error: VARIANT=${!name}: the folder's name follows from DTYPE and KV_CACHE_DTYPE; set those" >&2
      exit 2 ;;
    SKIP_DENSE | SKIP_PER_SEQUENCE | SKIP_ATTENTION | SKIP_MOE | SKIP_SKEW) ;;
    SKIP_* | ONLY_* | ATTENTION_* | SKEW_*)
      if [[ "$KNOWN" != *" $name "* ]]; then
        echo "error: $name=${!name} has no effect here; known:${KNOWN}and SKIP_<TABLE>" >&2
        exit 2
      fi ;;
  esac
done

FLAGS=()
on FORCE && FLAGS+=(--force)
[[ -n "${MEASUREMENT_ITERATIONS:-}" ]] && FLAGS+=(--iterations "$MEASUREMENT_ITERATIONS")
[[ -n "${ATTENTION_CHUNK_FACTOR:-}" ]] && FLAGS+=(--chunk-factor "$ATTENTION_CHUNK_FACTOR")
[[ -n "${ATTENTION_DECODE_FACTOR:-}" ]] && FLAGS+=(--decode-factor "$ATTENTION_DECODE_FACTOR")
[[ -n "${ATTENTION_KV_FACTOR:-}" ]] && FLAGS+=(--kv-factor "$ATTENTION_KV_FACTOR")
[[ -n "${SKEW_FACTOR:-}" ]] && FLAGS+=(--skew-factor "$SKEW_FACTOR")
if on ONLY_SKEW; then
  FLAGS+=(--only skew)
else
  KEPT=()
  for table in "${TABLES[@]}"; do
    on "SKIP_${table^^}" || KEPT+=("$table")
  done
  if ((${#KEPT[@]} == 0)); then
    echo "error: every table is skipped; leave one" >&2
    exit 2
  elif ((${#KEPT[@]} < ${#TABLES[@]})); then
    for table in "${KEPT[@]}"; do
      FLAGS+=(--only "$table")
    done
  fi
fi

cd "$(dirname "$0")/.."
exec "$PYTHON" -m serving profile "$MODEL" \
  --hardware "$HARDWARE" --source "$SOURCE" --tp "$TP_DEGREES" \
  --dtype "$DTYPE" --kv-cache-dtype "$KV_CACHE_DTYPE" \
  --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --max-num-seqs "$MAX_NUM_SEQS" --max-kv "$MAX_KV" \
  --collectives "$COLLECTIVES" --output-root "$OUTPUT_ROOT" ${FLAGS[@]+"${FLAGS[@]}"}
