#!/usr/bin/env bash
# Runs the test programs of the CUDA kernels under compute-sanitizer: four tools, each on random
# shapes of its own. Ends with 1 where a tool or a comparison with the CPU reports anything.
#
#   sanitize.sh WORK_DIR [PERCENT]
#
# PERCENT scales the number of cases: 100 are 248 on a Hopper card.
set -euo pipefail

work=${1:?usage: sanitize.sh WORK_DIR [PERCENT]}
percent=${2:-100}
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
  fail "no GPU answers nvidia-smi. The kernels need a card of compute capability 8.0 or newer."
[[ $capability =~ ^([89]|1[0-9])\.[0-9]$ ]] ||
  fail "compute capability ${capability:-unknown}, expected 8.0 or newer. Run it on such a card."

# Cases for each tool. The programs of Hopper's kernels run there alone.
declare -A cases=([gemm_sm80_test]=15 [ffn_test]=8 [attention_test]=12)
if [[ $capability == 9.0 ]]; then
  cases+=([gemm_test]=15 [encoder_test]=8 [instructions_test]=4)
fi

mkdir -p "$work"
# A sanitizer slows the kernels down a hundredfold; only a wait of a minute is a hang.
flags=(-std=c++20 -O3 -lineinfo -DDYNABERT_SPIN_LIMIT_NS=60000000000ull)
compile() {
  local architecture=${capability/./}
  case $1 in
    *sm90* | */encoder_cuda.cu | */instructions_test.cu) architecture=90a ;;
  esac
  "$nvcc" "${flags[@]}" "-gencode=arch=compute_$architecture,code=sm_$architecture" \
    -c "$1" -o "$work/$(basename "$1" .cu).o"
}
kernels=()
builds=()
while read -r source; do
  kernels+=("$work/$(basename "$source" .cu).o")
  compile "$source" &
  builds+=($!)
done < <(cd "$tests/../.." && find "$PWD" -name '*.cu' -not -path "$tests/*")
for program in "${!cases[@]}"; do
  compile "$tests/$program.cu" &
  builds+=($!)
done
for build in "${builds[@]}"; do
  wait "$build" || fail "a source does not compile."
done
for program in "${!cases[@]}"; do
  "$nvcc" "$work/$program.o" "${kernels[@]}" -o "$work/$program" || fail "$program does not link."
done
echo "built in $SECONDS s"

seed=0
total=0
failed=0
for tool in memcheck racecheck initcheck synccheck; do
  for program in "${!cases[@]}"; do
    count=$((cases[$program] * percent / 100))
    total=$((total + count))
    seed=$((seed + 1))
    left=$((limit_s - SECONDS))
    log=$work/$tool-$program.log
    began=$SECONDS
    outcome=passed
    if ((left < 1)); then
      outcome="not run: $limit_s s are spent"
      failed=1
    elif ! timeout "$left" "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$work/$program" "$count" "$seed" >"$log" 2>&1; then
      outcome="FAILED, see $log: $(tail -n 1 "$log")"
      failed=1
    fi
    echo "$tool $program: $count cases, seed $seed, $((SECONDS - began)) s: $outcome"
  done
done
((failed == 0)) || fail "at least one run failed or was left out."
echo "$total cases, nothing reported, $SECONDS s"
