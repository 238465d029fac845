#!/usr/bin/env bash
# All that needs a GPU, unattended: tests on the device, then the timings, in about eight minutes. Run from anywhere, with
# an environment in which circuitpress is installed (PYTHON=... names its interpreter). Peers are timed where installed.
# Results (json) and their pictures (svg) go to benchmarks/results. A step that fails does not stop the others; the exit
# code says so. gptqmodel, if it is there, compiles Marlin at first use, minutes that are not among the eight: to have
# them behind you, $PYTHON -c 'from gptqmodel import extension; extension.load("marlin_bf16")'.
# `gpu.sh --dry-run` needs no GPU: every path once in Triton's interpreter, nothing timed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-.venv/bin/python}"
failed=0
step() { "$@" || { echo "failed: $*" >&2; failed=1; }; }

if [[ "${1:-}" == --dry-run ]]; then
    step "$python" benchmarks/kernels.py --dry-run
    step "$python" benchmarks/speed_gpu.py --dry-run
    exit "$failed"
fi
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "there is no CUDA device")' || exit 1
# The figures first: they are what a machine is rented for.
step "$python" benchmarks/kernels.py --minutes 2.5
step "$python" benchmarks/speed_gpu.py --minutes 2
step "$python" -m pytest -q -m gpu tests/kernels tests/runtime
if command -v compute-sanitizer >/dev/null; then
    for cases in "slice_cases.py cuda small" "fused_cases.py cuda" "cache_cases.py cuda" "expert_cases.py cuda"; do
        # shellcheck disable=SC2086 (a script and its arguments)
        PYTHONPATH=tests/kernels step compute-sanitizer --error-exitcode 1 "$python" tests/kernels/$cases >/dev/null
    done
fi
exit "$failed"
