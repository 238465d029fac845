"""Scales in six bits: all of them, the nearest of them, and their bytes."""

import itertools

import pytest
import torch
from torch import Tensor

from circuitpress.formats.scales import ROWS, pack_scales, round_scales, shared_exponents, unpack_scales


def every_scale(top: int, *, signed: bool) -> Tensor:
    """All scales under one exponent, by the formula of the module."""
    steps = 8 if signed else 16
    sizes = [2.0 ** (top - e) * (1 + m / steps) for e, m in itertools.product(range(4), range(steps))]
    return torch.tensor(sorted([*sizes, *(-s for s in sizes)] if signed else sizes))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("top", [-17, -3, 0, 15])
def test_all_sixty_four(top: int, signed: bool) -> None:
    scales = every_scale(top, signed=signed)
    assert len(scales) == 64
    assert torch.equal(scales.half().float(), scales)  # whatever computes with float16 scales can take them
    codes, exponents = pack_scales(scales[None], signed=signed)
    assert exponents.tolist() == [top]
    assert sorted(codes.flatten().tolist()) == list(range(64))
    assert torch.equal(unpack_scales(codes, exponents, signed=signed), scales[None].half())
    assert torch.equal(round_scales(scales[None], torch.tensor([[float(top)]]), signed=signed), scales[None])


@pytest.mark.parametrize("signed", [False, True])
def test_the_nearest_is_chosen(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(500, generator=generator) * 3 - (1 if signed else 0)
    table = every_scale(0, signed=signed)
    found = round_scales(wanted, torch.zeros(1), signed=signed)
    best = (wanted[:, None] - table).abs().amin(1)
    torch.testing.assert_close((wanted - found).abs(), best, rtol=0, atol=1e-7)
    inside = (wanted.abs() > table.abs().min()) & (wanted.abs() < table.max())
    worst = float(((wanted - found) / wanted).abs()[inside].max())
    assert worst < (0.0626 if signed else 0.0313)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("signed", [False, True])
def test_rows_share_exponents(rows: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    sizes = torch.rand(rows, 3, generator=generator) * torch.logspace(-3, 2, rows)[:, None]
    if signed:
        sizes = sizes * torch.where(torch.rand(rows, 3, generator=generator) < 0.5, -1, 1)
    tops = shared_exponents(sizes)
    for start in range(0, rows, ROWS):
        expected = torch.floor(torch.log2(sizes[start : start + ROWS].abs().max()))
        assert bool((tops[start : start + ROWS] == expected).all())
    stored = round_scales(sizes, tops, signed=signed)
    codes, exponents = pack_scales(stored, signed=signed)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 64
    assert len(exponents) == -(-rows // ROWS)
    assert torch.equal(unpack_scales(codes, exponents, signed=signed).float(), stored)


def test_nothing_and_too_much_are_stored_as_well() -> None:
    for size in (0.0, 1e-30, 1e30):
        sizes = torch.full((3, 2), size)
        stored = round_scales(sizes, shared_exponents(sizes))
        assert bool((stored > 0).all()) and bool(stored.half().isfinite().all())
        assert torch.equal(unpack_scales(*pack_scales(stored)).float(), stored)
