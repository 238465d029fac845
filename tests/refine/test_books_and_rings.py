"""Learnable codebooks, trellis scales and grids with outliers: what they stand for, how they answer to a gradient."""

import pytest
import torch

from circuitpress.formats import CodebookFormat, OutlierFormat, TrellisFormat, parse
from circuitpress.quantize import quantize_matrix
from circuitpress.refine.load import soften

NAMES = ("int2g16s6", "code2", "code3g32", "code2r16g16", "trellis2l10", "trellis2.5l10", "int3g16+0.5%")


def rounded(name: str, rows: int = 20, cols: int = 45) -> tuple[object, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(200, cols)
    weight = torch.randn(rows, cols)
    quantized = quantize_matrix(weight, x.T @ x / 200, "rows", [(name, 0, rows)])
    return quantized.parts[0][3], weight


@pytest.mark.parametrize("name", NAMES)
def test_untouched_segments_stand_for_the_stored_weights(name: str) -> None:
    form, (value, _) = parse(name), rounded(name)
    soft = soften(form, value)
    torch.testing.assert_close(soft.weight(), form.decode(value), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(form.decode(soft.value()), form.decode(value), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_moved_segments_are_stored_as_they_are_used(name: str) -> None:
    form, (value, _) = parse(name), rounded(name)
    soft = soften(form, value)
    with torch.no_grad():
        for parameter in soft.codes():
            parameter += torch.randn_like(parameter)
        for parameter in soft.scales():
            parameter += 0.1 * torch.randn_like(parameter)
    used = soft.weight()
    assert not torch.equal(used, form.decode(value))
    moved = soft.value()
    torch.testing.assert_close(form.decode(moved), used, rtol=1e-5, atol=1e-6)
    packed = form.pack(moved)
    assert {key: (tensor.dtype, tensor.numel()) for key, tensor in packed.items()} == form.layout(20, 45)
    torch.testing.assert_close(form.decode(form.unpack(packed, 20, 45)), used, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_following_the_gradient_comes_nearer_to_a_target(name: str) -> None:
    form, (value, weight) = parse(name), rounded(name)
    soft = soften(form, value)
    groups = [{"params": soft.codes(), "lr": 0.05}, {"params": soft.scales(), "lr": 0.01}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    target = 2.0 * weight
    start = (soft.weight() - target).square().mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        (soft.weight() - target).square().mean().backward()
        optimizer.step()
    assert (form.decode(soft.value()) - target).square().mean() < 0.85 * start


def test_gradients_of_points_go_to_the_value_they_chose() -> None:
    form = parse("code2g32")
    assert isinstance(form, CodebookFormat)
    value, _ = rounded("code2g32")
    soft = soften(form, value)
    gradient = torch.randn(20, 45)
    soft.weight().backward(gradient)
    books, scales = soft.scales()
    (points,) = soft.codes()
    assert books.grad is not None
    assert scales.grad is not None
    spread = value.scales.float().repeat_interleave(32, 1)[:, :45]  # pyright: ignore
    owners = form.owners(20)
    spacing = ((value.books.float().amax(1) - value.books.float().amin(1)) / 3)[owners, None]  # pyright: ignore
    torch.testing.assert_close(points.grad, gradient * spread * spacing)
    for code in range(4):
        chosen = value.codes == code  # pyright: ignore
        torch.testing.assert_close(books.grad[0, code], (gradient * spread * spacing)[chosen].sum())


def test_outliers_stay() -> None:
    form, (value, _) = parse("int3g16+0.5%"), rounded("int3g16+0.5%")
    assert isinstance(form, OutlierFormat)
    soft = soften(form, value)
    with torch.no_grad():
        soft.codes()[0].add_(1.0)
    assert torch.equal(soft.weight().flatten()[value.positions], value.values.float())  # pyright: ignore


def test_rings_stay() -> None:
    form, (value, _) = parse("trellis2l10"), rounded("trellis2l10")
    assert isinstance(form, TrellisFormat)
    soft = soften(form, value)
    with torch.no_grad():
        for logs in soft.scales():
            logs -= 0.1
    moved = soft.value()
    assert torch.equal(moved.codes, value.codes)  # pyright: ignore
    assert not torch.equal(moved.rows, value.rows)  # pyright: ignore
