#!/bin/bash
# Everything that needs an NVIDIA GPU, in at most eight minutes: tests, compute-sanitizer, benchmarks.
#
#     benchmarks/gpu_check.sh [FOLDER]
#
# Needs a python3 with torch, triton, transformers, pybind11, pytest (and pytest-xdist, if it is to
# be fast), a C++ compiler, and no network. Writes into FOLDER (default: benchmarks/results):
# bench_gpu.json, bench_gpu.txt, gpu_tests.txt and gpu_sanitizer.txt.

set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET
failed=0

step() { printf '\n=== %s (%s s)\n' "$*" "$SECONDS"; }

step "install in place"
timeout 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . ||
  timeout 100 "$PYTHON" setup.py --quiet build_ext --inplace || failed=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
timeout 60 "$PYTHON" -m fastgen info --device cuda || failed=1

step "tests on the GPU"
TESTS=(tests/test_kernel_products.py tests/test_kernel_attention.py tests/test_kernel_sampling.py
  tests/test_decoder_interface.py tests/test_cuda_decoder.py tests/test_cuda.py)
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
timeout 200 "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" "${TESTS[@]}" \
  >"$OUT/gpu_tests.txt" 2>&1 || failed=1
tail -n 15 "$OUT/gpu_tests.txt"

step "compute-sanitizer on small cases"
SMALL=(tests/test_kernel_products.py tests/test_kernel_attention.py -k
  "(linear_with_residual and 3-36-100) or drafts_are_cut or (ragged and 8 and float32)")
: >"$OUT/gpu_sanitizer.txt"
for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    echo "$tool: unavailable (no compute-sanitizer here)" | tee -a "$OUT/gpu_sanitizer.txt"
    continue
  fi
  timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -p no:cacheprovider "${SMALL[@]}" >"$OUT/sanitizer_$tool.log" 2>&1
  case $? in
    0) result="no error" ;;
    9) result="ERRORS, see below" failed=1 ;;
    *) result="unavailable, or cut off (see below)" ;;
  esac
  {
    echo "$tool: $result"
    tail -n 25 "$OUT/sanitizer_$tool.log"
  } >>"$OUT/gpu_sanitizer.txt"
  rm -f "$OUT/sanitizer_$tool.log"
  grep "^$tool:" "$OUT/gpu_sanitizer.txt"
done

step "benchmarks"
timeout 210 "$PYTHON" benchmarks/bench_gpu.py --out "$OUT" ||
  timeout 60 "$PYTHON" benchmarks/bench_gpu.py --out "$OUT" --rounds 3 --without-peers || failed=1

step "done, $([ $failed = 0 ] && echo "all passed" || echo "SOMETHING FAILED")"
exit $failed
