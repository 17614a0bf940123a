#!/usr/bin/env bash
# Everything that wants a GPU, in one go: the tests, the suites, the sanitizer where it is installed, and what was predicted
# beside what was measured. A part that fails does not stop the others.
#
#   bash bench/gpu.sh FOLDER
#
# leaves in FOLDER the log of each part and the result files, named <suite>.json; it takes under nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bash bench/gpu.sh FOLDER}")
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "$name: $([ "$status" = 0 ] && echo passed || echo "failed ($status)") after $((SECONDS - start)) s"
    tail -n 3 "$out/$name.log" | cut -c1-200
    [ "$status" = 0 ] || failed=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
part tests 150 python -m pytest tests/kernels tests/models/test_on_kernels.py -q --maxfail=20 -p no:cacheprovider
part attention 50 python -m pytest bench -q --benchmark-only -k attention- --results "$out"
part transition 30 python -m pytest bench -q --benchmark-only -k transition- --results "$out"
part model 230 python -m pytest bench -q --benchmark-only -k model- --results "$out"
if command -v compute-sanitizer >/dev/null; then # one random case for each kernel; bench/sanitize.sh tries all
    PM_VIT_CASES=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 60 compute-sanitizer --error-exitcode 9 \
        python -m pytest tests/trust/test_kernels.py -q -p no:cacheprovider
fi
case $(nvidia-smi --query-gpu=name --format=csv,noheader) in
*A100*) card=a100 ;;
*H100*) card=h100 ;;
*H200*) card=h200 ;;
*B200*) card=b200 ;;
*) card= ;;
esac
if [ -n "$card" ]; then
    part predicted 20 python -m bench.predict "$card" --measured "$out/model.json"
    cat "$out/predicted.log"
fi
exit "$failed"
