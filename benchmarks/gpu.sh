#!/usr/bin/env bash
# All that needs a GPU, unattended: tests on the device, then the timings, in about eight minutes. Run from anywhere, with
# an environment in which circuitpress is installed (PYTHON=... names its interpreter). Peers are timed where installed.
# `gpu.sh --dry-run` needs no GPU: every path once in Triton's interpreter, nothing timed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
if [[ "${1:-}" == --dry-run ]]; then
    exec "$python" benchmarks/kernels.py --dry-run
fi
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "there is no CUDA device")'
"$python" -m pytest -q -m gpu tests/kernels tests/runtime
if command -v compute-sanitizer >/dev/null; then
    for cases in "slice_cases.py cuda small" "fused_cases.py cuda" "cache_cases.py cuda" "expert_cases.py cuda"; do
        # shellcheck disable=SC2086 (a script and its arguments)
        PYTHONPATH=tests/kernels compute-sanitizer --error-exitcode 1 "$python" tests/kernels/$cases >/dev/null
    done
fi
"$python" benchmarks/kernels.py --minutes 5
