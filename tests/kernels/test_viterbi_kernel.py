"""The Triton encoder: in the interpreter everywhere, on a GPU where there is one, and compiled ahead of time."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from .processes import lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")

# Shared memory a program may have, in bytes, and registers a thread may have with two programs to a multiprocessor.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTER_LIMIT = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 256}


def _check(found: list[dict[str, Any]], cases: int) -> None:
    """The same paths as in torch, but for ties within rounding."""
    assert len(found) == cases
    assert not [line for line in found if not (line["error"] < 1e-3 and line["same"] > 0.99 and line["right_form"])]


def test_interpreted_encoder_finds_the_paths_of_the_torch_one() -> None:
    _check(lines("viterbi_cases.py", "cpu", TRITON_INTERPRET="1"), 5)


@pytest.mark.gpu
def test_encoder_on_a_gpu_finds_the_paths_of_the_torch_one() -> None:
    _check(lines("viterbi_cases.py", "cuda"), 9)


def test_compiled_encoder_fits_the_devices(tmp_path: Path) -> None:
    found = lines("viterbi_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 20
    for line in found:
        target, case = line["target"], line["case"]
        assert line["spills"] == 0, case
        assert line["registers"] <= REGISTER_LIMIT[target], case
        assert line["shared"] <= SHARED_LIMIT[target], case
