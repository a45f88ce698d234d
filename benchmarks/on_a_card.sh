#!/usr/bin/env bash
# Everything that waits for a card, in one call: builds the CUDA kernels into the source tree, proves
# and tests every GPU backend, then measures parts and whole models. Each step has its own limit and
# log; a step that fails or runs out of time costs that step only.
#
#   benchmarks/on_a_card.sh OUT_DIR [TOTAL_S]
#
# OUT_DIR gets proven.json, the *.jsonl rows and a log for each step. Set PYTHON to choose the
# interpreter, and SKIP="step step" to leave steps out. sanitize.sh is a call of its own.
set -uo pipefail

out=${1:?usage: on_a_card.sh OUT_DIR [TOTAL_S]}
total_s=${2:-560}
python=${PYTHON:-python3}
skip=" ${SKIP:-} "
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD:$PWD/python" PYTHONUNBUFFERED=1
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
failed=0

# step NAME LIMIT_S COMMAND...
step() {
  local name=$1 limit=$2 left=$((total_s - SECONDS)) began=$SECONDS code
  shift 2
  [[ $skip == *" $name "* ]] && return
  ((left < limit)) && limit=$left
  if ((limit < 5)); then
    echo "$name: not run, $total_s s are spent"
    failed=1
    return
  fi
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  ((code == 0)) || failed=1
  echo "$name: exit status $code, $((SECONDS - began)) s: $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c -150)"
}

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
architecture=${capability/./}
[[ $architecture == 90 ]] && architecture=90a
step build 150 "$python" csrc/cuda/build_cuda.py --out dynabert_kernels --architectures "$architecture"
step doctor 30 "$python" -m dynabert_kernels
step prove 120 "$python" -m dynabert_kernels.prove --out "$out/proven.json"
[[ -s $out/proven.json ]] && cp "$out/proven.json" dynabert_kernels/proven.json
step test-gpu 130 "$python" -m pytest -q -p no:cacheprovider -m gpu -n 4 tests
[[ $architecture == 90a ]] &&
  step gpu-cuda 60 "$python" -m benchmarks.gpu_cuda --out "$out/gpu_cuda.jsonl" --commit "$commit"
left=$((total_s - SECONDS - 15))
step bench-gpu "$((left + 15))" "$python" -m benchmarks.bench_gpu --out "$out/gpu.jsonl" \
  --budget-s "$left" --commit "$commit"
echo "$SECONDS s in all"
exit "$failed"
