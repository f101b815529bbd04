#!/bin/bash
# Builds, tests, checks and measures the kernels on a machine with an NVIDIA GPU, in less than 9 minutes. Needs a Python
# with torch for CUDA, lightning, transformers and pytest. Logs and figures go to $OUT, by default benchmarks/results.
# A part that fails, or takes too long, is named at the end, and the exit status is then 1.
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 # cuBLAS refuses deterministic mode, which tests use, without
export LIGHTEDIT_BUILD_EXT=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-12}
if [ -z "$CUDA_HOME" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
PATH=$PATH${CUDA_HOME:+:$CUDA_HOME/bin} # of compute-sanitizer
: >"$OUT/gpu.log"
failed=()

part() { # name, seconds it may take, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  printf '\n== %s\n' "$name" | tee -a "$OUT/gpu.log"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    failed+=("$name (status $status; 124 is: longer than $limit s)")
  fi
  printf '== %s: status %s, %s s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$OUT/gpu.log"
  return "$status"
}

part "machine" 60 "$python" -c '
import subprocess, torch, triton
subprocess.run(["nvidia-smi"], check=True)
print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
part "build" 140 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
part "what is live" 60 "$python" -c '
from lightedit.ops import NATIVE_STATUS, implementations
live = implementations()
print(NATIVE_STATUS, live)
for op in ("second_moment_", "add_low_rank_", "preservation_memorization_solve"):
    assert live[op]["cuda"] == "native", f"{op} has no native kernel"
for op in ("rowwise_low_rank", "target_nll_kl"):
    assert live[op]["cuda"] == "triton", f"{op} has no Triton kernel"'
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
part "tests" 150 "$python" -m pytest tests/ops -q -p no:cacheprovider "${workers[@]}" -k "cuda or triton"
part "measure" 150 "$python" -m benchmarks.gpu "$OUT/gpu.json"
left() { # seconds for a part of those that are left, and never none
  local rest=$((535 - SECONDS))
  echo "$((rest > 90 ? 90 : rest > 10 ? rest : 10))"
}
if command -v compute-sanitizer >/dev/null; then
  # Without torch's cache of memory, so that what lies beyond a tensor is beyond an allocation
  # Without errors of the API: libraries that ask whether the machine can do something get some
  part "memcheck" "$(left)" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \
    --error-exitcode 9 "$python" -m benchmarks.gpu --small
  part "racecheck" "$(left)" compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m benchmarks.gpu --small
else
  failed+=("memcheck and racecheck (there is no compute-sanitizer)")
fi
printf '\n== %s s in all\n' "$SECONDS" | tee -a "$OUT/gpu.log"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}" | tee -a "$OUT/gpu.log"
  exit 1
fi
echo "all parts passed" | tee -a "$OUT/gpu.log"
