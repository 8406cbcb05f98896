#!/bin/bash
# Everything that needs an NVIDIA GPU, in at most eight minutes: tests, compute-sanitizer, benchmarks.
#
#     benchmarks/gpu_check.sh [FOLDER]
#
# Needs a python3 with torch, triton, transformers, ml_dtypes, pybind11, pytest, pytest-timeout, scipy
# (and pytest-xdist, if it is to be fast), a C++ compiler, and no network. Writes into FOLDER (default:
# benchmarks/results): bench_gpu.json and bench_gpu.txt, as they grow, gpu_tests.txt and
# gpu_sanitizer.txt.

set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET
failed=0

# left SECONDS: how long a part may take, at most what is left of eight minutes.
left() { local rest=$((475 - SECONDS)); echo $((rest < 5 ? 5 : rest < $1 ? rest : $1)); }
step() { printf '\n=== %s (%s s)\n' "$*" "$SECONDS"; }

"$PYTHON" - <<'END' || exit 2
import importlib.util as u
import shutil, sys
names = "torch triton transformers ml_dtypes pybind11 pytest pytest_timeout scipy".split()
missing = [f"the Python package {name}" for name in names if u.find_spec(name) is None]
missing += [] if shutil.which("g++") or shutil.which("clang++") else ["a C++ compiler"]
if not any("torch" in what for what in missing):
    import torch
    if not torch.cuda.is_available():
        missing.append(f"an NVIDIA GPU that torch {torch.__version__} can use")
for what in missing:
    print(f"gpu_check: {what} is missing", file=sys.stderr)
sys.exit(bool(missing))
END

step "install in place"
timeout 90 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . ||
  { timeout 80 "$PYTHON" setup.py --quiet build_ext --inplace &&
    ln -sfn ../kernels fastgen/kernels; } || failed=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
timeout "$(left 40)" "$PYTHON" -m fastgen info --device cuda || failed=1

step "tests on the GPU"
TESTS=(tests/kernels/test_products.py tests/kernels/test_attention.py tests/kernels/test_sampling.py
  tests/decoders/test_interface.py tests/decoders/test_cuda_decoder.py tests/decoders/test_run_ahead.py
  tests/decoders/test_cuda_warmup.py tests/decoders/test_cuda.py)
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
timeout "$(left 170)" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider "${parallel[@]}" "${TESTS[@]}" \
  >"$OUT/gpu_tests.txt" 2>&1 || failed=1
tail -n 15 "$OUT/gpu_tests.txt"

step "compute-sanitizer on small cases"
CHOSEN="(linear_with_residual and 36 and float32) or (test_qkv and 3-7 and float32)"
CHOSEN+=" or (test_head and 64 and float32) or test_norm or drafts_are_cut or grown_table"
SMALL=(tests/kernels/test_products.py tests/kernels/test_attention.py tests/kernels/test_sampling.py
  -k "$CHOSEN")
: >"$OUT/gpu_sanitizer.txt"
for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    echo "$tool: unavailable (no compute-sanitizer here)" | tee -a "$OUT/gpu_sanitizer.txt"
    continue
  fi
  timeout "$(left 40)" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -p no:cacheprovider "${SMALL[@]}" >"$OUT/sanitizer_$tool.log" 2>&1
  case $? in
    0) result="no error" ;;
    1 | 9) result="ERRORS, see below" failed=1 ;;
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
PYTHONPATH=$PWD/benchmarks:$PYTHONPATH timeout "$(left 300)" "$PYTHON" benchmarks/bench_gpu.py \
  --out "$OUT" >"$OUT/bench_gpu.log" 2>&1
case $? in
  0) rm "$OUT/bench_gpu.log" ;;
  124) echo "cut off: what there is" ;;
  *) failed=1 && tail -n 20 "$OUT/bench_gpu.log" ;;
esac
[ ! -f "$OUT/bench_gpu.txt" ] || cat "$OUT/bench_gpu.txt"

step "done, $([ $failed = 0 ] && echo "all passed" || echo "SOMETHING FAILED")"
exit $failed
