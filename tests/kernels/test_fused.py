"""Products with a norm, a rotation, gates and a residual around them: the twin, the operator and the kernels."""

import importlib.util
from typing import Any

import pytest
import torch

from circuitpress.formats.rotation import rotate, signs
from circuitpress_kernels.fused import Around, Turn, fused_linear, fused_linear_twin, hadamard, places_of

from .matrices import Cut, matrix
from .processes import lines

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")
WORST = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5}


def _check(found: list[dict[str, Any]], worst: dict[str, float]) -> None:
    assert len(found) == 10
    assert not [line for line in found if not line["right_form"]]
    assert not [line for line in found if not max(line["error"], line["from_twin"]) < worst[line["type"]]]


@needs_triton
def test_interpreted_kernels_match_float64_and_the_twin() -> None:
    # The interpreter cuts bfloat16 off where it should round: the two roundings of a norm go the same way.
    _check(lines("fused_cases.py", "cpu", TRITON_INTERPRET="1"), WORST | {"bfloat16": 2e-2})


@pytest.mark.gpu
@needs_triton
def test_kernels_on_a_gpu_match_float64_and_the_twin() -> None:
    _check(lines("fused_cases.py", "cuda"), WORST)


def test_the_operator_is_the_twin_and_has_a_shape_for_the_compiler() -> None:
    laid_out, _ = matrix("rows", 96, [Cut(20, 4, 32), Cut(14, 3, 32)], dtype=torch.float16, seed=0)
    places = places_of(laid_out)
    assert torch.equal(laid_out.order.flatten()[places.long()], torch.arange(34, dtype=torch.int32))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    turn = Turn(torch.arange(32, dtype=torch.int32), torch.rand(2, 32), 32)
    around = Around(torch.rand(64).half(), 1e-6, turn, torch.randn(34).half(), torch.randn(3, 17).half(), True)
    y = fused_linear(x, laid_out, places, around)
    assert torch.equal(y, fused_linear_twin(x, laid_out, around))
    compiled = torch.compile(fused_linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, laid_out, places, around), y)
    tensors = [*laid_out[:-1], places]
    extras = (around.gain, *turn[:2], around.bias, around.residual, 1e-6, 32, True, list(laid_out.form))
    torch.library.opcheck(torch.ops.circuitpress.fused_linear.default, (x, tensors, *extras))
    plain = fused_linear(x, matrix("rows", 64, [Cut(34, 4, 32)], dtype=torch.float16, seed=0)[0], places, Around())
    assert plain.shape == (3, 34)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_rotation_is_its_own_inverse(size: int) -> None:
    found = hadamard(size, torch.device("cpu"))
    torch.testing.assert_close(found @ found, torch.eye(size), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, rotate(torch.diag(signs(size, 3)), 3), atol=1e-6, rtol=0)
