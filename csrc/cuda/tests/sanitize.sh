#!/usr/bin/env bash
# Runs the test programs of the CUDA kernels under compute-sanitizer: four tools, each on random
# shapes of its own. Ends with 1 where a tool or a comparison with the CPU reports anything.
#
#   sanitize.sh WORK_DIR [PRODUCTS [ENCODERS]]
#
# PRODUCTS and ENCODERS are the cases for each tool: 35 and 18 make 212 in all.
set -euo pipefail

work=${1:?usage: sanitize.sh WORK_DIR [PRODUCTS [ENCODERS]]}
products=${2:-35}
encoders=${3:-18}
limit_s=540
tests=$(cd "$(dirname "$0")" && pwd)
toolkit=${CUDA_HOME:-/usr/local/cuda}

fail() {
  echo "sanitize-gpu: $*" >&2
  exit 1
}
find_tool() {
  command -v "$1" || { [[ -x $toolkit/bin/$1 ]] && echo "$toolkit/bin/$1"; } ||
    fail "$1 not found on PATH or in $toolkit/bin. Install the CUDA toolkit or set CUDA_HOME."
}

nvcc=$(find_tool nvcc)
sanitizer=$(find_tool compute-sanitizer)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) ||
  fail "no GPU answers nvidia-smi. The kernels need a card of compute capability 9.0."
[[ $capability == 9.0 ]] ||
  fail "compute capability ${capability:-unknown}, expected 9.0. Run it on an H100, H200 or GH200."

mkdir -p "$work"
# A sanitizer slows the kernels down a hundredfold; only a wait of a minute is a hang.
flags=(-std=c++20 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a
  -DDYNABERT_SPIN_LIMIT_NS=60000000000ull)
"$nvcc" "${flags[@]}" "$tests"/gemm_test.cu "$tests"/../gemm_sm90.cu -o "$work/gemm_test" &
first=$!
"$nvcc" "${flags[@]}" "$tests"/encoder_test.cu "$tests"/../../encoder/encoder_cuda.cu \
  -o "$work/encoder_test" &
wait $first || fail "gemm_test does not compile."
wait $! || fail "encoder_test does not compile."
echo "built in $SECONDS s"

seed=0
failed=0
for tool in memcheck racecheck initcheck synccheck; do
  for program in gemm_test encoder_test; do
    cases=$([[ $program == gemm_test ]] && echo "$products" || echo "$encoders")
    seed=$((seed + 1))
    left=$((limit_s - SECONDS))
    log=$work/$tool-$program.log
    began=$SECONDS
    outcome=passed
    if ((left < 1)); then
      outcome="not run: $limit_s s are spent"
      failed=1
    elif ! timeout "$left" "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$work/$program" "$cases" "$seed" >"$log" 2>&1; then
      outcome="FAILED, see $log: $(tail -n 1 "$log")"
      failed=1
    fi
    echo "$tool $program: $cases cases, seed $seed, $((SECONDS - began)) s: $outcome"
  done
done
((failed == 0)) || fail "at least one run failed or was left out."
echo "$((4 * (products + encoders))) cases, nothing reported, $SECONDS s"
