"""The kernels of slices: in the interpreter everywhere, on a GPU where there is one, and compiled ahead of time."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from .processes import lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")

WORST = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 2e-3}
OVER = {(18,): 1.07, (28,): 3.4}
"""Kinds above their budget, by what: a book of 4 numbers, 2 bits on a trellis."""
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}


def _check(found: list[dict[str, Any]], cases: int) -> None:
    assert len(found) == cases
    assert not [line for line in found if not (line["right_form"] and line["same_again"])]
    assert not [line for line in found if not max(line["error"], line["from_twin"]) < WORST[line["type"]]]


def test_interpreted_kernels_match_float64_and_the_twin() -> None:
    found = lines("slice_cases.py", "cpu", TRITON_INTERPRET="1")
    _check(found, 52)
    assert not [line for line in found if not line["beyond"] <= 1]


@pytest.mark.gpu
def test_kernels_on_a_gpu_match_float64_and_the_twin() -> None:
    _check(lines("slice_cases.py", "cuda"), 180)


def test_compiled_kernels_keep_their_budgets(tmp_path: Path) -> None:
    found = lines("aot.py", "--quick", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 25
    for line in found:
        target, case = line["target"], f"{line['kernel']} {line['kinds']} {line['target']} {line['type']}"
        assert line["registers"] <= REGISTER_LIMIT[target], case
        assert line["shared"] <= line["shared_limit"], case
        assert line["spills"] == 0, case
        assert line.get("instructions_per_weight", 0) <= OVER.get(tuple(line["kinds"]), 1) * line.get("budget", 0), case
        if line["kernel"] in ("slice_pieces", "expert_pieces"):
            assert line["widest"] == 16, case
            assert line["tensor_cores"], case
    assert sum("budget" in line for line in found) == 11


def test_the_benchmark_goes_through_every_path_without_a_gpu() -> None:
    found = lines("kernels.py", "--dry-run", TRITON_INTERPRET="1")
    cached = [line for line in found if line["method"] == "circuitpress cache"]
    assert [(line["bits"], line["batch"]) for line in cached] == [(b, n) for b in (4, 8, "mixed") for n in (1, 8)]
    experts = [line for line in found if line["method"] == "circuitpress experts"]
    assert [line["batch"] for line in experts] == [1, 4]
    found = [line for line in found if line not in [*cached, *experts]]
    assert sum("norm and gates" in line["method"] for line in found) == 2 * 2 * 3
    assert {(line["bits"], line["batch"]) for line in found} == {
        (bits, batch) for bits in (2, 3, 4, 8, "mixed", 16) for batch in (1, 9, 40)
    }
    assert all(line["microseconds"] is None for line in found)
