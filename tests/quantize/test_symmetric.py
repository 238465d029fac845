"""Grids that other runtimes load: symmetric integers and the levels of bitsandbytes."""

import pytest
import torch

from circuitpress.formats import AbsmaxFormat, IntFormat, parse
from circuitpress.formats.integer import both_halves
from circuitpress.quantize import quantize_everywhere, quantize_matrix
from circuitpress.quantize.absmax import AbsmaxGrids, round_absmax

from .test_feedback import correlated, loss, normal


@pytest.mark.parametrize("polish", [False, True])
@pytest.mark.parametrize("name", ["sym2g16", "sym4g16", "sym8c", "sym4g64"])
def test_zeros_stay_in_the_middle_and_scales_fit_both_16_bit_types(name: str, polish: bool) -> None:
    weight, hessian = normal(13, 45), correlated(45)
    form = parse(name)
    assert isinstance(form, IntFormat)
    ((_, _, _, value),) = quantize_matrix(weight, hessian, "rows", [(name, 0, 13)], polish=polish).parts
    assert value.zeros.shape == value.scales.shape == (13, form.groups(45))
    assert bool((value.zeros == 2 ** (form.bits - 1)).all())
    assert torch.equal(value.scales.float(), value.scales.bfloat16().float())
    assert int(value.codes.max()) < 2**form.bits
    again = form.unpack(form.pack(value), 13, 45)
    assert all(torch.equal(a, b) for a, b in zip(value, again, strict=True))


def test_every_float16_becomes_a_number_of_both_types() -> None:
    numbers = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    found = both_halves(numbers.float())
    assert torch.equal(found.bfloat16().half(), found)
    usual = numbers > 2**-14
    assert float((found[usual].double() / numbers[usual].double() - 1).abs().max()) <= 2**-8


def test_feedback_and_polish_help_symmetric_grids_too() -> None:
    for name in ("sym3g16", "nf4", "llmint8"):
        for seed in range(3):
            weight, hessian = normal(13, 45, seed=seed), correlated(45, seed=seed)
            nearest, plain, polished = (
                loss(weight, quantize_matrix(weight, h, "rows", [(name, 0, 13)], polish=p).decode(), hessian)
                for h, p in ((torch.eye(45), False), (hessian, False), (hessian, True))
            )
            assert plain < nearest
            assert polished < plain


def test_asymmetric_and_symmetric_columns_keep_their_own_grids() -> None:
    weight, hessian = normal(9, 45).abs(), correlated(45)
    both = quantize_matrix(weight, hessian, "cols", [("sym4g16", 0, 20), ("int4g16", 20, 45)])
    (_, _, _, first), (_, _, _, second) = both.parts
    assert bool((first.zeros == 8).all()) and bool((second.zeros == 0).any())
    alone, _ = quantize_everywhere(weight, hessian, ["sym4g16", "int4g16"])
    assert bool((alone["sym4g16"].parts[0][3].zeros == 8).all())


@pytest.mark.parametrize("name", ["nf4", "llmint8"])
def test_levels_are_taken_to_nearest_and_zeros_survive(name: str) -> None:
    form = parse(name)
    assert isinstance(form, AbsmaxFormat)
    levels = form.levels
    grids = AbsmaxGrids(levels, torch.full((1, 400), 0.7))
    target = torch.linspace(-1, 1, 400)
    codes, values = grids.nearest(0, target)
    brute = (target[:, None].double() - 0.7 * levels.double()).abs()
    chosen = brute.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, brute.amin(1))
    torch.testing.assert_close(values, 0.7 * levels[codes.long()])
    value, note = round_absmax(torch.zeros(3, 70), torch.eye(70), form, polished=True)
    assert note == "" and bool((form.decode(value) == 0).all())
