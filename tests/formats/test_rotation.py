"""The rotation against dense matrices in float64: orthogonal, its own inverse but for the signs, flat, and stable."""

import pytest
import torch
from torch import Tensor

from circuitpress.formats.rotation import Block, block_of, hartley, rotate, signs, unrotate

LENGTHS = (1, 2, 3, 48, 64, 100, 171, 172, 288, 384, 509, 521, 640, 5632)


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix whose entry (i, j) is -1 to the number of ones that i and j share in binary."""
    index = torch.arange(order)
    shared = torch.tensor([[bin(int(i & j)).count("1") for j in index] for i in index])
    return 1.0 - 2.0 * (shared % 2).double()


def dense(length: int, salt: int, cap: int | None = None) -> Tensor:
    """The rotation as a matrix that acts on columns."""
    power, odd = block_of(length, cap=cap)
    block = torch.kron(sylvester(power) / power**0.5, hartley(odd))
    return torch.block_diag(*[block] * (length // (power * odd))) * signs(length, salt).double()


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_matrix_and_inverts_exactly(length: int) -> None:
    if length > 1024:
        x = torch.randn(2, length, dtype=torch.float64)
    else:
        matrix = dense(length, 3)
        assert torch.allclose(matrix @ matrix.T, torch.eye(length, dtype=torch.float64), atol=1e-12)
        x = torch.eye(length, dtype=torch.float64)
        assert torch.allclose(rotate(x, 3), matrix.T, atol=1e-12)
    assert torch.allclose(unrotate(rotate(x, 3), 3), x, atol=1e-12)
    assert torch.allclose(rotate(unrotate(x, 3), 3), x, atol=1e-12)


@pytest.mark.parametrize(("length", "cap"), [(172, 64), (256, 64), (256, 48), (96, 16), (171, 9), (64, 1)])
def test_a_cap_keeps_blocks_inside_a_unit(length: int, cap: int) -> None:
    assert block_of(length, cap=cap).size <= cap
    x = torch.randn(3, length, dtype=torch.float64)
    assert torch.allclose(rotate(x, 0, cap=cap), x @ dense(length, 0, cap).T, atol=1e-12)
    assert torch.allclose(unrotate(rotate(x, 0, cap=cap), 0, cap=cap), x, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "block"),
    [
        (4096, Block(128, 1)),
        (11008, Block(128, 1)),
        (96, Block(32, 1)),
        (172, Block(4, 43)),
        (144, Block(16, 9)),
        (171, Block(1, 171)),
        (1042, Block(2, 1)),
        (1026, Block(2, 171)),
    ],
)
def test_blocks(length: int, block: Block) -> None:
    assert block_of(length) == block


@pytest.mark.parametrize("odd", [1, 3, 43, 171])
def test_hartley_is_symmetric_orthonormal_and_flat(odd: int) -> None:
    matrix = hartley(odd)
    assert torch.allclose(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(odd, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / odd) ** 0.5 + 1e-12


def test_a_single_outlier_spreads_over_its_block() -> None:
    x = torch.zeros(344)
    x[7] = 1.0
    spread = rotate(x, 1)[:344]
    assert block_of(344) == Block(8, 43)
    assert float(spread.abs().max()) <= (2 / 344) ** 0.5 + 1e-6


def test_signs_do_not_change() -> None:
    """A checkpoint depends on them: the same on every machine and in every version."""
    assert "".join("+" if s > 0 else "-" for s in signs(40, 0).tolist()) == PINNED
    drawn = signs(1 << 16, 5)
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float((drawn * signs(1 << 16, 6)).mean())) < 0.02
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 0.02


def test_precision_and_type_are_kept() -> None:
    x = torch.randn(5, 384)
    assert rotate(x, 2).dtype == torch.float32
    assert torch.allclose(rotate(x, 2), rotate(x.double(), 2).float(), atol=1e-5)


PINNED = "++-+-+---+-+-+--++++++-+++++---+++--++-+"
