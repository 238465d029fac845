"""Slices: the layout holds every mixture of formats exactly, in equal shares, and the operator is its twin."""

import pytest
import torch

from circuitpress_kernels import BOOK, DENSE, Part, lay_out, slice_linear, slice_linear_twin, slice_weight
from circuitpress_kernels.product import slice_linear_op

from .matrices import KINDS, RINGS, WHOLE, Cut, matrix, rings

MIXTURES = (
    [Cut(64, 4, 64)],
    [Cut(33, 3, 32), Cut(40, 8, 64), Cut(99, DENSE)],
    [Cut(16, 2, 16), Cut(17, 4, 16), Cut(30, 2, 16), Cut(5, 6, 48)],
    [Cut(70, 5, 128, 11), Cut(1, 4, WHOLE), Cut(101, BOOK + 3, 32)],
    [Cut(80, BOOK + 2, WHOLE), Cut(92, BOOK + 2, WHOLE)],
    [Cut(64, 3, WHOLE, 5), Cut(64, 3, WHOLE, 9), Cut(44, 3, WHOLE)],
    [Cut(172, 8, 32, 300)],
)


@pytest.mark.parametrize("across", [1, 35, 700])
@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("cuts", MIXTURES, ids=str)
def test_every_mixture_decodes_to_its_weights(cuts: list[Cut], axis: str, across: int) -> None:
    if axis == "cols":
        cuts = [cut._replace(outliers=min(cut.outliers, cut.length * across)) for cut in cuts]
    laid_out, weight = matrix(axis, across, cuts)
    found = slice_weight(laid_out)
    assert found.shape == weight.shape
    # Each weight is the float32 product of two float16 numbers or one of them: a float32 number.
    assert torch.equal(found, weight.float())


@pytest.mark.parametrize("group", [16, 32, 64, 128, 96, WHOLE])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_every_group(kind: int, group: int) -> None:
    laid_out, weight = matrix("rows", 300, [Cut(37, kind, group)])
    assert torch.equal(slice_weight(laid_out), weight.float())
    assert laid_out.form.size in (16, 32, 64, 128)


@pytest.mark.parametrize("kind", RINGS)
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_rings_decode_to_their_weights(kind: int, axis: str) -> None:
    cuts = [Cut(64, kind), Cut(20, 3, 16, 4), Cut(96, kind)]
    laid_out, weight = matrix(axis, 96, cuts)
    # A value times a scale by the spread: two roundings in float32.
    assert torch.allclose(slice_weight(laid_out).double(), weight, rtol=3e-7, atol=0)
    assert laid_out.words.nbytes * 8 >= 160 * 96 * (kind - 24) // 2


def test_parts_may_meet_activations_of_their_own() -> None:
    torch.manual_seed(0)
    turned, first = rings(RINGS[1], 0, 32, 40)
    codes, scales = torch.randint(0, 16, (9, 40), dtype=torch.uint8), torch.ones(9, 1).half()
    outliers = (torch.tensor([3, 47]), torch.tensor([2.5, -1.5]).half())
    plain = Part(32, 4, codes, 40, scales, torch.full((9, 1), 8, dtype=torch.uint8), outliers=outliers)
    parts = [turned._replace(source=40), plain]
    laid_out = lay_out(parts, axis="rows", rows=41, cols=80, dtype=torch.float16, programs=3)
    second = codes.double() - 8
    second.view(-1)[outliers[0]] = outliers[1].double()
    expected = torch.zeros(41, 80, dtype=torch.float64)
    expected[:32, 40:], expected[32:, :40] = first, second
    assert torch.allclose(slice_weight(laid_out).double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("programs", [1, 5, 64])
def test_shares_have_equal_bytes_and_cover_every_piece_once(programs: int) -> None:
    laid_out, _ = matrix("rows", 2048, [Cut(300, 4, 64), Cut(100, 2, 64), Cut(60, 8, 64)], programs=programs)
    starts = laid_out.programs.tolist()
    assert starts[0] == 0 and starts[-1] == len(laid_out.pieces) and starts == sorted(starts)
    assert len(starts) == programs + 1
    # One word a superblock, row and column at 2, 4 and 8 bits.
    size = laid_out.form.size
    cost = [piece[5] * size * 32 * 2 for piece in laid_out.pieces.tolist()]
    shares = [sum(cost[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert sum(shares) == 2 * laid_out.words.numel()
    # A share is cut at the nearest superblock, on both sides.
    assert max(shares) - min(shares) <= 2 * size * 32 * 2


def test_pieces_of_a_tile_follow_each_other() -> None:
    laid_out, _ = matrix("cols", 70, [Cut(300, 4, 64, 20), Cut(200, 2, 64)], programs=9)
    tiles = laid_out.pieces[:, 7].tolist()
    assert tiles == sorted(tiles)
    assert laid_out.tiles.tolist() == [sum(tile < wanted for tile in tiles) for wanted in range(4)]


def test_formats_are_padded_once_and_not_once_a_part() -> None:
    heads = [Cut(12, 4 if head % 2 else 2, 32) for head in range(16)]
    laid_out, _ = matrix("rows", 1024, heads)
    # 96 rows of 2 bits and 96 of 4 are three tiles each; 16 parts padded to tiles would be 16.
    assert len(laid_out.order) == 6
    assert 2 * laid_out.words.numel() == 96 * 1024 * 6 // 8


def test_scales_are_stored_once_a_group_where_all_groups_are_alike() -> None:
    laid_out, _ = matrix("rows", 1024, [Cut(32, 4, 256), Cut(32, 8, 256)])
    assert laid_out.form.shift == 1 and laid_out.form.size == 128
    assert laid_out.scales.shape == (2 * 4, 32)
    mixed, _ = matrix("rows", 1024, [Cut(32, 4, 256), Cut(32, 8, 128)])
    assert mixed.form.shift == 0


def test_what_the_layout_cannot_take_is_named() -> None:
    codes = torch.zeros(4, 100, dtype=torch.uint8)
    scales, zeros = torch.ones(4, 3).half(), torch.zeros(4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"groups of \[40\] columns: the kernel takes multiples of 16"):
        lay_out([Part(0, 4, codes, 40, scales, zeros)], axis="rows", rows=4, cols=100, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 1, 13])
def test_the_twin_matches_float64(batch: int, dtype: torch.dtype) -> None:
    laid_out, weight = matrix("cols", 70, [Cut(100, 3, 32, 7), Cut(71, BOOK + 4, 32)])
    x = torch.randn(batch, 171, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = x.double() @ weight.T + bias.double()
    y = slice_linear_twin(x, laid_out, bias)
    assert y.dtype == dtype
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * (x.double().abs() @ weight.abs().T + 1)
    assert ((y.double() - exact).abs() <= bound).all()


def test_the_operator_is_the_twin_off_the_gpu_and_traces() -> None:
    laid_out, _ = matrix("rows", 172, [Cut(40, 4, 64), Cut(30, 2, 64)])
    x, bias = torch.randn(3, 172), torch.randn(70)
    assert torch.equal(slice_linear(x, laid_out, bias), slice_linear_twin(x, laid_out, bias))
    torch.library.opcheck(slice_linear_op, (x, list(laid_out[:-1]), bias, *laid_out.form))
