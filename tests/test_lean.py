"""Rounding that leans: the target against its own definition, and what pulls it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from circuitpress.anatomy import read_anatomy
from circuitpress.lean import DAMPING, Lean, damped_factor, gradient_key, leant, load_gradients, pulls
from circuitpress.price import shard_path


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_leant_weights_are_the_best_trade_of_text_for_margin() -> None:
    """1/2 tr((V - W) H (V - W)^T) - <G, V> has no gradient there, H with its damping."""
    weight, pulled, x = drawn(7, 13), drawn(7, 13, seed=1), drawn(40, 13, seed=2)
    hessian = x.T @ x / 40
    found = leant(weight.float(), hessian.float(), pulled.float()).double().requires_grad_()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(13, dtype=torch.float64)
    change = found - weight
    loss = 0.5 * (change @ damped * change).sum() - (pulled * found).sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert float(gradient.abs().max()) < 1e-5 * float(pulled.abs().max())
    assert float(loss.detach()) < float(-(pulled * weight).sum())


@pytest.mark.parametrize("hessian", [torch.zeros(5, 5), torch.full((5, 5), torch.nan)], ids=["dead", "nan"])
def test_weights_stay_where_nothing_pulls_or_no_input_is_known(hessian: torch.Tensor) -> None:
    weight = drawn(3, 5).float()
    assert torch.equal(leant(weight, hessian, torch.ones(3, 5)), weight)
    assert torch.equal(leant(weight, torch.eye(5), None), weight)
    assert damped_factor(hessian) is None


def test_pulls_add_up_with_their_shares(tiny_llama: Path, tmp_path: Path) -> None:
    place = read_anatomy(tiny_llama).blocks[1]
    known = {}
    for seed, name in enumerate(("a", "b")):
        tensors = {
            gradient_key(half, m.module): drawn(m.rows, m.cols, seed=10 * seed + half).bfloat16()
            for half in (0, 1)
            for m in place.matrices
        }
        (tmp_path / name).mkdir()
        save_file(tensors, shard_path(tmp_path / name, 1))
        known[name] = tensors
    cpu = torch.device("cpu")
    leans = [Lean(tmp_path / "a", 3.0), Lean(tmp_path / "b", 0.5, (1,)), Lean(tmp_path / "gone", 0.0)]
    found = pulls(leans, place, cpu)
    assert set(found) == {matrix.module for matrix in place.matrices}
    for module, value in found.items():
        first, second = (known["a"][gradient_key(half, module)].double() for half in (0, 1))
        expected = 1.5 * (first + second) + 0.5 * known["b"][gradient_key(1, module)].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert pulls([Lean(tmp_path / "a", 0.0)], place, cpu) == {}
    again = load_gradients(tmp_path / "a", place, 0, cpu)
    assert all(torch.equal(again[m.module], known["a"][gradient_key(0, m.module)].float()) for m in place.matrices)
