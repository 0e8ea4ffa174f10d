#!/usr/bin/env bash
# Everything to do on a GPU machine in one call of at most eight minutes: build, tests, sanitizer, op benchmarks, resolution sweep.
# Uses that machine's own python3 (torch, triton, numpy, scipy, pyyaml, pybind11, ninja, pytest), needs no network, reads only this repository, and leaves
# one archive of records in $OUT. With DRY=1 the same steps run on a CPU, a few seconds each.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=${DRY:-0}
OUT=${OUT:-$(mktemp -d)}
RECORDS=$(mktemp -d)
failed=()

step() { # step NAME SECONDS COMMAND...: runs with a limit, keeps the log, goes on after a failure and remembers it
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout "$limit" "$@" >"$RECORDS/$name.log" 2>&1; then
    echo "   done in $((SECONDS - began)) s"
  else
    echo "   FAILED (status $?) after $((SECONDS - began)) s; the end of its log:"
    tail -n 15 "$RECORDS/$name.log"
    failed+=("$name")
  fi
}

if [ "$DRY" = 1 ]; then
  device=cpu tests=(tests/ops/test_masked_attention.py -k edges)
else
  device=cuda tests=(tests/ops tests/test_backend.py tests/nn -x)
  export JEPA_KERNELS_CUDA=1
  # Only this machine's architecture: the wheel builds the others.
  JEPA_KERNELS_CUDA_ARCHS=$($PYTHON -c "import torch; a = '%d%d' % torch.cuda.get_device_capability(); print(a + ('a' if a in ('90', '100') else ''))")
  export JEPA_KERNELS_CUDA_ARCHS
fi

step build 240 "$PYTHON" setup.py --quiet build_ext --inplace
step doctor 60 "$PYTHON" -m jepa_kernels doctor
cat "$RECORDS/doctor.log"
step tests 150 "$PYTHON" -m pytest "${tests[@]}"
if [ "$DRY" != 1 ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest tests/ops/test_masked_attention.py -k "edges and cuda-cuda"
  done
fi
for file in benchmarks/bench_masked_attention.py benchmarks/bench_ema_update.py benchmarks/bench_adamw_ema.py benchmarks/bench_latent_rollout.py; do
  [ -e "$file" ] || continue
  name=$(basename "$file" .py)
  step "$name" 60 "$PYTHON" -m "benchmarks.$name" --quick --output "$RECORDS/$name.json"
done
if [ "$DRY" = 1 ]; then
  step sweep 60 "$PYTHON" -m benchmarks.sweep --variants baseline --resolutions 64 --modes pretrain --frames 8 --budget 20 --rounds 1 \
    --output "$RECORDS/sweep.json" --no-report --fresh
else
  step sweep 120 "$PYTHON" -m benchmarks.sweep --size base --resolutions 112,224,320,448 --dtype bf16 --batch 8 --data tensors --device cuda \
    --modes pretrain --budget 110 --output "$RECORDS/sweep.json" --no-report --fresh
fi

tar -czf "$OUT/records.tar.gz" -C "$RECORDS" .
echo "records: $OUT/records.tar.gz ($device, $SECONDS s)"
rm -rf "$RECORDS"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
