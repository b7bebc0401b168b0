#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu/run.sh [part ...]
#
#   build      whether a library that is there loads; else builds in place
#   tests      pytest -m gpu
#   sanitizer  compute-sanitizer memcheck, racecheck and synccheck over small cases
#   attention select pages decode
#              the benchmarks, with their peers
#   report     results.json and results.md of what the benchmarks left
#
# Without an argument all of them, in this order. Each ends within nine minutes and keeps what it has by then; one that
# fails does not stop the next, but the exit status says so. Works offline. Variables:
#
#   OUT              folder of logs and results (default bench/results/local/gpu)
#   PYTHON           interpreter with torch, triton, transformers and pytest (default python3)
#   FLASHINFER_SITE  folder of packages to add to the path: flashinfer-python and what it imports
#   COMMIT           what to write down as the commit where git cannot say
#   ONLY             only benchmark cases whose name contains this
#   RESUME           1: keep the cases an earlier run has left in OUT, and go on with the others
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PARTS=(build tests sanitizer attention select pages decode report)
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/local/gpu}")
CACHE=${TMPDIR:-/tmp}/treedecode-gpu-cache
LIMIT=540  # seconds
mkdir -p "$OUT" "$CACHE"

# Where the toolkit is, it may still not be on PATH.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
# Compilers' caches outlive a part, so that the next one finds them; none is in the tree.
export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor FLASHINFER_WORKSPACE_BASE=$CACHE/flashinfer
export HYPOTHESIS_STORAGE_DIRECTORY=$CACHE/hypothesis PYTHONPYCACHEPREFIX=$CACHE/python HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE  # FlashInfer alone takes a minute to compile
export PYTHONPATH=$PWD${FLASHINFER_SITE:+:$FLASHINFER_SITE}${PYTHONPATH:+:$PYTHONPATH}

usage() {
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

# limited SECONDS LOG COMMAND ...: the command's output goes to the screen and to a log
limited() {
  local seconds=$1 log=$OUT/$2
  shift 2
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    echo "ended by its time limit of $seconds s" | tee -a "$log"
  fi
  return "$status"
}

part_build() {
  if limited 120 load.log "$PYTHON" -m bench.gpu.library && [ ! -d build/inplace ]; then
    echo "nothing to build: the libraries that are here load"
    return 0
  fi
  limited "$((LIMIT - 120))" build.log "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m treedecode.collect_env
}

part_tests() {
  # Most of the time goes into compiling Triton kernels; and an illegal access takes down one worker, not all.
  local workers=()
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  limited "$LIMIT" tests.log "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider --tb=short --durations=10 "${workers[@]}" \
    "--junitxml=$OUT/tests.xml" tests/test_gpu_*.py tests/test_cuda_*.py
}

part_sanitizer() {
  local status=0 backend tool
  : >"$OUT/sanitizer.txt"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH" | tee "$OUT/sanitizer.txt"
    return 1
  fi
  # Compiled before any tool looks on, so that its time goes into the kernels.
  limited 80 sanitize.log "$PYTHON" -m bench.gpu.sanitize || status=1
  for tool in memcheck racecheck synccheck; do
    for backend in cuda triton; do
      # Without PyTorch's cache every tensor is an allocation of its own, and an access beyond it is seen.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 75 "sanitizer-$tool-$backend.log" compute-sanitizer --tool "$tool" \
        --error-exitcode 9 "$PYTHON" -m bench.gpu.sanitize --backend "$backend" || status=1
      echo "$tool, $backend: $(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY|time limit' "$OUT/sanitizer-$tool-$backend.log" |
        sed 's/^=* *//' | paste -sd' ' | grep . || echo 'no summary')" | tee -a "$OUT/sanitizer.txt"
    done
  done
  return "$status"
}

benchmark() {
  limited "$LIMIT" "$1.log" "$PYTHON" -m "bench.gpu.$1" --out "$OUT" --seconds "$((LIMIT - 60))" \
    ${COMMIT:+"--commit=$COMMIT"} ${ONLY:+"--only=$ONLY"} ${RESUME:+--resume}
}

part_attention() { benchmark attention; }
part_select() { benchmark select; }
part_pages() { benchmark pages; }
part_decode() { benchmark decode; }
part_report() { limited 60 report.log "$PYTHON" -m bench.gpu.report --out "$OUT"; }

for part in "$@"; do
  case " ${PARTS[*]} " in
    *" $part "*) ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
done

[ $# -gt 0 ] || set -- "${PARTS[@]}"
failed=()
for part in "$@"; do
  echo "== $part"
  "part_$part" || failed+=("$part")
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
