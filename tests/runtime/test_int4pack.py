"""Repacking for torch's int4 operator, and the unpacked path for many rows, against float64."""

import pytest
import torch

from circuitpress.formats import IntCodes, IntFormat
from circuitpress.runtime import int4pack


def _grid(rows: int, cols: int, group_size: int, bits: int) -> IntCodes:
    generator = torch.Generator().manual_seed(rows + cols + bits)
    groups = cols // group_size
    return IntCodes(
        torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator),
        (0.01 + 0.1 * torch.rand(rows, groups, generator=generator)).half(),
        torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator),
    )


@pytest.mark.parametrize("batch", [1, 7, int4pack.FEW_ROWS, int4pack.FEW_ROWS + 1])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "cols", "group_size"), [(172, 64, 32), (64, 192, 64), (1, 256, 128), (130, 512, 256)])
def test_matmul_is_within_bf16_rounding(rows: int, cols: int, group_size: int, bits: int, batch: int) -> None:
    grid = _grid(rows, cols, group_size, bits)
    packed = int4pack.pack(grid, group_size=group_size)
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = int4pack.matmul(x, packed, group_size=group_size, rows=rows)
    weight = IntFormat(bits, group_size).decode(grid).double()
    exact = x.double() @ weight.T
    # One rounding (2^-9 of its value) for: the result; the scale; in the unpacked path the weight. With 4 bits z = (8 -
    # zero) * s rounds too, by up to 2^-9 * 8 s for every activation.
    offset = 8 * grid.scales.double() if bits == 4 else torch.zeros_like(grid.scales, dtype=torch.float64)
    reach = x.double().abs()
    weights = reach @ weight.abs().T
    offsets = reach.view(batch, -1, group_size).sum(2) @ offset.T
    bound = 2**-9 * (exact.abs() + 2.1 * (weights + offsets))
    assert y.dtype == torch.bfloat16 and y.shape == (batch, rows)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_need_no_offset(bits: int) -> None:
    packed = int4pack.pack(_grid(172, 64, 32, bits), group_size=32)
    assert not packed.scales_and_zeros[..., 1].any()


def test_both_regimes_agree_and_the_order_is_found(monkeypatch) -> None:
    packed = int4pack.pack(_grid(172, 128, 32, 4), group_size=32)
    x = torch.randn(120, 128).bfloat16()
    many = int4pack.matmul(x, packed, group_size=32, rows=172)
    monkeypatch.setattr(int4pack, "_order", lambda: None)
    few = int4pack.matmul(x, packed, group_size=32, rows=172)
    assert not torch.equal(many, few)  # the unpacked path was taken: it rounds the weights
    assert (many - few).float().norm() / few.float().norm() < 2**-7


def test_packing_in_stripes_changes_nothing(monkeypatch) -> None:
    grid = _grid(300, 64, 32, 4)
    whole = int4pack.pack(grid, group_size=32)
    monkeypatch.setattr(int4pack, "_CHUNK", 64 * 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, int4pack.pack(grid, group_size=32), strict=True))
