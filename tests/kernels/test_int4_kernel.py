"""The Triton kernel itself: in the interpreter everywhere, on a GPU where there is one, and compiled ahead of time.

Each in a process of its own (see int4_cases.py and int4_compile.py).
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from .processes import lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")

# Shared memory a program may have, in bytes: CUDA programming guide, table of compute capabilities; CDNA 3 ISA guide.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTER_LIMIT = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 512}


def _check_cases(found: list[dict[str, Any]]) -> None:
    assert len(found) == 60
    wrong = [line for line in found if not (line["error"] <= 1 and line["twin"] <= 1 and line["right_form"])]
    assert not wrong


def test_interpreted_kernel_matches_float64_and_the_twin() -> None:
    _check_cases(lines("int4_cases.py", "cpu", TRITON_INTERPRET="1"))


@pytest.mark.gpu
def test_kernel_on_a_gpu_matches_float64_and_the_twin() -> None:
    _check_cases(lines("int4_cases.py", "cuda"))


def test_compiled_kernel_fits_the_devices(tmp_path: Path) -> None:
    found = lines("int4_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 18
    for line in found:
        target, case = line["target"], line["case"]
        assert line["spills"] == 0, case
        assert line["registers"] <= REGISTER_LIMIT[target], case
        assert line["shared"] <= SHARED_LIMIT[target], case
        assert line["widest"] >= (4 if target == "gfx942" else 8), case
        if not case.startswith("fp32") and target != "gfx942":
            assert line["tensor_cores"], case
