#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu/run.sh [part[:seconds] ...]
#
#   build      whether the libraries that are there load; builds in place what does not
#   tests      pytest -m gpu, Triton's kernels last
#   sanitizer  compute-sanitizer memcheck, racecheck and synccheck over small cases
#   attention select pages decode
#              the benchmarks, with their peers
#   report     results.json and results.md of what the benchmarks left
#
# Without an argument all of them, in this order. Each ends within nine minutes, or its own limit, and keeps what it has
# by then; one that fails does not stop the next, but the exit status says so. A kernel that hangs or breaks the device
# ends its process, and the rest goes on in a new one. Works offline. All that tells most, in ten minutes:
#
#   BUDGET=585 SKIP=compiled,FlexAttention bench/gpu/run.sh build:90 tests:170 attention:110 decode:110 select:50 \
#     pages:40 report
#
# Variables:
#
#   BUDGET           seconds for all parts together; those that come last have what is left
#   OUT              folder of logs and results (default bench/results/local/gpu)
#   ARCHIVE          a .tar.gz of that folder, written after every part
#   PYTHON           interpreter with torch, triton, transformers and pytest (default python3)
#   FLASHINFER_SITE  folder of packages to add to the path: flashinfer-python and what it imports
#   COMMIT           what to write down as the commit where git cannot say
#   TESTS            only tests that match this expression (pytest -k)
#   ONLY             only benchmark cases whose name contains this
#   SKIP             not the contestants whose name contains one of these, separated by commas
#   RESUME           1: keep the cases an earlier run has left in OUT, and go on with the others
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PARTS=(build tests sanitizer attention select pages decode report)
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/local/gpu}")
CACHE=${TMPDIR:-/tmp}/treedecode-gpu-cache
LIMIT=540  # seconds, of a part; less where there is less of BUDGET
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
  local seconds=$(($1 > 0 ? $1 : 1)) log=$OUT/$2  # 0 would be no limit
  shift 2
  # An interrupt first: pytest then says what it has found.
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    echo "ended by its time limit of $seconds s" | tee -a "$log"
  fi
  return "$status"
}

part_build() {
  local end=$((SECONDS + LIMIT)) suffix includes
  if limited "$LIMIT" load.log "$PYTHON" -m bench.gpu.library && [ ! -d build/inplace ]; then
    echo "nothing to build: the libraries that are here load"
    return 0
  fi
  # Libraries of ops serve every Python; the module beside them is bound to a version of it, and compiles in seconds.
  if [ ! -d build/inplace ] && [ "$(grep -cE '^_(ops|cuda)\.so loads .*yes$' "$OUT/load.log")" = 2 ]; then
    suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    includes=$("$PYTHON" -m pybind11 --includes)
    # shellcheck disable=SC2086  # several options
    if limited "$((end - SECONDS))" build.log "${CXX:-c++}" -O3 -DNDEBUG -std=c++20 -shared -fPIC -fvisibility=hidden \
      $includes csrc/host/*.cpp -o "treedecode/_host$suffix"; then
      "$PYTHON" -m treedecode.cli info
      return
    fi
  fi
  limited "$((end - SECONDS))" build.log "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -m treedecode.cli info
}

part_tests() {
  # Most of the time goes into compiling Triton kernels. A test that hangs takes its worker with it, not all.
  local options=()
  "$PYTHON" -c "import xdist" 2>/dev/null && options+=(-n "$(($(nproc) < 16 ? $(nproc) : 16))" --max-worker-restart=48)
  "$PYTHON" -c "import pytest_timeout" 2>/dev/null && options+=(--timeout=150 --timeout-method=thread)
  : >"$OUT/failures.txt"
  # One thread each: those of many processes would wait for each other.
  OMP_NUM_THREADS=1 FAILURES=$OUT/failures.txt limited "$LIMIT" tests.log "$PYTHON" -m pytest -vv -m gpu -p no:cacheprovider \
    -p bench.gpu.pytest_plugin --continue-on-collection-errors --tb=short --durations=20 "${options[@]}" \
    ${TESTS:+-k "$TESTS"} "--junitxml=$OUT/tests.xml" tests/gpu tests/ops/cuda
}

part_sanitizer() {
  local status=0 backend tool
  : >"$OUT/sanitizer.txt"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH" | tee "$OUT/sanitizer.txt"
    return 1
  fi
  # Compiled before any tool looks on, so that its time goes into the kernels.
  limited "$((LIMIT * 15 / 100))" sanitize.log "$PYTHON" -m bench.gpu.sanitize || status=1
  for tool in memcheck racecheck synccheck; do
    for backend in cuda triton; do
      # Without PyTorch's cache every tensor is an allocation of its own, and an access beyond it is seen.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$((LIMIT * 14 / 100))" "sanitizer-$tool-$backend.log" compute-sanitizer --tool "$tool" \
        --error-exitcode 9 "$PYTHON" -m bench.gpu.sanitize --backend "$backend" || status=1
      echo "$tool, $backend: $(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY|time limit' "$OUT/sanitizer-$tool-$backend.log" |
        sed 's/^=* *//' | paste -sd' ' | grep . || echo 'no summary')" | tee -a "$OUT/sanitizer.txt"
    done
  done
  return "$status"
}

benchmark() {
  local part=$1 end=$((SECONDS + LIMIT)) resume=${RESUME:+--resume} status before
  while :; do
    before=$(cksum "$OUT/$part.json" 2>/dev/null)
    limited "$((end - SECONDS))" "$part.log" "$PYTHON" -m "bench.gpu.$part" --out "$OUT" \
      --seconds "$((end - SECONDS - (LIMIT < 240 ? LIMIT / 4 : 60)))" \
      ${COMMIT:+"--commit=$COMMIT"} ${ONLY:+"--only=$ONLY"} ${SKIP:+"--skip=$SKIP"} $resume
    status=$?
    # Ended before its end, by a kernel that hung or broke the device: a new process goes on with what is left.
    if grep -q '"finished": true' "$OUT/$part.json" || [ "$((end - SECONDS))" -lt 45 ] ||
      [ "$before" = "$(cksum "$OUT/$part.json" 2>/dev/null)" ]; then
      return "$status"
    fi
    resume=--resume
  done
}

part_attention() { benchmark attention; }
part_select() { benchmark select; }
part_pages() { benchmark pages; }
part_decode() { benchmark decode; }
part_report() { limited 60 report.log "$PYTHON" -m bench.gpu.report --out "$OUT"; }

for part in "$@"; do
  case " ${PARTS[*]} " in
    *" ${part%%:*} "*) ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  case "$part" in
    *:*[!0-9]* | *:)
      usage >&2
      exit 2
      ;;
  esac
done

[ $# -gt 0 ] || set -- "${PARTS[@]}"
failed=()
for argument in "$@"; do
  part=${argument%%:*}
  LIMIT=540
  [ "$part" = "$argument" ] || LIMIT=${argument##*:}
  if [ -n "${BUDGET:-}" ] && [ "$LIMIT" -gt "$((BUDGET - SECONDS - 15))" ]; then
    LIMIT=$((BUDGET - SECONDS - 15))
  fi
  echo "== $part, at most $LIMIT s"
  if [ "$LIMIT" -lt 10 ] || ! "part_$part"; then
    failed+=("$part")
  fi
  [ -z "${ARCHIVE:-}" ] || { tar -czf "$ARCHIVE.part" -C "$OUT" . && mv "$ARCHIVE.part" "$ARCHIVE"; }
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
