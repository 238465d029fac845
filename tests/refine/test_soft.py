"""Learnable codes: what they stand for, their gradients against plain autograd, and the way back to stored values."""

import pytest
import torch

from circuitpress.formats import CastFormat, IntCodes, IntFormat, parse
from circuitpress.quantize import quantize_matrix
from circuitpress.refine.load import soften
from circuitpress.refine.soft import SoftLinear, straight_through


def codes(rows: int, cols: int, bits: int, group: int) -> IntCodes:
    torch.manual_seed(bits * 100 + cols)
    groups = -(-cols // group)
    return IntCodes(
        torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8),
        (torch.rand(rows, groups) + 0.1).half(),
        torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8),
    )


@pytest.mark.parametrize(("rows", "cols", "bits", "group"), [(7, 45, 2, 16), (5, 64, 3, 64), (3, 33, 8, 32)])
def test_untouched_codes_stand_for_the_stored_weights(rows: int, cols: int, bits: int, group: int) -> None:
    form, value = IntFormat(bits, group), codes(rows, cols, bits, group)
    soft = soften(form, value)
    assert torch.equal(soft.weight(), form.decode(value))
    again = soft.value()
    assert torch.equal(again.codes, value.codes)
    assert torch.equal(again.zeros, value.zeros)
    assert torch.equal(again.scales, value.scales)


@pytest.mark.parametrize("name", ["sym3g16", "sym8c", "nf4", "llmint8"])
def test_formats_of_other_runtimes_stay_what_those_can_store(name: str) -> None:
    form = parse(name)
    weight = torch.randn(6, 45, generator=torch.Generator().manual_seed(0))
    ((_, _, _, value),) = quantize_matrix(weight, torch.eye(45), "rows", [(name, 0, 6)]).parts
    soft = soften(form, value)
    with torch.no_grad():
        for parameter in (*soft.codes(), *soft.scales()):
            parameter += 0.3 * torch.randn_like(parameter)
    assert torch.equal(form.decode(form.unpack(form.pack(soft.value()), 6, 45)), soft.weight())
    if isinstance(form, IntFormat):
        assert not torch.equal(soft.weight(), form.decode(value))
        assert torch.equal(soft.value().scales.bfloat16().half(), soft.value().scales)


def test_gradients_are_those_of_a_grid_with_the_rounding_taken_as_the_identity() -> None:
    form, value = IntFormat(3, 16), codes(6, 45, 3, 16)
    soft = soften(form, value)
    latent, log_scale = soft.codes()[0], soft.scales()[0]
    with torch.no_grad():
        latent += torch.randn_like(latent)  # some codes leave the grid
    gradient = torch.randn(6, 45)
    soft.weight().backward(gradient)

    x, s = latent.detach().double().requires_grad_(), log_scale.detach().double().requires_grad_()
    inside = (x >= -0.5) & (x <= 7.5)
    rounded = torch.where(inside, x + (x.round().clamp(0, 7) - x).detach(), x.detach().clamp(0, 7))
    zeros = value.zeros.double().repeat_interleave(16, 1)[:, :45]
    scale = s.exp() + (s.exp().half().double() - s.exp()).detach()
    ((rounded - zeros) * scale.repeat_interleave(16, 1)[:, :45]).backward(gradient.double())
    assert not inside.all()
    assert x.grad is not None
    assert s.grad is not None
    torch.testing.assert_close(latent.grad, x.grad.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_scale.grad, s.grad.float(), rtol=1e-5, atol=1e-5)


def test_moved_codes_are_stored_as_they_are_used() -> None:
    form = IntFormat(2, 16)
    soft = soften(form, codes(6, 45, 2, 16))
    with torch.no_grad():
        for parameter in (*soft.codes(), *soft.scales()):
            parameter += torch.randn_like(parameter)
    assert torch.equal(form.decode(soft.value()), soft.weight())


@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_a_matrix_of_segments_multiplies_like_its_decoded_weights(axis: str) -> None:
    first, second = IntFormat(2, 16), IntFormat(4, 32)
    shapes = [(5, 20), (6, 20)] if axis == "rows" else [(11, 9), (11, 11)]
    values = [codes(*shape, form.bits, form.group_size) for shape, form in zip(shapes, (first, second), strict=True)]
    dense = torch.cat([first.decode(values[0]), second.decode(values[1])], 0 if axis == "rows" else 1)
    bias = torch.nn.Parameter(torch.randn(11))
    x = torch.randn(2, 3, 20)
    module = SoftLinear([soften(first, values[0]), soften(second, values[1])], axis, bias)
    torch.testing.assert_close(module(x), x @ dense.T + bias)


def test_formats_without_a_grid_stay_as_they_are() -> None:
    form = CastFormat(torch.bfloat16)
    value = torch.randn(4, 6).bfloat16()
    soft = soften(form, value)
    assert soft.codes() == soft.scales() == []
    assert torch.equal(soft.weight(), value.float())
    assert not soft.weight().requires_grad
    assert soft.value() is value


def test_storage_types_round_forwards_only() -> None:
    x = torch.randn(50, requires_grad=True)
    y = straight_through(x, torch.Tensor.bfloat16)
    assert torch.equal(y, x.bfloat16().float())
    y.backward(torch.arange(50.0))
    assert torch.equal(x.grad, torch.arange(50.0))
