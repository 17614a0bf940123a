#!/usr/bin/env bash
# The kernels under NVIDIA's compute-sanitizer, tool by tool, and on tensors past 2^31 elements. Needs a GPU and the CUDA
# toolkit's compute-sanitizer; takes hours, as each tool slows kernels down by tens of times.
#
#   bash bench/sanitize.sh FOLDER
#
# leaves in FOLDER the log of each tool; its last line counts the errors. Exits with 1 where there is one.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bash bench/sanitize.sh FOLDER}")
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own, so that its neighbours are out of bounds
failed=0

command -v compute-sanitizer >/dev/null || {
    echo "no compute-sanitizer on the PATH: it is a part of the CUDA toolkit" >&2
    exit 1
}
for tool in memcheck racecheck initcheck; do
    log=$out/$tool.log
    PM_VIT_CASES=50 compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$log" \
        python -m pytest -p no:cacheprovider -m "fuzz or not fuzz" \
        tests/kernels tests/trust/test_kernels.py tests/trust/test_configurations.py \
        >"$out/$tool.tests.log" 2>&1 || failed=1
    echo "$tool: $(tail -n 1 "$log")"
done
python -m pytest -p no:cacheprovider tests/trust/test_large.py >"$out/large.log" 2>&1 || failed=1
echo "large: $(tail -n 1 "$out/large.log")"
exit "$failed"
