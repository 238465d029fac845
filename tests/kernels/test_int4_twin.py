"""The specification of the int4 kernel against float64, from the stored form on, and the torch operator."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats import IntCodes, IntFormat
from circuitpress_kernels import GROUP_SIZES, int4_linear, int4_linear_twin, int4_tiles, int4_weight


def _codes(rows: int, cols: int, group_size: int, bits: int = 4) -> IntCodes:
    generator = torch.Generator().manual_seed(rows * cols)
    groups = -(-cols // group_size)
    draw = {"dtype": torch.uint8, "generator": generator}
    return IntCodes(
        torch.randint(0, 2**bits, (rows, cols), **draw),
        (torch.rand(rows, groups, generator=generator) * 0.1).half(),
        torch.randint(0, 2**bits, (rows, groups), **draw),
    )


def _through_storage(value: IntCodes, group_size: int) -> IntCodes:
    rows, cols = value.codes.shape
    stored = IntFormat(4, group_size)
    return stored.unpack(stored.pack(value), rows, cols)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (3, 171), (70, 172), (1, 1), (129, 257)])
def test_tiles_decode_to_the_stored_weights(rows: int, cols: int, group_size: int) -> None:
    value = _codes(rows, cols, group_size)
    tiles = int4_tiles(*_through_storage(value, group_size), group_size=group_size)
    assert torch.equal(int4_weight(*tiles, rows=rows, cols=cols), IntFormat(4, group_size).decode(value))


def test_a_tile_is_contiguous_and_holds_halves_of_a_group() -> None:
    codes = (torch.arange(64 * 64) % 16).to(torch.uint8).view(64, 64)
    tiles = int4_tiles(codes, torch.ones(64, 2).half(), torch.zeros(64, 2, dtype=torch.uint8), group_size=32)
    assert tiles.codes.shape == (1, 2, 64, 16)
    assert tiles.codes[0, 1, 5, 3] == codes[5, 32 + 3] + 16 * codes[5, 32 + 16 + 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 1, 5, 8, 13])
def test_the_twin_matches_float64(batch: int, dtype: torch.dtype) -> None:
    value = _codes(70, 171, 32)
    tiles = int4_tiles(*value, group_size=32)
    x = torch.randn(batch, 171, generator=torch.Generator().manual_seed(1)).to(dtype)
    column = torch.arange(171) // 32
    weight = (value.codes.double() - value.zeros.double()[:, column]) * value.scales.double()[:, column]
    exact = x.double() @ weight.T
    y = int4_linear_twin(x, *tiles, 70)
    assert y.dtype == dtype
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * (x.double().abs() @ weight.abs().T)
    assert ((y.double() - exact).abs() <= bound).all()


def test_the_operator_is_the_twin_off_the_gpu_and_traces() -> None:
    tiles = int4_tiles(*_codes(70, 172, 64), group_size=64)
    x = torch.randn(3, 172)
    arguments: tuple[Tensor | int, ...] = (x, *tiles, 70)
    assert torch.equal(int4_linear(*arguments), int4_linear_twin(*arguments))
    torch.library.opcheck(int4_linear, arguments)


def test_a_group_size_without_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="a group of 48 has no kernel: group sizes are 32, 64, 128, 256"):
        int4_tiles(*_codes(4, 48, 48), group_size=48)
