"""Products with chosen experts: the layout, the routes, the operator and the kernels."""

import importlib.util
from typing import Any

import pytest
import torch

from circuitpress_kernels import DENSE, TRELLIS, Part
from circuitpress_kernels.experts import (
    expert_linear,
    expert_linear_twin,
    expert_weight,
    route,
    stack_experts,
)

from .matrices import Cut, part
from .processes import lines

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")
WORST = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5}


def _check(found: list[dict[str, Any]]) -> None:
    assert len(found) == 6
    assert not [line for line in found if not line["right_form"]]
    assert not [line for line in found if not max(line["error"], line["from_twin"]) < WORST[line["type"]]]


@needs_triton
def test_interpreted_kernels_match_float64_and_the_twin() -> None:
    _check(lines("expert_cases.py", "cpu", TRITON_INTERPRET="1"))


@pytest.mark.gpu
@needs_triton
def test_kernels_on_a_gpu_match_float64_and_the_twin() -> None:
    _check(lines("expert_cases.py", "cuda"))


def _layer(programs: int) -> tuple[Any, torch.Tensor]:
    """Three experts of 70 rows by 96 columns in different formats, and their weights."""
    torch.manual_seed(0)
    made = [[part(Cut(40, 4, 32), 0, 40, 96), part(Cut(30, 2, 32), 40, 30, 96)], [part(Cut(70, 3, 32, 11), 0, 70, 96)]]
    made.append([part(Cut(64, DENSE), 0, 64, 96), part(Cut(6, 8, 32), 64, 6, 96)])
    weights = torch.stack([torch.cat([weight for _, weight in expert]) for expert in made])
    parts = [[own for own, _ in expert] for expert in made]
    return stack_experts(parts, rows=70, cols=96, dtype=torch.float16, programs=programs), weights


@pytest.mark.parametrize("programs", [1, 4, 64])
def test_experts_of_any_formats_are_what_was_put_in(programs: int) -> None:
    experts, weights = _layer(programs)
    for index in range(3):
        assert torch.equal(expert_weight(experts, index).double(), weights[index])
    assert experts.programs.shape == (3, programs + 1)
    assert experts.programs[0, 0] == 0 and experts.programs[-1, -1] == len(experts.pieces)
    assert torch.equal(experts.programs[1:, 0], experts.programs[:-1, -1])


def test_routes_sort_choices_and_put_chosen_experts_first() -> None:
    tables = route(torch.tensor([[4, 1], [1, 6], [4, 0]]), 8)
    assert tables.order.tolist() == [5, 1, 2, 0, 4, 3]
    assert tables.starts.tolist() == [0, 1, 3, 3, 3, 5, 5, 6, 6]
    assert tables.active.tolist()[:4] == [0, 1, 4, 6] and len(tables.active) == 6


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_is_the_twin_and_has_a_shape_for_the_compiler(gated: bool) -> None:
    experts, weights = _layer(4)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).half()
    choice = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [0, 2]])
    found = expert_linear(x, experts, choice, gated=gated)
    assert torch.equal(found, expert_linear_twin(x, experts, choice, gated=gated))
    exact = torch.einsum("tjrk,tk->tjr", weights[choice], x.double())
    if gated:
        gate, up = exact.chunk(2, 2)
        exact = gate * torch.sigmoid(gate) * up
    assert (found.double() - exact).norm() / exact.norm() < 2e-3
    compiled = torch.compile(expert_linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, experts, choice, gated=gated), found)
    torch.library.opcheck(
        torch.ops.circuitpress.expert_linear.default, (x, list(experts[:-1]), choice, gated, list(experts.form))
    )


def test_a_trellis_is_refused() -> None:
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    ring = Part(0, TRELLIS + 4, codes, 0, torch.ones(32, 1).half(), source=64)
    with pytest.raises(ValueError, match="trellis"):
        stack_experts([[ring]], rows=32, cols=64, dtype=torch.float16)
