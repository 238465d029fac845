"""What adapters share: bytes of affine formats, group sizes, the GPTQ file layout against packing bit by bit."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from circuitpress.bench.peers.packing import decode, refuse_another_map, unpack
from circuitpress.bench.peers.protocol import Job, affine, affine_bytes


def pack(codes: NDArray[np.int64], bits: int) -> torch.Tensor:
    """int32 [n * bits / 32, m] of codes [n, m]: each column is written one bit after the other."""
    words = np.zeros((codes.shape[0] * bits // 32, codes.shape[1]), dtype=np.uint32)
    for row in range(codes.shape[0]):
        for bit in range(bits):
            at = row * bits + bit
            words[at // 32] |= (((codes[row] >> bit) & 1) << (at % 32)).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("minus_one", [False, True])
def test_the_gptq_layout(bits: int, minus_one: bool) -> None:
    rng = np.random.default_rng(bits)
    rows, cols, group = 64, 96, 32
    codes, zeros = rng.integers(0, 2**bits, (cols, rows)), rng.integers(0, 2**bits, (cols // group, rows))
    scales = torch.rand(cols // group, rows).half()
    index = torch.from_numpy(rng.permutation(cols) // group).int()
    stored = (zeros - 1) % 2**bits if minus_one else zeros
    tensors = {"qweight": pack(codes, bits), "qzeros": pack(stored.T, bits).T, "scales": scales, "g_idx": index}
    assert torch.equal(unpack(tensors["qweight"], bits), torch.from_numpy(codes))
    kept = decode(tensors, bits, minus_one=minus_one, reordered=True)
    groups = index.numpy()
    expected = (codes - zeros[groups]) * scales.double().numpy()[groups]
    assert np.allclose(kept.weight.double().numpy(), expected.T, rtol=1e-6)
    side = rows * cols // group * (16 + bits) // 8
    assert kept.nbytes == rows * cols * bits // 8 + side + 4 * cols
    assert decode(tensors, bits, minus_one=minus_one, reordered=False).nbytes == kept.nbytes - 4 * cols


def test_a_layout_that_was_read_wrong_is_noticed() -> None:
    """By what the peer's own layer computes: zero points off by one do not pass, 16-bit arithmetic does."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 24)), rng.integers(1, 15, (2, 24))
    index = torch.arange(64).int() // 32
    tensors = {"qweight": pack(codes, 4), "qzeros": pack(zeros.T, 4).T, "scales": torch.ones(2, 24), "g_idx": index}
    right, wrong = (decode(tensors, 4, minus_one=minus_one, reordered=False) for minus_one in (False, True))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16() @ right.weight.T.bfloat16()

    refuse_another_map("q", layer, right)
    with pytest.raises(ValueError, match=r"q: decoded weights differ by \d+% from those that the layer computes with"):
        refuse_another_map("q", layer, wrong)


def test_bytes_of_affine_formats() -> None:
    assert affine_bytes(3, 100, 3, 64, zero_bits=3) == -(-(900 + 6 * 19) // 8)  # the last group is short
    assert affine_bytes(4, 64, 4, 32, zero_bits=0) == 128 + 16
    assert affine_bytes(4, 64, 4, 64, zero_bits=16, scale_bits=32) == 128 + 24


def test_affine_decoding_of_a_short_group() -> None:
    codes, scale, zero = torch.arange(10).view(2, 5), torch.tensor([[1.0, 2.0], [0.5, 4.0]]), torch.ones(2, 2)
    expected = [[-1.0, 0.0, 1.0, 4.0, 6.0], [2.0, 2.5, 3.0, 28.0, 32.0]]
    assert torch.equal(affine(codes, scale, zero, 3), torch.tensor(expected))


@pytest.mark.parametrize(("size", "cols", "group"), [(64, 192, 64), (64, 352, 32), (128, 192, 64), (64, 172, 0)])
def test_the_group_of_a_matrix_divides_it(size: int, cols: int, group: int) -> None:
    assert Job("", "", 4, size, {}, {}, "").group(cols) == group
