#!/usr/bin/env bash
# All that needs a GPU, unattended: tests on the device, then the timings, in about eight minutes. Run from anywhere, with
# an environment in which circuitpress is installed (PYTHON=... names its interpreter). Peers are timed where installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "there is no CUDA device")'
"$python" -m pytest -q -m gpu tests/kernels tests/runtime
if command -v compute-sanitizer >/dev/null; then
    PYTHONPATH=tests/kernels compute-sanitizer --error-exitcode 1 "$python" tests/kernels/slice_cases.py cuda small >/dev/null
fi
"$python" benchmarks/kernels.py --minutes 5
