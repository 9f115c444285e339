#!/usr/bin/env bash
# Measures one model on this machine's GPU with --source torch in bf16, bf16-kvfp8, fp8 and fp8-kvfp8, in one call.
#
#   benchmarks/measure_gpu.sh                       Llama-3.1-8B, under 10 minutes
#   benchmarks/measure_gpu.sh --budget-s 1500       a finer grid
#   TP=1,2 MODEL=Qwen/Qwen3-32B benchmarks/measure_gpu.sh
#
# Needs PyTorch and flashinfer-python. The bundles go to $OUT/profiler/perf/<GPU>-torch/ and, packed, to
# $OUT/<GPU>-torch.tar.gz; a second call goes on where the first one stopped. What variants have in common is
# measured once: attention depends on the KV format alone, everything else on the weights' alone.
set -euo pipefail

BUDGET_S=540
while [ $# -gt 0 ]; do
  case "$1" in
    --budget-s) BUDGET_S="${2:?--budget-s needs a number of seconds}"; shift 2 ;;
    *) echo "unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
done

MODEL="${MODEL:-meta-llama/Llama-3.1-8B}"
TP="${TP:-1}"
OUT="${OUT:-outputs/measure_gpu}"
DEVICE="${DEVICE:-cuda}"
PYTHON="${PYTHON:-python}"
MAX_NUM_BATCHED_TOKENS="${MAX_NUM_BATCHED_TOKENS:-2048}"
MAX_NUM_SEQS="${MAX_NUM_SEQS:-256}"
MAX_KV="${MAX_KV:-16384}"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"

# "NVIDIA H100 80GB HBM3" -> H100, "NVIDIA RTX PRO 6000 Blackwell Server Edition" -> RTX-PRO-6000
if [ -z "${LABEL:-}" ]; then
  name="$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0)"
  LABEL="$(sed -E 's/^(NVIDIA|Tesla) +//; s/[ -]+([0-9]+ ?GB|Blackwell|Server|Workstation|PCIe|SXM[0-9]?|HBM).*//; s/ +/-/g' <<< "$name")-torch"
fi

started=$SECONDS
# Share of the budget of each variant, in percent: the third measures no attention, the fourth nothing at all.
# Compiling kernels and starting up takes some 30 s a variant, which the shares leave free.
for variant in "bfloat16 auto 34" "bfloat16 fp8 34" "fp8 auto 10" "fp8 fp8 2"; do
  read -r dtype kv share <<< "$variant"
  left=$((BUDGET_S - (SECONDS - started)))
  budget=$((BUDGET_S * share / 100))
  if [ "$budget" -gt "$left" ]; then budget=$left; fi
  if [ "$budget" -lt 1 ]; then budget=1; fi
  echo "== $dtype weights, $kv KV cache: at most $budget s of shots"
  "$PYTHON" -m serving profile "$MODEL" --hardware "$LABEL" --source torch --device "$DEVICE" --tp "$TP" \
    --dtype "$dtype" --kv-cache-dtype "$kv" --budget-s "$budget" \
    --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --max-num-seqs "$MAX_NUM_SEQS" --max-kv "$MAX_KV" \
    --output-root "$OUT/profiler/perf" ${PROFILE_FLAGS:-}
done

tar -C "$OUT" -czf "$OUT/$LABEL.tar.gz" "profiler/perf/$LABEL"
echo "== $OUT/$LABEL.tar.gz after $((SECONDS - started)) s"
